"""One token a row through the layers of a LLaMA, with few launches: what a GPU spends on a step is launches and bytes."""
