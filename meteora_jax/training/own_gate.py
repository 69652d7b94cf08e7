"""A gate of an adapter's own, trained on the adapter's data alone (PHATGOOSE, arXiv 2402.05859, section 3).

Base and adapter stay as they are; at every projection of the adapter y = W u + sigmoid(v . u) dW u, and v is trained by
the next token's loss. Nobody needs the other adapters for it, whose gates `mj.Phatgoose` compares it with later.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank, OwnGateParam
from meteora_jax.config import GROUPS, BankConfig, InputError, read_json
from meteora_jax.evaluation.tasks import Example
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.files import refuse_foreign
from meteora_jax.io.tensors import WEIGHTS, read_tensors, write_folder
from meteora_jax.routing import GateLogits, Routing, Score
from meteora_jax.training.settings import AdapterTraining, Checkpointing
from meteora_jax.training.step import optimizer
from meteora_jax.training.trainer import Callbacks, Trainee, Trainer, fetched
from meteora_jax.training.watch import FlopCount


@dataclasses.dataclass(frozen=True)
class OwnGate:
    """The first adapter of the bank acts by as much as its own gate lets through."""

    needs_gates = False

    def bind(self, routers: Sequence[OwnGate | None], names: tuple[str, ...]) -> BoundOwnGate:
        return BoundOwnGate(np.asarray([r is not None for r in routers]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundOwnGate:
    """own: bool [B], the rows that are routed so."""

    own: Any

    @property
    def gating(self) -> None:
        """Nothing is chosen."""

    @property
    def asks(self) -> frozenset[Score]:
        """The own gate's logit."""
        return frozenset({"own-gate"})

    def known(self, positions: jax.Array | None) -> None:
        """Nothing: every token has its weight."""

    def after_gates(self, x: jax.Array, gates: GateLogits) -> BoundOwnGate:
        """Itself."""
        return self

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """x [B, T, I] -> Routing [B, T, P, 1], its weight sigmoid(v . u)."""
        weights = jax.nn.sigmoid(gates.score("own-gate")[..., :1])
        return Routing(jnp.zeros(weights.shape, jnp.int32), jnp.where(self.own[:, None, None, None], weights, 0.0))


def train_own_gate(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: AdapterTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    checkpointing: Checkpointing = Checkpointing(),
    callbacks: Callbacks = Callbacks(),
) -> dict[str, Any]:
    """Trains the own gate of the adapter `settings.name` of BANK and writes the bank with it to `dest`; everything else
    of the bank keeps every bit. Otherwise as `adapter.train_adapter`.

    Raises:
        InputError: no such adapter, or one that changes the vocabulary or waits for its invocation.
    """
    kind = jnp.dtype(dtype)
    refuse_foreign(dest, "bank.json", WEIGHTS)
    config, weights = load_base(base, kind)
    whole = load_bank(bank, config, kind, read_origin(base))
    i = _place(whole.config, settings.name, str(bank))
    one = _alone(whole, i)
    run, speed = settings.optimization, settings.schedule
    trainer = Trainer(
        trainee=Trainee(
            base=base, config=config, weights=weights, bank=one, trained=OwnGateParam, router=OwnGate(),
            flops=FlopCount.of(config, one.config, chosen=1, gates="meteora", train_adapters=False),
        ),
        tasks=tasks, labels=dict.fromkeys(tasks, 0), settings=settings, mixture=settings.mixture,
        optimizer=optimizer(run.steps, run.learning_rate, speed.warmup, speed.clip),
        dtype=kind, mesh=mesh, checkpointing=checkpointing, callbacks=callbacks, identity={"trained": "own gate"},
    )  # fmt: skip
    state, final = trainer.run()
    gates = fetched(state.params)
    if jax.process_index() == 0:
        _write(Path(bank), Path(dest), i, gates)
    return final


def _place(bank: BankConfig, name: str, source: str) -> int:
    if name not in bank.names:
        raise InputError(f"{source}: name: expected one of {', '.join(bank.names)}, found {name!r}")
    if name in bank.vocab_adapter_names or name in bank.invoked:
        raise InputError(f"{source}: {name}: expected an adapter of projections alone, found vocabulary or invocation")
    return bank.names.index(name)


def _alone(bank: AdapterBank, i: int) -> AdapterBank:
    """A bank of one of its adapters, with a gate that lets half through."""

    def only(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {p: z[:, i : i + 1] for p, z in parts.items()}

    info = dataclasses.replace(bank.config.adapters[i], own_gate=True)
    config = dataclasses.replace(bank.config, adapters=(info,), vocab_adapters={}, vocab_shape=None)
    shapes = {p: (config.num_layers, 1, config.base_shapes[p][0]) for p in config.own_gates}
    own = {p: np.zeros(shape, np.float32) for p, shape in shapes.items()}
    parts = only(bank.a), only(bank.b), only(bank.scale)
    return AdapterBank(*parts, config, only(bank.dora), only(bank.bias), own_gate=own)


def _write(source: Path, dest: Path, i: int, gates: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """The bank at `source` with the own gate of adapter i: {("layers", group, "own_gate"): [L, P, 1, I]}."""
    old = BankConfig.from_json(read_json(source / "bank.json"), str(source / "bank.json"))
    infos = [dataclasses.replace(a, own_gate=a.own_gate or at == i) for at, a in enumerate(old.adapters)]
    new = dataclasses.replace(old, adapters=tuple(infos))
    tensors = read_tensors(source / WEIGHTS, old.weight_shapes())
    for group, projections in GROUPS.items():
        for at, p in enumerate(projections):
            if p in new.own_gates and p in infos[i].targets:
                empty = np.zeros(new.weight_shapes()[f"{p}.own_gate"], np.float32)
                own = tensors.setdefault(f"{p}.own_gate", empty)
                own[:, i] = gates["layers", group, "own_gate"][:, at, 0]
    write_folder(dest, "bank.json", new.to_json(), tensors)
