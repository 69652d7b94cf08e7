"""What `bench.py` is asked: which base, programs, adapters and routing to time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from meteora_jax.config import LlamaConfig
from meteora_jax.gate_config import FormName, TokenRouterForm
from meteora_jax.training.recipes import RECIPES

Group = Literal["qkv", "o", "gate_up", "down"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times the bare base and the same base with adapters in one run."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Shape of the base; its weights are random."""
    what: tuple[Literal["kernel", "prefill", "decode", "train"], ...] = ("kernel", "prefill", "decode", "train")
    """kernel: the routed LoRA of one projection group; prefill: the prompts; decode: a decoding step after the
    prompts; train: a step of gate training."""
    batch: tuple[int, ...] = (1, 8)
    """Sequences. `kernel`: tokens, or requests with --routing request."""
    sequence: tuple[int, ...] = (32,)
    """Tokens of a prompt or of a training sequence. `kernel` with --routing request: tokens of a request."""
    adapters: tuple[int, ...] = (28,)
    """Adapters in the bank."""
    rank: tuple[int, ...] = (8,)
    """Rank of every adapter."""
    top_k: tuple[int, ...] = (2,)
    """Adapters that act on a token; several values are compared with one and the same bare base."""
    gates: FormName = "meteora"
    """prefill, decode, train: what routes, a gate at every projection (meteora) or the token router of its recipe."""
    routing: Literal["gates", "given", "request"] = "gates"
    """gates: gates route each token, and their cost is included. given (`kernel` only): indices and weights are inputs.
    request: each request has a mixture of --top-k adapters."""
    implementation: tuple[str, ...] = ()
    """`kernel`: the implementations to time; all that run on this device unless given."""
    group: tuple[Group, ...] = ("qkv", "o", "gate_up", "down")
    """`kernel`: the projection groups to time."""
    settings: tuple[str, ...] = ()
    """prefill, decode, train: `ExecutionConfig`s to compare with today (the default one), each bare and with adapters:
    xla (without Triton), plain (nothing that only a GPU has), dots (train only: matmul results are stored for the
    backward pass), or all."""
    profile: bool = False
    """prefill, decode, train: list the kernels of one call that take longest (name, launches, microseconds)."""
    layers: int | None = None
    """Layers of the model, all of the shape's unless given. `kernel`: layers whose weights are used in sequence, 8
    unless given."""
    seconds: float = 2.0
    """Measuring time of each program, compilation excluded."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    json: Path | None = None
    """Write the records here: a list with one object a measurement."""
    picture: Path | None = None
    """Draw a bar chart of the ratios here."""

    @property
    def form(self) -> TokenRouterForm | None:
        """The token router's form; None: MeteoRA's own gates."""
        return RECIPES[self.gates].form


def llama(name: str) -> LlamaConfig:
    """The configuration of a published model by its name; `tiny` is for trying the script."""
    vocab, d, f, layers, heads, kv, head_dim = {
        "tiny": (256, 64, 160, 2, 4, 2, 16),
        "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64),
        "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    }[name]
    return LlamaConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads, num_kv_heads=kv,
        head_dim=head_dim, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=8192,
        tie_word_embeddings=name == "smollm2-135m", attention_bias=False, mlp_bias=False, bos_token_id=None,
        eos_token_ids=(),
    )  # fmt: skip
