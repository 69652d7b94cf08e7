"""A run of training: gates of a bank, one adapter or many, on any mesh; it can be stopped anywhere and goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank
from meteora_jax.config import InputError, LlamaConfig, Preempted
from meteora_jax.examples import Example, end_token
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.io.base import sample_digest
from meteora_jax.io.model_state import assemble, column_orders
from meteora_jax.io.tensors import StoredArray
from meteora_jax.routing import BoundRouter, Router
from meteora_jax.sharding import Params, fetch, finite, place_rows, rows_multiple, tensor_shards, use_mesh
from meteora_jax.text import load_tokenizer, tokenizer_digest
from meteora_jax.training.charts import write_accuracy_map, write_curves
from meteora_jax.training.checkpoints import Checkpoints, Restored, preemption
from meteora_jax.training.data import Batches, Layout, Mixture, own_shards, plan
from meteora_jax.training.loss import Loss, Losses, NextTokenLoss
from meteora_jax.training.sequences import Tokenized
from meteora_jax.training.settings import Checkpointing, Training
from meteora_jax.training.step import Step, TrainState, initial_state, make_step
from meteora_jax.training.unused import Unused, unused
from meteora_jax.training.validation import Validated, Validation
from meteora_jax.training.watch import FlopCount, Recorder

Progress = Callable[[int, dict[str, Any]], None]
Begun = Callable[[Unused], None]
Chosen = Mapping[str, Sequence[tuple[Example, Tokenized]]]
Path = str | os.PathLike[str]

# Settings that came after the first checkpoints, with what they were before: these runs go on.
LATER = {
    "composite_sizes": (3, 3), "composite_shots": 0, "form": None, "lm_loss": True, "response_weight": None,
    "start_weight": 0.0, "segment_weight": 0.0, "composite_cut": 0.0, "ema": 0.0,
    "background_share": 0.25, "conversations": 0.0,
}  # fmt: skip
LATER_KEYS = ("tokenizer",)  # what else came after them: checkpoints that do not say it go on


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a run calls while it goes.

    begun: called once the data have been read, with what of them is not used. progress: with every step and its
    record, a step late. validated: with every validation's record.
    """

    begun: Begun | None = None
    progress: Progress | None = None
    validated: Validated | None = None


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A base with a bank, and gates beside it if there are any; what of them is trained, and who routes meanwhile.

    base: its folder; weights: its tensors. trained: the types of the parameters that are trained; columns: bool [A],
    the gates' columns that are (all unless given). router: None where the loss routes by itself. form: of the gates.
    """

    base: Path
    config: LlamaConfig
    weights: Mapping[tuple[str, ...], StoredArray]
    bank: AdapterBank
    trained: type[nnx.Variable] | tuple[type[nnx.Variable], ...]
    router: Router | None
    flops: FlopCount
    gates: Mapping[str, np.ndarray] | None = None
    form: TokenRouterForm | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that a run is made of; `run` is the run.

    tasks: {name: training examples}; labels: the adapter of each. loss: what is minimised. shares: {name: lengths} ->
    how often each is drawn, instead of `mixture`. validation: what is scored between steps. identity: what else decides
    the run's numbers.
    """

    trainee: Trainee
    tasks: Mapping[str, Sequence[Example]]
    labels: Mapping[str, int]
    settings: Training
    optimizer: optax.GradientTransformation
    dtype: np.dtype
    mesh: Mesh | None = None
    loss: Loss = NextTokenLoss()
    mixture: Literal["balanced", "natural"] = "balanced"
    shares: Callable[[Mapping[str, np.ndarray]], dict[str, float]] | None = None
    checkpointing: Checkpointing = Checkpointing()
    callbacks: Callbacks = Callbacks()
    validation: Validation | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.checkpointing.run and importlib.util.find_spec("matplotlib") is None:  # now, not when the run is over
            wanted = "expected matplotlib for its pictures: install meteora-jax[eval]"
            raise InputError(f"{self.checkpointing.run}: {wanted}")

    def run(self) -> tuple[TrainState, dict[str, Any]]:
        """The state after the last step, and its record with losses averaged over the last tenth of the steps.

        Raises:
            Preempted: SIGTERM came and the run was saved.
        """
        mixture, chosen, lost = self._data()
        checkpoints = self._checkpoints()
        with closing(checkpoints) if checkpoints else nullcontext():
            return self._run(mixture, chosen, lost, checkpoints)

    def _run(
        self, mixture: Mixture, chosen: Chosen, lost: Unused, checkpoints: Checkpoints | None
    ) -> tuple[TrainState, dict[str, Any]]:
        graph, frozen, state = self._state()
        restored = checkpoints.restore(state) if checkpoints else None
        layout = self._layout(mixture, chosen, checkpoints if restored else None)
        batches = Batches(mixture, chosen, layout, own_shards(layout, self.mesh))
        if restored:
            state = restored.state
            batches.seek(restored.position)
        start = restored.step if restored else 0
        scalars = self.checkpointing.in_run("tensorboard")
        if start == 0 and scalars is not None and jax.process_index() == 0:
            for events in scalars.glob("events.out.tfevents*"):  # of a run that this one replaces
                events.unlink(missing_ok=True)
        step = self._step(graph, state, lost)
        if self.validation is not None:
            self.validation.begin(graph, state, layout, self.dtype, self.mesh, run=self.checkpointing.run, start=start)
        recorder = Recorder(
            self.trainee.bank.names if self.trainee.gates is None else tuple(self.labels),
            self.checkpointing.log or self.checkpointing.in_run("log.jsonl"), scalars,
            start=start, progress=self.callbacks.progress, flops=self.trainee.flops,
        )  # fmt: skip
        try:
            state = self._steps(step, frozen, state, batches, layout, start, recorder, checkpoints)
        finally:
            recorder.close()
        self._draw(recorder)
        return state, self._final(recorder, layout, lost, restored)

    def _data(self) -> tuple[Mixture, Chosen, Unused]:
        """Where sequences come from, those of each task, and what is not used; says so."""
        data, drawing, model = self.settings.data, self.settings.drawing, self.trainee
        tokenizer = load_tokenizer(model.base)
        mixture = Mixture(
            self.tasks, self.labels, tokenizer, end_token(model.base, model.config, tokenizer),
            max_length=longest(model.config, self.settings), prompt_loss=drawing.prompt_loss,
            composite=data.composite, composite_sizes=drawing.composite_sizes, composite_shots=drawing.composite_shots,
            composite_cut=drawing.composite_cut, conversations=drawing.conversations, mixture=self.mixture,
            samples_per_task=data.samples_per_task, seed=self.settings.seed,
        )  # fmt: skip
        chosen = mixture.chosen()
        lost = unused(mixture, chosen)
        if self.validation is not None:
            lost = dataclasses.replace(lost, validation_prompts=self.validation.repeats)
        if self.callbacks.begun is not None:
            self.callbacks.begun(lost)
        if self.shares is not None:
            lengths = {name: np.asarray([len(s.tokens) for _, s in pairs]) for name, pairs in chosen.items()}
            mixture = dataclasses.replace(mixture, shares=self.shares(lengths))
        return mixture, chosen, lost

    def _checkpoints(self) -> Checkpoints | None:
        folder = self.checkpointing.in_run("checkpoints")
        if folder is None:
            return None
        orders = column_orders(self.trainee.config, tensor_shards(self.mesh))
        checkpoints = Checkpoints(folder, self.checkpointing.keep, self._identity(), orders, LATER_KEYS)
        if not self.checkpointing.resume:
            checkpoints.clear()
        return checkpoints

    def _state(self) -> tuple[nnx.GraphDef, Params, TrainState]:
        """The model's graph, what of it stays as it is, and the state of a run that begins."""
        m = self.trainee
        graph, full = assemble(m.config, m.weights, m.bank, m.gates, self.dtype, self.mesh, m.form)
        graph, params, frozen = nnx.split(nnx.merge(graph, full), m.trained, ...)
        state = initial_state(params, self.optimizer, self.mesh)
        state = state if self.validation is None else self.validation.first(state, self.mesh)
        if self.mesh is None:  # committed, as what a checkpoint gives back: for what is not, JAX compiles another step
            state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
        return graph, frozen, state

    def _layout(self, mixture: Mixture, chosen: Chosen, checkpoints: Checkpoints | None) -> Layout:
        """The run's layout: the checkpoint's, or a new one."""
        multiple = rows_multiple(self.mesh) * self.settings.optimization.accumulate
        layout = checkpoints.layout() if checkpoints else None
        if layout is None:
            drawing = self.settings.drawing
            layout = plan(
                mixture, chosen, self.settings.data.batch_size, packing=drawing.packing, multiple=multiple,
                shards=jax.process_count(), rows=drawing.rows,
            )  # fmt: skip
        if layout.rows % multiple:
            raise InputError(
                f"mesh: expected data x fsdp x accumulate to divide the run's {layout.rows} rows, found {multiple}"
            )
        return layout

    def _step(self, graph: nnx.GraphDef, state: TrainState, lost: Unused) -> Step:
        run = self.settings.optimization
        return make_step(
            graph, state, self.optimizer, self.loss, dtype=self.dtype, remat=run.recomputed,
            accumulate=run.accumulate, columns=self.trainee.columns, mesh=self.mesh, shared_prefix=lost.shared_prefix,
            ema=0.0 if self.validation is None else self.validation.ema,
        )  # fmt: skip

    def _steps(
        self,
        step: Step,
        frozen: Params,
        state: TrainState,
        batches: Batches,
        layout: Layout,
        start: int,
        recorder: Recorder,
        checkpoints: Checkpoints | None,
    ) -> TrainState:
        """All steps after `start`."""
        steps, validation = self.settings.optimization.steps, self.validation
        router = self._bound(layout)
        late: tuple[int, Losses] | None = None  # a step's figures are read while the next one runs
        with use_mesh(self.mesh), preemption() if checkpoints else nullcontext(_never) as asked:
            for number in range(start + 1, steps + 1):
                batch = place_rows(next(batches), self.mesh)
                state, losses = step(frozen, state, batch, router)
                if late:
                    recorder.add(*late)
                late = (number, losses)
                if validation is not None and validation.due(number):
                    recorder.add(*late)
                    late = None
                    state = validation.judge(number, frozen, state)
                stop = asked(number)
                if number == steps or (checkpoints and (stop or number % self.checkpointing.save_every == 0)):
                    if late:
                        recorder.add(*late)  # first: a loss that is no number must not be saved
                    late = None
                    if not finite(state.params):  # the loss is that of the parameters before the step
                        raise InputError(f"step {number}: expected finite parameters, found others: nothing is saved")
                if checkpoints is None:
                    continue
                if stop or number % self.checkpointing.save_every == 0 or number == steps:
                    checkpoints.save(number, state, layout, batches.position())
                if stop and number < steps:
                    checkpoints.wait()
                    raise Preempted(number, checkpoints.folder)
        return state

    def _bound(self, layout: Layout) -> BoundRouter | None:
        """The router for the rows of one part of a batch."""
        part, router = layout.rows // self.settings.optimization.accumulate, self.trainee.router
        if router is None:
            return None
        routers: Any = [router] * part
        bound = router.bind(routers, self.trainee.bank.names)
        return place_rows(jax.tree.map(np.asarray, bound), self.mesh)

    def _draw(self, recorder: Recorder) -> None:
        curves, accuracy = (self.checkpointing.in_run(name) for name in ("curves.png", "gate_accuracy.png"))
        if not (curves and accuracy and recorder.records and jax.process_index() == 0):
            return
        write_curves(recorder.records, curves)
        if recorder.accuracies:
            last = list(recorder.accuracies)[-max(1, self.settings.optimization.steps // 10) :]
            write_accuracy_map(np.mean(last, axis=0), accuracy)

    def _final(self, recorder: Recorder, layout: Layout, lost: Unused, restored: Restored | None) -> dict[str, Any]:
        start = restored.step if restored else 0
        shape = {"rows": layout.rows, "width": layout.width}
        final = {**recorder.summary(), **shape, "resumed_at": start, "unused": lost.record()}
        return final | ({"refused": list(restored.refused)} if restored and restored.refused else {})

    def _identity(self) -> dict[str, Any]:
        """What decides a run's numbers, the mesh aside: two runs that differ in it must not go on from each other."""
        m, digest = self.trainee, hashlib.sha256()
        for name, examples in self.tasks.items():
            for e in examples:
                digest.update(f"{name}\0{e.key}\0{e.response}\0".encode())
        own = {k: v for k, v in self.settings.record().items() if k not in LATER or v != LATER[k]}
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        if m.columns is not None and m.gates is not None:
            old = hashlib.sha256(b"".join(np.ascontiguousarray(gate).tobytes() for gate in m.gates.values()))
            own["extended"] = old.hexdigest()[:16]
            if m.form is not None:
                own["stream"] = "trained"  # runs that left what all columns read as it was are other runs
        return {
            **own, **self.identity, "dtype": str(self.dtype), "tasks": digest.hexdigest()[:16],
            "base": sample_digest(m.weights), "tokenizer": tokenizer_digest(m.base),
            "base_shape": [m.config.num_layers, m.config.hidden_size, m.config.vocab_size],
            "adapters": {a.name: a.sha256[:16] for a in m.bank.config.adapters},
        }  # fmt: skip


def longest(config: LlamaConfig, settings: Training) -> int:
    """Tokens that a sequence may have."""
    return min(settings.data.max_length, config.max_position_embeddings)


def fetched(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    """Trained parameters on the host, by path; all processes take part."""
    return {tuple(map(str, path)): fetch(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def _never(step: int) -> bool:
    del step
    return False
