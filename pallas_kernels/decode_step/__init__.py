"""One token a row through the layers of a LLaMA in few launches: a GPU's step is made of launches and bytes."""
