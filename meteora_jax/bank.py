"""The bank: all adapters of one base, and what kinds of weight a model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from meteora_jax.config import GROUPS, AdapterInfo, BankConfig, InputError


class BaseParam(nnx.Param):
    """A weight of the base model."""


class AdapterParam(nnx.Param):
    """A weight of the adapters."""


class OwnGateParam(nnx.Param):
    """Of each adapter its own gate, trained on the adapter's data alone."""


class AdapterConstant(nnx.Param):
    """What of the adapters nobody trains: scales (alpha over rank), DoRA's columns, biases."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """All adapters of one base, stacked: zero-padded to a common rank, scale 0 where an adapter has no part.

    a: {projection: [L, A, R, I]}, b: {projection: [L, A, R, O]}, scale: {projection: float32 [L, A]}.
    `a` keeps PEFT's row order: the shrink then reads it along I whether it is dense over the adapters or
    gathers the chosen ones. Where an adapter has them, dora {projection: float32 [L, A, O]} is what its magnitudes make
    of each output column less 1, bias {projection: [L, A, O]} belongs to its `b`, and own_gate {projection: float32
    [L, A, I]} tells the adapter's input from others' (PHATGOOSE). The arrays are the host's; a
    model's are put on its devices.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    scale: dict[str, Any]
    config: BankConfig = dataclasses.field(metadata={"static": True})
    dora: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocab_adapters: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # see model.vocab_adapters
    own_gate: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.names

    def group(self, group: str, into: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, np.ndarray] | None:
        """A group's tensors as `LoRALinear` holds them; None if no adapter touches the group.

        lora_a [L, P, A, R, I], lora_b [L, A, R, O of the group], lora_scale float32 [L, P, A]; lora_dora and lora_bias
        float32 [L, A, O of the group] and own_gate float32 [L, P, A, I] where an adapter has them. DoRA's columns are
        folded into lora_b. into: memory for lora_a and lora_b, of the rank or a larger one, and of the type that they
        are to have; what it held is overwritten.
        """
        projections = GROUPS[group]
        rank = max((self.config.ranks.get(p, 0) for p in projections), default=0)
        if rank == 0:
            return None
        n, count = self.config.num_layers, len(self.names)
        widths = [self.config.base_shapes[p][1] for p in projections]
        if into is None:
            dtype = next(iter(self.a.values())).dtype
            wide = self.config.base_shapes[projections[0]][0]
            into = (
                np.zeros((n, len(projections), count, rank, wide), dtype),
                np.zeros((n, count, rank, sum(widths)), dtype),
            )
        elif any(p not in self.a or self.a[p].shape[2] < into[0].shape[3] for p in projections):
            for part in into:
                part.fill(0)
        scale, first = np.zeros((n, len(projections), count), np.float32), 0
        for at, (p, width) in enumerate(zip(projections, widths, strict=True)):
            if p in self.a:
                own = slice(self.a[p].shape[2])
                np.copyto(into[0][:, at, :, own], self.a[p], casting="unsafe")
                np.copyto(into[1][:, :, own, first : first + width], self._scaled_b(p), casting="unsafe")
                scale[:, at] = self.scale[p]
            first += width
        tensors = {"lora_a": into[0], "lora_b": into[1], "lora_scale": scale}
        for key, held in (("lora_dora", self.dora), ("lora_bias", self.bias)):
            if any(p in held for p in projections):
                columns = [
                    held[p].astype(np.float32)
                    if p in held
                    else np.zeros((n, count, self.config.base_shapes[p][1]), np.float32)
                    for p in projections
                ]
                tensors[key] = np.concatenate(columns, -1)
        if any(p in self.own_gate for p in projections):
            width = self.config.base_shapes[projections[0]][0]
            none = np.zeros((n, count, width), np.float32)
            tensors["own_gate"] = np.stack([np.asarray(self.own_gate.get(p, none), np.float32) for p in projections], 1)
        return tensors

    def less(self, general: Sequence[str], source: str) -> AdapterBank:
        """The other adapters with the mean A and the mean B of these subtracted from their own (GenKnowSub, Bagherifard
        et al., ACL 2025 short 54, as peft does it): what all tasks share no longer tells them apart.

        source: the bank's folder, for messages.

        Raises:
            InputError: unknown adapters, none that stays, or adapters that differ in more than their weights.
        """
        infos, wanted = self.config.adapters, set(general)
        problems = [f"{source}: expected one of {', '.join(self.names)}, found {n!r}" for n in wanted - {*self.names}]
        if not wanted or wanted >= set(self.names):
            problems.append(f"{source}: expected general adapters and others, found {', '.join(general) or 'none'}")
        if len(wanted) < len(general):
            problems.append(f"{source}: expected each general adapter once, found {', '.join(general)}")
        if self.dora or self.bias or self.own_gate or self.vocab_adapters or self.config.invoked:
            found = "DoRA, biases, own gates, vocabulary or invocations"
            problems.append(f"{source}: expected LoRA matrices alone, found {found}")
        if any(
            (a.rank, a.targets, bool(a.peft_config.get("rank_pattern"))) != (*_shape(infos[0]), False) for a in infos
        ):
            problems.append(f"{source}: expected adapters of one rank with the same projections, found others")
        if problems:
            raise InputError(problems)
        mine = [i for i, info in enumerate(infos) if info.name not in wanted]
        others = [i for i, info in enumerate(infos) if info.name in wanted]

        def subtracted(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {p: z[:, mine] - np.mean(z[:, others], axis=1, keepdims=True) for p, z in parts.items()}

        config = dataclasses.replace(self.config, adapters=tuple(infos[i] for i in mine))
        scale = {p: z[:, mine] for p, z in self.scale.items()}
        return AdapterBank(subtracted(self.a), subtracted(self.b), scale, config)

    def _scaled_b(self, p: str) -> np.ndarray:
        b = self.b[p]
        if p not in self.dora:
            return b
        return (b.astype(np.float32) * (1 + self.dora[p][:, :, None, :])).astype(b.dtype)


def _shape(info: AdapterInfo) -> tuple[int, tuple[str, ...]]:
    return info.rank, info.targets


def group_rank(bank: BankConfig | None, group: str) -> int:
    """R of a group's stacked adapters; 0 if no adapter touches it."""
    return 0 if bank is None else max((bank.ranks.get(p, 0) for p in GROUPS[group]), default=0)
