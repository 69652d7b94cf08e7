"""The transformer: attention, caches, linear maps with adapters, and the model made of them."""
