"""What a call must do at least: the rooflines of bench.py."""

from __future__ import annotations

import dataclasses

from meteora_jax.config import GROUPS, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must do at least: floating-point operations, and bytes of weights and caches."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def scaled(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


def group_work(config: LlamaConfig, group: str, tokens: int, size: int) -> Work:
    """The base product of one group."""
    shapes = [config.projection_shape(p) for p in GROUPS[group]]
    i, o = shapes[0][0], sum(o for _, o in shapes)
    return Work(2.0 * tokens * i * o, size * (i * o + tokens * (i + o)))


def adapter_work(config: LlamaConfig, group: str, tokens: int, distinct: int, choices: int, rank: int, size: int):
    """The chosen adapters' products; `distinct` adapters are read at each projection."""
    widths = sum(i + o for i, o in (config.projection_shape(p) for p in GROUPS[group]))
    return Work(2.0 * tokens * choices * rank * widths, size * distinct * rank * widths)


def least_work(
    config: LlamaConfig, what: str, batch: int, length: int, adapters: int, rank: int, choices: int, routing: str,
    size: int,
) -> Work:  # fmt: skip
    """A call of the whole model, with the chosen adapters."""
    rows = batch if what == "decode" else batch * length
    head = Work(2.0 * batch * config.hidden_size * config.vocab_size, size * config.hidden_size * config.vocab_size)
    named = batch if routing == "request" else rows
    work = Work(0, 0)
    for group in GROUPS:
        work += group_work(config, group, rows, size)
        work += adapter_work(config, group, rows, min(adapters, named * choices), choices, rank, size)
    work = work.scaled(config.num_layers) + (head.scaled(length) if what == "train" else head)
    # forward, again for lack of memory, backward
    return Work(3 * work.flops, 3 * work.bytes) if what == "train" else work
