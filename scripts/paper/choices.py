"""How often a token router chooses an answer's own adapter, the right answers before it: test problems, composites,
conversations, and messages that ask two tasks.

    python scripts/paper/choices.py runs/demo/base runs/demo/bank runs/demo/gates --tasks runs/tasks

No layer of the model runs, so that a small machine tells two routers apart in minutes. Composites are drawn as
training draws them, from the test split; conversations and messages of two tasks as `meteora evaluate --composite
conversations,unnumbered` draws them, every turn judged by itself. Of each answer: whether all its tokens are led by its
task's adapter, and its first two.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

import meteora_jax as mj
from meteora_jax.evaluation.conversations import CONVERSATIONS, UNNUMBERED, load_conversations
from meteora_jax.evaluation.problems import Problem, choose
from meteora_jax.evaluation.tasks import load_splits
from meteora_jax.examples import Example, end_token, prompt_ids
from meteora_jax.io.files import write_json
from meteora_jax.training.data import Mixture, collate
from meteora_jax.training.sequences import NO_TASK, Tokenized

NEW_TOKENS = 64  # of an answer, in an evaluation: its default


@dataclass(frozen=True)
class Answer:
    """An answer of a sequence (its place among all): whether all its tokens are led by its task's adapter, and its
    first two."""

    sequence: int
    task: str
    whole: bool
    first_two: bool


@dataclass(frozen=True)
class Arguments:
    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    gates: tyro.conf.Positional[tuple[Path, ...]]
    """GATES folders of token routers."""
    tasks: Path
    """TASKS folder."""
    new: tuple[str, ...] = ()
    """Tasks whose answers are told apart from the others'."""
    limit: int = 100
    """Test problems a task."""
    composites: int = 200
    """Composites."""
    sizes: tuple[int, int] = (2, 10)
    """The fewest and the most tasks of a composite."""
    shots: int = 2
    """At most so many worked examples stand before a composite."""
    cut: float = 0.6
    """Share of the composites whose examples are cut to their ends."""
    max_length: int = 4096
    """Longer problems are passed over."""
    batch: int = 8
    """Problems at a time."""
    json: Path | None = None
    """Write the figures here too."""


def answers(hops: Any, names: Sequence[str], sequences: Sequence[Tokenized], batch: int) -> list[Answer]:
    """Every answer of some sequences."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    found = []
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        part = [sequences[i] for i in places]
        width = 1 << (len(part[-1].tokens) - 1).bit_length()  # few widths: few programs
        rows = collate(part + part[-1:] * (batch - len(part)), width)
        led = np.asarray(hops(rows.tokens, rows.positions, rows.segments))
        for row, (place, s) in enumerate(zip(places, part, strict=True)):
            own = np.where(s.loss, s.tasks, NO_TASK)
            edges = [0, *(np.flatnonzero(np.diff(own)) + 1), len(own)]
            for first, last in itertools.pairwise(edges):
                if own[first] != NO_TASK:
                    right = led[row, first:last] == own[first]
                    found.append(Answer(place, names[own[first]], bool(right.all()), bool(right[:2].all())))
    return found


def shares(found: Sequence[Answer]) -> dict[str, Any]:
    """Of these answers the shares that are led right, and whose are not."""
    every = np.asarray([(a.whole, a.first_two) for a in found], float).reshape(-1, 2)
    wrong = Counter(a.task for a in found if not a.whole)
    return {"answers": len(every), "whole": every[:, 0].mean(), "first_two": every[:, 1].mean(), "wrong": dict(wrong)}


def judged(problem: Problem, labels: Mapping[str, int], tokenizer: Any, end: int) -> Tokenized:
    """A turn of a conversation and its right answer, or a message of two tasks and both, a line each."""
    pieces = prompt_ids([Example(problem.prompt, problem.response, messages=problem.messages)], tokenizer)
    texts = [text for answer in problem.answers or (problem.response,) for text in (answer, "\n")][:-1]
    pieces += tokenizer(texts, add_special_tokens=False)["input_ids"]
    pieces[-1] = [*pieces[-1], end]
    owners = [NO_TASK] * len(pieces)  # the prompt's and line breaks'
    owners[1::2] = [labels[task] for task in problem.own_tasks]
    tasks = np.repeat(owners, [len(ids) for ids in pieces]).astype(np.int32)
    return Tokenized(np.asarray([*itertools.chain(*pieces)], np.int32), tasks != NO_TASK, tasks)


def main(command: Arguments) -> None:
    figures = {}
    for folder in command.gates:
        model = mj.load(command.base, command.bank, folder, dtype="float32")
        names = model.adapter_names
        if model.gates is None or model.gates.form is None:
            raise SystemExit(f"{folder}: form: expected a token router, found MeteoRA's own gates")
        split = load_splits(command.tasks, names, "test")
        picked = {n: [split[n][i] for i in choose([e.prompt for e in split[n]], command.limit)] for n in names}
        labels = {n: i for i, n in enumerate(names)}
        tokenizer, end = model.tokenizer, end_token(command.base, model.config, model.tokenizer)
        mixture = Mixture(
            picked, labels, tokenizer, end, command.max_length, False, 1.0,
            composite_sizes=command.sizes, composite_shots=command.shots, composite_cut=command.cut,
        )  # fmt: skip
        drawn, rng = mixture.chosen(), np.random.default_rng(0)
        composites = [mixture.draw_composite(drawn, rng, command.max_length) for _ in range(command.composites)]

        @jax.jit
        def hops(tokens: jax.Array, positions: jax.Array, segments: jax.Array, model: mj.Meteora = model) -> jax.Array:
            return nnx.merge(model.graph, model.weights).hops(tokens, positions, segments)[1].logits.argmax(-1)

        kinds = {"single": [s for pairs in drawn.values() for _, s in pairs], "composite": composites}
        turns = []
        for kind in (CONVERSATIONS, UNNUMBERED):
            problems = load_conversations(
                command.tasks, kind, names, None, NEW_TOKENS,
                max_tokens=max(command.max_length, model.config.max_position_embeddings),
                count_tokens=lambda messages, model=model: len(model.encode(messages)),
            )  # fmt: skip
            pairs = [(p.turn, judged(p, labels, tokenizer, end)) for p in problems]
            pairs = [(turn, s) for turn, s in pairs if len(s.tokens) <= command.max_length]
            kinds[kind] = [s for _, s in pairs]
            if kind == CONVERSATIONS:
                turns = [turn for turn, _ in pairs]
        figures[str(folder)] = rows = {}
        for kind, sequences in kinds.items():
            found = answers(hops, names, sequences, command.batch)
            rows[kind] = shares(found)
            if kind == CONVERSATIONS:
                of_turn = {t: [a for a in found if turns[a.sequence] == t] for t in sorted({*turns})}
                rows[kind]["turns"] = {t: shares(own) for t, own in of_turn.items()}
            if command.new:
                new = [a for a in found if a.task in command.new]
                rows[kind] |= {"old": shares([a for a in found if a not in new]), "new": shares(new)}
        print(folder, json.dumps(rows), flush=True)
    if command.json is not None:
        write_json(command.json, figures)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
