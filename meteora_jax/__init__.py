"""One LLaMA-family model with many LoRA adapters inside, where nobody has to pick the adapter."""

from meteora_jax.api import Completion, Delta, Meteora, load
from meteora_jax.batching import Engine, Pending
from meteora_jax.config import InputError
from meteora_jax.engine import Sampling
from meteora_jax.retriever.index import Index
from meteora_jax.routing import Routing, RoutingTrace
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.retrieval import GatesWithin, Retrieval

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "Fixed",
    "Gates",
    "GatesWithin",
    "Index",
    "InputError",
    "Meteora",
    "Pending",
    "Retrieval",
    "Routing",
    "RoutingTrace",
    "Sampling",
    "load",
]
