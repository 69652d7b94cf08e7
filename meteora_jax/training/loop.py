"""The loop of training: gates of a bank, or one adapter, on any mesh; it can be stopped anywhere and goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.adapters import AdapterParam, GateParam
from meteora_jax.checkpoint import (
    SHARED_BY_ADAPTERS,
    StoredArray,
    assemble,
    column_orders,
    fresh_gates,
    load_bank,
    load_base,
    load_gates,
    read_origin,
    save_bank,
    save_gates,
    split_bank,
    split_gates,
)
from meteora_jax.config import PROJECTIONS, BankConfig, InputError, LlamaConfig, Preempted, read_json
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.sharding import fetch, place_rows, rows_multiple, tensor_shards, use_mesh
from meteora_jax.text import load_tokenizer
from meteora_jax.training.adapter import fresh_adapter
from meteora_jax.training.charts import write_accuracy_map, write_curves
from meteora_jax.training.checkpoints import Checkpoints, preemption
from meteora_jax.training.data import Batches, Layout, Mixture, own_shards, plan
from meteora_jax.training.loss import Losses
from meteora_jax.training.side_by_side import shares_of
from meteora_jax.training.step import TrainState, initial_state, make_step, optimizer
from meteora_jax.training.unused import Unused, unused
from meteora_jax.training.watch import Recorder, flops_per_pair, flops_per_token

Progress = Callable[[int, dict[str, Any]], None]
Begun = Callable[[Unused], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What training of gates and of adapters have in common.

    batch_size: sequences a step (packed: on average). composite: share of the sequences that hold several tasks,
    composite_sizes (from, to) of them, behind at most composite_shots worked examples. samples_per_task: at most so
    many examples of a task. remat: recompute activations ("dots": all but the matmuls' results). accumulate: parts
    that a step's batch is worked off in. rows: of the packed batch, instead of what batch_size and the mean length
    give.
    """

    steps: int
    batch_size: int
    learning_rate: float = 5e-4
    warmup: float = 0.005
    clip: float = 0.3
    composite: float = 0.0
    composite_sizes: tuple[int, int] = (3, 3)
    composite_shots: int = 0
    mixture: Literal["balanced", "natural"] = "balanced"
    samples_per_task: int | None = None
    max_length: int = 4096
    packing: bool = True
    rows: int | None = None
    prompt_loss: bool = True
    remat: bool | Literal["dots"] = True
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self):
        low = {"steps": 1, "batch_size": 1, "max_length": 2, "accumulate": 1}
        problems = [
            f"{k}: expected at least {n}, found {getattr(self, k)}" for k, n in low.items() if getattr(self, k) < n
        ]
        if self.rows is not None and self.rows < 1:
            problems.append(f"rows: expected at least 1, found {self.rows}")
        if problems:
            raise InputError(problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateTraining(Training):
    """How gates are trained; the defaults are the original's, batch and steps aside. `training.recipes` has whole ones.

    form: a token router, or None: MeteoRA's own gates. lm_loss: without it a token router is trained by the gate term
    alone, and no layer runs. answer_share: what the answers' tokens, together, count in the gate term; as many as they
    are unless given. turn_share: the part of that which the first two tokens of each answer count by themselves. order:
    without the LM loss, the weight beside the gate term of telling the previous segment's task and the own segment's
    index. composite_cut: without it, too, the share of composites whose questions and answers are cut to their ends.
    """

    beta: float = 50.0
    top_k: int = 2
    temperature: float = 1.0
    train_adapters: bool = False
    adapter_learning_rate: float | None = None
    form: TokenRouterForm | None = None
    lm_loss: bool = True
    answer_share: float | None = None
    turn_share: float = 0.0
    order: float = 0.0
    composite_cut: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        problems = []
        if not self.lm_loss and (self.form is None or self.train_adapters):
            problems.append("lm_loss: expected a token router and frozen adapters to go without it, found others")
        if self.answer_share is not None and not 0 <= self.answer_share <= 1:
            problems.append(f"answer_share: expected a share from 0 to 1, found {self.answer_share}")
        if self.answer_share is not None and self.prompt_loss:
            problems.append("answer_share: expected no prompt_loss beside it: what carries loss is then the answers")
        if not 0 <= self.turn_share <= 1 or (self.turn_share and self.answer_share is None):
            problems.append(f"turn_share: expected a share from 0 to 1 beside answer_share, found {self.turn_share}")
        if self.order < 0:
            problems.append(f"order: expected 0 or more, found {self.order}")
        if self.lm_loss and (self.order or self.composite_cut):
            problems.append("order, composite_cut: expected no lm_loss beside them")
        if problems:
            raise InputError(problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTraining(Training):
    """How one adapter is trained: W x + alpha / rank * B A x at every projection in `targets`."""

    name: str
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its checkpoints, TensorBoard scalars, log and pictures.

    resume: go on from the newest checkpoint there, if there is one; else start over. every: steps between saves.
    """

    path: Path
    every: int = 100
    keep: int = 3
    resume: bool = True

    def __post_init__(self):
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}: expected at least 1, found {getattr(self, key)}")
        if importlib.util.find_spec("matplotlib") is None:  # now, not when the run is over
            raise InputError(f"{self.path}: expected matplotlib for its pictures: install meteora-jax[eval]")


def train_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: GateTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    run: RunFolder | None = None,
    new_bank: str | os.PathLike[str] | None = None,
    extend: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    begun: Begun | None = None,
) -> dict[str, Any]:
    """Trains a bank's gates on its adapters' tasks and writes GATES/ to `dest`.

    Args:
        tasks: {adapter name: training examples}, one for every adapter of the bank.
        run: without one nothing is saved before the end.
        new_bank: with settings.train_adapters, the BANK folder for the trained adapters.
        extend: GATES of a part of the bank's adapters. Their columns are kept bit for bit and only the others'
            trained, on the tasks of all: the old ones' tokens are what the new columns must not claim.
        log: JSON lines, one a step.
        progress: called with every step and its record, a step late.
        begun: called once the data have been read, with what of them is not used.

    Returns:
        the last step's record, losses averaged over the last tenth of the steps; `unused`, what `begun` was told.

    Raises:
        Preempted: SIGTERM came and the run was saved.
    """
    if settings.train_adapters != (new_bank is not None):
        raise InputError("train_adapters: expected a new bank to write exactly if adapters are trained")
    if settings.adapter_learning_rate is not None and not settings.train_adapters:
        raise InputError("adapter_learning_rate: expected train_adapters beside it, found adapters frozen")
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind, read_origin(base))
    names = loaded.names
    if settings.top_k > len(names):
        raise InputError(f"top_k: expected at most {len(names)} (the bank's adapters), found {settings.top_k}")
    form = settings.form
    fresh = fresh_gates(form, config, len(names), settings.seed)
    columns = _extended(extend, config, names, form, fresh) if extend is not None else None
    if settings.train_adapters and (loaded.config.dora or loaded.config.lora_bias):
        raise InputError(f"{bank}: train_adapters: expected plain LoRA, found an adapter with DoRA or a bias")
    if loaded.config.invoked:
        found = ", ".join(loaded.config.invoked)
        raise InputError(f"{bank}: expected adapters that act on every token (gates choose for each), found {found}")
    labels = {name: i for i, name in enumerate(names)}
    trained = (GateParam, AdapterParam) if settings.train_adapters else GateParam
    router = Gates(settings.top_k, settings.temperature)
    flops = dict(chosen=settings.top_k, gates=form or "meteora", train_adapters=settings.train_adapters)
    flops |= {"lm": settings.lm_loss}
    state, final = fit(
        base, config, weights, loaded, fresh, trained, router, labels, tasks, settings, flops, columns=columns,
        form=form, kind=kind, mesh=mesh, run=run, log=log, progress=progress, begun=begun,
    )  # fmt: skip
    flat = {tuple(map(str, path)): fetch(leaf[...]) for path, leaf in nnx.to_flat_state(state.params)}
    if jax.process_index() == 0:
        if new_bank is not None:
            save_bank(new_bank, split_bank(loaded, flat, config, mesh))
        save_gates(Path(dest), GateConfig(names, settings.top_k, settings.temperature, form), split_gates(flat))
    return final


def _extended(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    names: tuple[str, ...],
    form: TokenRouterForm | None,
    gates: dict[str, np.ndarray],
) -> np.ndarray:
    """Fills the columns that GATES/ has into `gates`, of that form; which columns it has not, bool [A]."""
    source = Path(folder) / "gates.json"
    described = GateConfig.from_json(read_json(source), str(source))
    if described.form != form:
        asked, found = (f or "MeteoRA's own gates" for f in (form, described.form))
        raise InputError(f"{source}: form: expected {asked} (as asked for), found {found}")
    old = described.names
    unknown = [n for n in old if n not in names]
    if unknown:
        raise InputError(f"{source}: names: expected adapters of the bank, found {', '.join(unknown)}")
    if len(old) == len(names):
        raise InputError(f"{source}: names: expected a part of the bank's adapters, found all of them")
    _, trained = load_gates(folder, config, old)
    at = [names.index(n) for n in old]
    for name, columns in trained.items():
        if name in SHARED_BY_ADAPTERS:
            gates[name] = columns
        else:
            gates[name][..., at] = columns
    return ~np.isin(np.arange(len(names)), at)


def train_adapter(
    base: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: AdapterTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    run: RunFolder | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    begun: Begun | None = None,
) -> dict[str, Any]:
    """Trains one adapter on all `tasks` and writes it to `dest` as a BANK of one. Otherwise as `train_gates`."""
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    shape = settings.rank, settings.alpha, settings.targets, settings.seed
    bank = fresh_adapter(config, settings.name, *shape, read_origin(base))
    router = Fixed(settings.name)
    flops = dict(chosen=1, gates=None, train_adapters=True)
    state, final = fit(
        base, config, weights, bank, None, AdapterParam, router, dict.fromkeys(tasks, 0), tasks, settings, flops,
        kind=kind, mesh=mesh, run=run, log=log, progress=progress, begun=begun,
    )  # fmt: skip
    flat = {tuple(map(str, path)): fetch(leaf[...]) for path, leaf in nnx.to_flat_state(state.params)}
    if jax.process_index() == 0:
        save_bank(dest, split_bank(bank, flat, config, mesh))
    return final


def fit(
    base, config, weights, bank, gates, trained, router, labels, tasks, settings, flops, *, columns=None,
    form=None, kind, mesh, run, log, progress, validation=None, begun=None,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """The run itself: data, state (fresh, or where a run left off), the loop, the pictures.

    validation: what scores held-back sequences between steps, a `bank.Validation`; clipping is then each adapter's own.
    """
    if not config.eos_token_ids:
        raise InputError(f"{base}: eos_token_id: expected an end token, found none")
    mixture = Mixture(
        tasks, labels, load_tokenizer(base), config.eos_token_ids[0],
        max_length=min(settings.max_length, config.max_position_embeddings), prompt_loss=settings.prompt_loss,
        composite=settings.composite, composite_sizes=settings.composite_sizes,
        composite_shots=settings.composite_shots, composite_cut=getattr(settings, "composite_cut", 0.0),
        mixture=settings.mixture, samples_per_task=settings.samples_per_task, seed=settings.seed,
    )  # fmt: skip
    chosen = mixture.chosen()
    lost = unused(mixture, chosen)
    if validation is not None:
        lost = dataclasses.replace(lost, beside_held_back=validation.beside)
    if begun is not None:
        begun(lost)
    if validation is not None:
        lengths = {name: np.asarray([len(s.tokens) for _, s in pairs]) for name, pairs in chosen.items()}
        mixture = dataclasses.replace(mixture, shares=shares_of(lengths, settings.tokens, float(settings.epochs)))
    identity = _identity(config, bank.config, weights, tasks, settings, kind)
    if columns is not None:
        old = hashlib.sha256(b"".join(np.ascontiguousarray(gates[name]).tobytes() for name in gates))
        identity |= {"extended": old.hexdigest()[:16]}
    orders = column_orders(config, tensor_shards(mesh))
    checkpoints = Checkpoints(run.path / "checkpoints", run.keep, identity, orders) if run else None
    if checkpoints and run and not run.resume:
        checkpoints.clear()
    graph, full = assemble(config, weights, bank, gates, kind, mesh, form)
    del weights
    graph, params, frozen = nnx.split(nnx.merge(graph, full), trained, ...)
    tx = optimizer(
        settings.steps, settings.learning_rate, settings.warmup, settings.clip,
        getattr(settings, "adapter_learning_rate", None), each=validation is not None,
    )  # fmt: skip
    state = initial_state(params, tx, mesh)
    state = state if validation is None else validation.first(state, mesh)
    restored = checkpoints.restore(state) if checkpoints else None
    layout = _layout(mixture, chosen, settings, mesh, checkpoints if restored else None)
    batches = Batches(mixture, chosen, layout, own_shards(layout, mesh))
    if restored:
        state = restored.state
        batches.seek(restored.position)
    start = restored.step if restored else 0
    part = layout.rows // settings.accumulate
    bound = place_rows(jax.tree.map(np.asarray, router.bind([router] * part, bank.names)), mesh)
    step = make_step(
        graph, state, tx, beta=getattr(settings, "beta", 0.0), dtype=kind, remat=settings.remat,
        accumulate=settings.accumulate, columns=columns, mesh=mesh,
        lm_loss=getattr(settings, "lm_loss", True), answer_share=getattr(settings, "answer_share", None),
        turn_share=getattr(settings, "turn_share", 0.0), order=getattr(settings, "order", 0.0),
        shared=lost.shared_prefix, average=getattr(settings, "average", 0.0),
    )  # fmt: skip
    if validation is not None:
        validation.begin(graph, state, layout, kind, mesh, run.path if run else None, start)
    path = Path(log) if log else run.path / "log.jsonl" if run else None
    recorder = Recorder(
        bank.names, path, run.path / "tensorboard" if run else None, start=start, progress=progress,
        flops=(flops_per_token(config, bank.config, **flops), flops_per_pair(config) if flops.get("lm", True) else 0.0),
    )  # fmt: skip
    try:
        state = _loop(
            step,
            frozen,
            state,
            bound,
            batches,
            layout,
            settings.steps,
            start,
            recorder,
            checkpoints,
            run,
            mesh,
            validation,
        )
    finally:
        recorder.close()
        if checkpoints:
            checkpoints.close()
    if run and recorder.records and jax.process_index() == 0:
        write_curves(recorder.records, run.path / "curves.png")
        if recorder.accuracies:
            tail = list(recorder.accuracies)[-max(1, settings.steps // 10) :]
            write_accuracy_map(np.mean(tail, axis=0), run.path / "gate_accuracy.png")
    final = {
        **recorder.summary(),
        "rows": layout.rows,
        "width": layout.width,
        "resumed_at": start,
        "unused": lost.record(),
    }
    return state, final | ({"refused": list(restored.refused)} if restored and restored.refused else {})


def _loop(
    step, frozen, state, router: BoundRouter, batches: Batches, layout: Layout, steps: int, start: int,
    recorder: Recorder, checkpoints: Checkpoints | None, run: RunFolder | None, mesh: Mesh | None, validation: Any,
) -> TrainState:  # fmt: skip
    late: tuple[int, Losses] | None = None  # a step's figures are read while the next one runs
    with use_mesh(mesh), preemption() if checkpoints else nullcontext(lambda _: False) as asked:
        for number in range(start + 1, steps + 1):
            batch = place_rows(next(batches), mesh)
            state, losses = step(frozen, state, batch, router)
            if late:
                recorder.add(*late)
            late = (number, losses)
            if validation is not None and validation.due(number):
                recorder.add(*late)
                late = None
                state = validation.judge(number, frozen, state)
            if checkpoints is None or run is None:
                continue
            stop = asked(number)
            if stop or number % run.every == 0 or number == steps:
                if late:
                    recorder.add(*late)  # first: a loss that is no number must not be saved
                late = None
                checkpoints.save(number, state, layout, batches.position())
            if stop and number < steps:
                checkpoints.wait()
                raise Preempted(number, checkpoints.folder)
    if late:
        recorder.add(*late)
    return state


def _layout(
    mixture: Mixture, chosen: Any, settings: Training, mesh: Mesh | None, checkpoints: Checkpoints | None
) -> Layout:
    """The run's layout: the checkpoint's, or a new one."""
    multiple = rows_multiple(mesh) * settings.accumulate
    layout = checkpoints.layout() if checkpoints else None
    if layout is None:
        layout = plan(
            mixture, chosen, settings.batch_size, packing=settings.packing, multiple=multiple,
            shards=jax.process_count(), rows=settings.rows,
        )  # fmt: skip
    if layout.rows % multiple:
        raise InputError(
            f"mesh: expected data x fsdp x accumulate to divide the run's {layout.rows} rows, found {multiple}"
        )
    return layout


def _identity(
    config: LlamaConfig,
    bank: BankConfig,
    weights: Mapping[Any, StoredArray],
    tasks: Mapping[str, Sequence[Example]],
    settings: Training,
    kind: Any,
) -> dict[str, Any]:
    """What decides a run's numbers, the mesh aside: two runs that differ in it must not go on from each other."""
    digest = hashlib.sha256()
    for name, examples in tasks.items():
        for e in examples:
            digest.update(f"{name}\0{e.prompt}\0{e.response}\0".encode())
    sample = hashlib.sha256()
    for path in sorted(weights, key=str):  # a few rows of each weight tell one base from another
        sample.update(weights[path].first(4096).tobytes())
    own = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    later = ("form", "lm_loss", "answer_share", "turn_share", "order", "composite_cut")
    for key in ("composite_sizes", "composite_shots", *later):
        if key in own and getattr(settings, key) == getattr(GateTraining, key):
            own.pop(key)  # runs that were begun before there was a choice go on
    if not own.get("average", True):
        own.pop("average")
    return {
        **own, "dtype": str(kind), "tasks": digest.hexdigest()[:16], "base": sample.hexdigest()[:16],
        "base_shape": [config.num_layers, config.hidden_size, config.vocab_size],
        "adapters": {a.name: a.sha256[:16] for a in bank.adapters},
    }  # fmt: skip
