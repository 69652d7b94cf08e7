"""Continuous batching: many requests, each with its own router, through one model at once."""

from meteora_jax.engine.batch import bind_row
from meteora_jax.engine.engine import EngineCore, EngineSize
from meteora_jax.engine.handle import Handle
from meteora_jax.engine.request import FinishReason, Progress, Request, Sampling

__all__ = ["EngineCore", "EngineSize", "FinishReason", "Handle", "Progress", "Request", "Sampling", "bind_row"]
