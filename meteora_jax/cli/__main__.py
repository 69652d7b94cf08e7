"""`python -m meteora_jax.cli`: the same as `meteora`."""

from meteora_jax.cli import main

main()
