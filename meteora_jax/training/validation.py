"""The validation split of each task: how it is chosen and scored, and of each adapter the state that served it best.

Small tasks are learnt by heart long before large ones are learnt, so adapters that share a run must not share its end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.execution import Jit
from meteora_jax.sharding import Params, fetch, place_rows, place_whole, replicated, use_mesh
from meteora_jax.training.data import Batch, Layout, Mixture, collate, rounded
from meteora_jax.training.loss import token_scores
from meteora_jax.training.sequences import NO_TASK, Tokenized, encode
from meteora_jax.training.settings import BankTraining
from meteora_jax.training.side_by_side import EMA, along_adapters, task_routing
from meteora_jax.training.step import TrainState, computed
from meteora_jax.training.watch import kept_records

Validated = Callable[[dict[str, Any]], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """Each adapter's best parameters so far, the step that left them (int32 [A]), and their scores on the validation
    split: the share of sequences whose response tokens are all the likeliest, and the mean loss (float32 [A])."""

    params: Params
    step: jax.Array
    exact: jax.Array
    loss: jax.Array


def split_validation(
    tasks: Mapping[str, Sequence[Example]], settings: BankTraining, tokenizer: Any, end: int, max_length: int
) -> tuple[dict[str, list[Example]], dict[str, list[Tokenized]]]:
    """Each task's examples to train on, and its validation split, a random part of the others, as sequences whose
    responses are predicted.

    A prompt is on one side only. No sequence longer than max_length is in the split: no training would learn for it.
    """
    training, split, problems = {}, {}, []
    for i, (name, examples) in enumerate(tasks.items()):
        sizes = settings.validating
        wanted = min(sizes.validation_max, max(sizes.validation_min, round(sizes.validation_share * len(examples))))
        prompts: set[str] = set()
        split[name] = []
        for j in np.random.default_rng([settings.seed, i, 1]).permutation(len(examples)):
            if len(split[name]) == wanted:
                break
            if examples[j].key in prompts:
                continue
            sequence = encode(examples[j], i, tokenizer, end, prompt_loss=False)
            if len(sequence.tokens) <= max_length:
                split[name].append(sequence)
                prompts.add(examples[j].key)
        training[name] = [e for e in examples if e.key not in prompts]
        if len(split[name]) < sizes.validation_min or not training[name]:
            problems.append(
                f"tasks: {name}: expected more than {sizes.validation_min} examples of at most {max_length} tokens, "
                f"found {len(split[name])} for the validation split and {len(training[name])} to train on"
            )
    if problems:
        raise InputError(problems)
    return training, split


def repeated_prompts(
    tasks: Mapping[str, Sequence[Example]],
    training: Mapping[str, Sequence[Example]],
    split: Mapping[str, Sequence[Tokenized]],
) -> dict[str, int]:
    """Each task's examples that are on neither side of `split_validation`: another response to a prompt of the
    validation split."""
    return {name: len(examples) - len(training[name]) - len(split[name]) for name, examples in tasks.items()}


def validation_composites(
    tasks: Mapping[str, Sequence[Example]],
    training: Mapping[str, Sequence[Example]],
    settings: BankTraining,
    tokenizer: Any,
    end: int,
    max_length: int,
) -> list[Tokenized]:
    """`Validating.validation_composites` composite problems, drawn as training draws its own, of examples that are not
    in `training`; worked examples too."""
    if not settings.validating.validation_composites:
        return []
    seen = {name: {e.key for e in training[name]} for name in tasks}
    unseen = {name: [e for e in examples if e.key not in seen[name]] for name, examples in tasks.items()}
    mixture = Mixture(
        unseen, {name: i for i, name in enumerate(tasks)}, tokenizer, end, max_length, False, seed=settings.seed,
        composite_sizes=settings.drawing.composite_sizes, composite_shots=settings.drawing.composite_shots,
    )  # fmt: skip
    chosen, rng = mixture.chosen(), np.random.default_rng([settings.seed, len(tasks), 2])
    return [mixture.draw_composite(chosen, rng, max_length) for _ in range(settings.validating.validation_composites)]


def packed(sequences: Sequence[Tokenized], layout: Layout) -> list[Batch]:
    """All sequences in as few batches of that layout as first-fit needs, every token with its sequence's number (from
    1) as its segment; the last batch is filled up with empty rows."""
    rows: list[tuple[int, list[int]]] = []  # tokens so far, sequences
    for number, s in enumerate(sequences):
        fitting = (k for k, (used, _) in enumerate(rows) if used + len(s.tokens) <= layout.width)
        at = next(fitting, len(rows))
        if at == len(rows):
            rows.append((0, []))
        rows[at] = rows[at][0] + len(s.tokens), [*rows[at][1], number]
    batches = []
    for first in range(0, len(rows), layout.rows):
        own = [numbers for _, numbers in rows[first : first + layout.rows]]
        empty = Tokenized(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int32))
        batch = collate([empty] * layout.rows, layout.width)
        for row, numbers in enumerate(own):
            start = 0
            for number in numbers:
                s = sequences[number]
                at = slice(start, start + len(s.tokens))
                batch.tokens[row, at], batch.loss[row, at], batch.tasks[row, at] = s.tokens, s.loss, s.tasks
                batch.positions[row, at], batch.segments[row, at] = np.arange(len(s.tokens)), number + 1
                start = at.stop
        batches.append(batch)
    return batches


class Validation:
    """Scores each adapter on its task's validation split, and keeps its best parameters in the run's state.

    split: {task: sequences}, in the order of the adapters. composites: sequences of several tasks. validated: called
    with every validation's record. repeats: {task: examples that are not trained on, as their prompt is in the split
    with another response}.
    """

    def __init__(
        self,
        split: Mapping[str, Sequence[Tokenized]],
        settings: BankTraining,
        validated: Validated | None = None,
        composites: Sequence[Tokenized] = (),
        repeats: Mapping[str, int] | None = None,
    ):
        self.repeats = {name: count for name, count in (repeats or {}).items() if count}
        self._names, self._validated, self.ema = tuple(split), validated, settings.validating.ema
        self._sequences = [*(s for sequences in split.values() for s in sequences), *composites]
        self._alone = len(self._sequences) - len(composites)
        steps = settings.optimization.steps
        count = settings.validating.validations
        self._due = {max(1, round(steps * k / count)) for k in range(1, count + 1)}
        self.records: list[dict[str, Any]] = []
        self._file: Path | None = None

    def first(self, state: TrainState, mesh: Mesh | None) -> TrainState:
        """The state with a place for the best, which anything will beat, and for the EMA."""
        count = len(self._names)
        scores = np.zeros(count, np.int32), np.full(count, -1, np.float32), np.full(count, np.inf, np.float32)
        ema = EMA(_copied(state.params), _placed(np.int32(0), mesh)) if self.ema else None
        return dataclasses.replace(state, best=Best(_copied(state.params), *_placed(scores, mesh)), ema=ema)

    def begin(
        self,
        graph: nnx.GraphDef,
        state: TrainState,
        layout: Layout,
        dtype: DTypeLike,
        mesh: Mesh | None,
        *,
        run: Path | None,
        start: int,
    ) -> None:
        """What a run knows once its layout is settled.

        run: the folder that gets validation.jsonl. start: the step that the run goes on from.
        """
        width = max(layout.width, *(rounded(len(s.tokens)) for s in self._sequences))
        self._mesh, self._batches = mesh, packed(self._sequences, dataclasses.replace(layout, width=width))

        def score(frozen: Params, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, computed(params, dtype), frozen)
            out = model(batch.tokens, batch.positions, task_routing(batch.tasks), segments=batch.segments)
            return token_scores(model, out.hidden, batch)

        def keep(params: Params, best: Params, better: jax.Array) -> Params:
            return jax.tree.map(lambda new, old: jnp.where(along_adapters(better, new), new, old), params, best)

        self._score = Jit(score) if mesh is None else Jit(score, out_shardings=replicated(mesh))
        where = {} if mesh is None else {"out_shardings": jax.tree.map(lambda x: x.sharding, state.best.params)}
        self._keep = Jit(keep, donate_argnums=1, **where)
        if run is None or jax.process_index() != 0:
            return
        self._file = run / "validation.jsonl"
        self.records = kept_records(self._file, start)
        run.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")

    def due(self, step: int) -> bool:
        """Whether a validation comes after this step."""
        return step in self._due

    def scores(self, frozen: Params, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Each adapter's share of sequences in which all that it predicts of the response is the likeliest, and its
        mean loss a token of these; float32 [1, A], or [2, A]: of its task alone, and in composites (nan where it is in
        none).

        An adapter predicts what follows its own tokens.
        """
        count = len(self._names)
        wrong, loss, tokens = (np.zeros((len(self._sequences) + 1) * count) for _ in range(3))
        for batch in self._batches:
            losses, likeliest = map(fetch, self._score(frozen, params, place_rows(batch, self._mesh)))
            owner = np.roll(batch.tasks, 1, axis=1)  # a sequence's first token is never predicted
            of = np.where(batch.loss & (owner != NO_TASK), batch.segments * count + owner, 0)  # 0: nobody's
            for total, part in ((wrong, ~likeliest), (loss, losses), (tokens, np.ones(of.shape))):
                total += np.bincount(of.reshape(-1), part.reshape(-1), len(total))
        wrong, loss, tokens = (x.reshape(-1, count)[1:] for x in (wrong, loss, tokens))
        kinds = [slice(0, self._alone), slice(self._alone, None)][: 1 + (self._alone < len(self._sequences))]
        with np.errstate(invalid="ignore"):
            exact = [((wrong[k] == 0) & (tokens[k] > 0)).sum(0) / (tokens[k] > 0).sum(0) for k in kinds]
            losses = [loss[k].sum(0) / tokens[k].sum(0) for k in kinds]
        return np.asarray(exact, np.float32), np.asarray(losses, np.float32)

    def judge(self, step: int, frozen: Params, state: TrainState) -> TrainState:
        """The state with the best of each adapter: more sequences right, or as many and a smaller loss; where there are
        composites, by the mean of both kinds."""
        best, current = state.best, state.params if state.ema is None else state.ema.params
        with use_mesh(self._mesh):
            kinds = self.scores(frozen, current)
            exact, loss = (np.nanmean(x, axis=0) for x in kinds)
            old_exact, old_loss = fetch(best.exact), fetch(best.loss)
            better = np.isfinite(loss) & ((exact > old_exact) | ((exact == old_exact) & (loss < old_loss)))
            params = self._keep(current, best.params, place_whole(jnp.asarray(better), self._mesh))
        pairs = (np.int32(step), best.step), (exact, best.exact), (loss, best.loss)
        scores = tuple(np.where(better, new, fetch(old)).astype(old.dtype) for new, old in pairs)
        scores = _placed(scores, self._mesh)
        by_task = {
            name: {"exact": round(float(e), 4), "loss": round(float(l), 5), "better": bool(b)}
            for name, e, l, b in zip(self._names, exact, loss, better, strict=True)
        }
        for by_kind, key in zip(kinds, ("exact", "loss"), strict=True) if len(kinds[0]) == 2 else ():
            for name, alone, among in zip(self._names, *by_kind, strict=True):
                among = None if np.isnan(among) else round(float(among), 5)
                by_task[name] |= {f"{key}_alone": round(float(alone), 5), f"{key}_in_composites": among}
        record = {"step": step, "exact": float(exact.mean()), "loss": float(loss.mean()), "tasks": by_task}
        self.records.append(record)
        if self._file:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._validated:
            self._validated(record)
        return dataclasses.replace(state, best=Best(params, *scores))

    def summary(self, best: Best) -> dict[str, Any]:
        """{task: step, exact and loss of the parameters kept}."""
        rows = zip(self._names, fetch(best.step), fetch(best.exact), fetch(best.loss), strict=True)
        return {n: {"step": int(s), "exact": round(float(e), 4), "loss": round(float(l), 5)} for n, s, e, l in rows}


def _copied(params: Params) -> Params:
    """Buffers of their own: a donated state has every buffer once."""
    return jax.tree.map(jnp.copy, params)


def _placed(x: Params, mesh: Mesh | None) -> Params:
    return place_whole(x, mesh) if mesh is not None else jax.tree.map(jnp.asarray, x)
