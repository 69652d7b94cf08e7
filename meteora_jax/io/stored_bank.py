"""A BANK folder that stays on disk: its adapters are read one by one, when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from meteora_jax.bank import AdapterBank
from meteora_jax.config import AdapterInfo, BankConfig, InputError, LlamaConfig, VocabAdapterConfig, read_json
from meteora_jax.io.files import refuse_unimported_bank
from meteora_jax.io.provenance import BaseOrigin, misfits
from meteora_jax.io.tensors import WEIGHTS, all_finite, map_tensors, open_tensors, read_ahead


class StoredBank:
    """The description of a bank, and its memory-mapped weights. Adapters keep no memory here once they were read."""

    def __init__(
        self, folder: str | os.PathLike[str], base: LlamaConfig, dtype: DTypeLike, origin: BaseOrigin | None = None
    ):
        """Reads the description and the weight file's table of contents.

        Raises:
            InputError: as `load_bank`.
        """
        self.folder, self.dtype = Path(folder), dtype
        refuse_unimported_bank(self.folder)
        source = str(self.folder / "bank.json")
        self.config = BankConfig.from_json(read_json(self.folder / "bank.json"), source)
        if problems := misfits(self.config, base, origin, source):
            raise InputError(problems)
        self._shapes = self.config.weight_shapes()
        open_tensors(self.folder / WEIGHTS, self._shapes)
        self._tensors = map_tensors(self.folder / WEIGHTS)

    def place(self, adapter: str | None, name: str) -> int:
        """The number of an adapter; None: of the one called `name`, or of its only one.

        Raises:
            InputError: it has none.
        """
        names = self.config.names
        wanted = adapter or (name if name in names or len(names) != 1 else names[0])
        if wanted not in names:
            raise InputError(f"{self.folder}: expected an adapter's name ({', '.join(names[:8])}), found {wanted!r}")
        return names.index(wanted)

    def adapter(self, at: int) -> AdapterBank:
        """The bank of its adapter number `at` alone, padded to no more than its own rank; its matrices are the mapped
        file's, in the type that they have there.

        Raises:
            InputError: the file holds a value that is no finite number.
        """
        info = self.config.adapters[at]
        tensors = {key: self._read(key, at, info.rank) for key in self._shapes}
        for values in tensors.values():
            read_ahead(values)
        unfit = [key for key, t in tensors.items() if not all_finite(t)]
        if unfit:
            raise InputError(
                f"{self.folder / WEIGHTS}: {unfit[0]}: expected finite numbers for {info.name!r}, found others"
            )
        ranks = {p: min(r, info.rank) for p, r in self.config.ranks.items()}
        vocab = {
            end: VocabAdapterConfig(min(held.rank, info.rank), (held.tokens[at],))
            for end, held in self.config.vocab_adapters.items()
        }
        config = _alone(self.config, at, ranks, vocab)

        def part(kind: str, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
            return {p: tensors[f"{p}.{kind}"].astype(dtype) for p in ranks if f"{p}.{kind}" in tensors}

        ends: dict[str, dict[str, Any]] = {}
        for end in vocab:
            held = {k: tensors[f"{end}.{k}"] for k in ("a", "b", "scale", "rows") if f"{end}.{k}" in tensors}
            ends[end] = {k: t.astype(np.float32 if k == "scale" else self.dtype) for k, t in held.items()}
            if "rows" in held:
                ends[end]["rows"] = ends[end]["rows"][:, : vocab[end].most]
        a, b = ({p: tensors[f"{p}.{kind}"] for p in ranks} for kind in ("a", "b"))
        b |= {p: b[p].astype(self.dtype) for p in ranks if f"{p}.dora" in tensors}  # DoRA multiplies what a model has
        scale = part("scale")
        return AdapterBank(a, b, scale, config, part("dora"), part("bias"), ends, part("own_gate"))

    def _read(self, key: str, at: int, rank: int) -> np.ndarray:
        """A tensor's part of one adapter, its axis kept: a view."""
        place, _, kind = key.rpartition(".")
        before = 1 if place in self.config.ranks else 0  # axes: layers
        part = (*[slice(None)] * before, slice(at, at + 1))
        if kind in ("a", "b"):
            part += (slice(min(rank, self._shapes[key][before + 1])),)
        return self._tensors[key][part]


def _alone(config: BankConfig, at: int, ranks: dict[str, int], vocab: dict[str, VocabAdapterConfig]) -> BankConfig:
    vocab = {end: held for end, held in vocab.items() if held.rank or held.most}
    return BankConfig(
        (config.adapters[at],), ranks, config.num_layers, config.base_shapes, config.dora, config.lora_bias,
        vocab, config.vocab_shape if vocab else None, config.base,
    )  # fmt: skip


def empty_slots(bank: BankConfig, count: int, rank: int | None = None) -> BankConfig:
    """The description of `count` slots, each of which holds any adapter of `bank`.

    Args:
        rank: of a slot, at every projection; None: as the bank's adapters need.
    """
    assert bank.adapters, "a bank has adapters"
    targets = tuple(dict.fromkeys(t for info in bank.adapters for t in info.targets))
    gated = any(info.own_gate for info in bank.adapters)
    any_of_them = AdapterInfo("", max(bank.ranks.values(), default=0), targets, "", "", {}, own_gate=gated)
    ranks = bank.ranks if rank is None else dict.fromkeys(bank.base_shapes, rank)
    vocab = {
        end: VocabAdapterConfig(held.rank if rank is None else min(held.rank, rank), (tuple(range(held.most)),) * count)
        for end, held in bank.vocab_adapters.items()
    }
    return BankConfig(
        (any_of_them,) * count, ranks, bank.num_layers, bank.base_shapes, bank.dora, bank.lora_bias,
        vocab, bank.vocab_shape, bank.base,
    )  # fmt: skip


def slots_for(rank: int, slots: BankConfig) -> int:
    """How many slots an adapter of that rank takes: one where projections' slots have different ranks."""
    ranks = {*slots.ranks.values(), *(held.rank for held in slots.vocab_adapters.values() if held.rank)}
    return -(-rank // min(ranks)) if len(ranks) == 1 else 1


def misfits_slots(adapter: BankConfig, slots: BankConfig, source: str) -> list[str]:
    """Why an adapter, described alone, has no room in such slots; a line a reason."""
    problems, most = [], min(len(slots.adapters), slots_for(adapter.adapters[0].rank, slots))
    for p, rank in adapter.ranks.items():
        if p in adapter.adapters[0].targets and rank > (room := most * slots.ranks.get(p, 0)):
            problems.append(
                f"{source}: {p}: expected a rank of at most {room} (the slots'; adapter_rank), found {rank}"
            )
    config = adapter.adapters[0].peft_config
    for switch, places in (("use_dora", slots.dora), ("lora_bias", slots.lora_bias)):
        lacking = [p for p in adapter.ranks if p in adapter.adapters[0].targets and p not in places]
        if config.get(switch) and lacking:
            problems.append(f"{source}: {switch}: expected an adapter without it, which the slots' bank has not, "
                            f"found one at {', '.join(lacking)}")  # fmt: skip
    if lacking := [p for p in adapter.own_gates if p not in slots.own_gates]:
        problems.append(f"{source}: own_gate: expected an adapter without gates of its own, which the slots' bank has "
                        f"not, found one at {', '.join(lacking)}")  # fmt: skip
    for end, held in adapter.vocab_adapters.items():
        room = slots.vocab_adapters.get(end, VocabAdapterConfig(0, ()))
        if held.rank > most * room.rank or held.most > room.most:
            problems.append(
                f"{source}: {end}: expected at most rank {room.rank} and {room.most} rows (the slots'), found rank "
                f"{held.rank} and {held.most} rows"
            )
    return problems
