"""How often a token router chooses an answer's own adapter, the right answers before it: test problems and composites.

    python scripts/paper/choices.py runs/demo/base runs/demo/bank runs/demo/gates --tasks runs/tasks

No layer of the model runs, so that a small machine tells two routers apart in minutes. Composites are drawn as
training draws them, from the test split. Of each answer: whether all its tokens are led by its task's adapter, and its
first two.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

import meteora_jax as mj
from meteora_jax.evaluation.problems import choose
from meteora_jax.evaluation.tasks import load_splits
from meteora_jax.examples import end_token
from meteora_jax.io.files import write_json
from meteora_jax.training.data import NO_TASK, Mixture, Tokenized, collate, rounded

Answers = dict[str, list[tuple[bool, bool]]]  # by task: whether all its tokens are led right, and its first two


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


def answers(hops: Any, names: Sequence[str], sequences: Sequence[Tokenized], batch: int) -> Answers:
    """Every answer of some sequences, by its task."""
    width = rounded(max(len(s.tokens) for s in sequences))
    found: Answers = defaultdict(list)
    for start in range(0, len(sequences), batch):
        part = list(sequences[start : start + batch])
        rows = collate(part + part[-1:] * (batch - len(part)), width)
        led = np.asarray(hops(rows.tokens, rows.positions, rows.segments))
        for row, s in enumerate(part):
            own = np.where(s.loss, s.tasks, NO_TASK)
            edges = [0, *(np.flatnonzero(np.diff(own)) + 1), len(own)]
            for first, last in itertools.pairwise(edges):
                if own[first] != NO_TASK:
                    right = led[row, first:last] == own[first]
                    found[names[own[first]]].append((bool(right.all()), bool(right[:2].all())))
    return found


def shares(found: Answers, tasks: Sequence[str]) -> dict[str, float]:
    """Of these tasks' answers the shares that are led right."""
    every = np.asarray([pair for name in tasks for pair in found[name]]).reshape(-1, 2)
    return {"answers": len(every), "whole": float(every[:, 0].mean()), "first_two": float(every[:, 1].mean())}


def main(command: Arguments) -> None:
    figures = {}
    for folder in command.gates:
        model = mj.load(command.base, command.bank, folder, dtype="float32")
        names = model.adapter_names
        if model.gates is None or model.gates.form is None:
            raise SystemExit(f"{folder}: form: expected a token router, found MeteoRA's own gates")
        split = load_splits(command.tasks, names, "test")
        picked = {n: [split[n][i] for i in choose([e.prompt for e in split[n]], command.limit)] for n in names}
        mixture = Mixture(
            picked, {n: i for i, n in enumerate(names)}, model.tokenizer,
            end_token(command.base, model.config, model.tokenizer), command.max_length, False, 1.0,
            composite_sizes=command.sizes, composite_shots=command.shots, composite_cut=command.cut,
        )  # fmt: skip
        drawn, rng = mixture.chosen(), np.random.default_rng(0)
        composites = [mixture.draw_composite(drawn, rng, command.max_length) for _ in range(command.composites)]

        @jax.jit
        def hops(tokens: jax.Array, positions: jax.Array, segments: jax.Array, model: mj.Meteora = model) -> jax.Array:
            return nnx.merge(model.graph, model.weights).hops(tokens, positions, segments)[1].logits.argmax(-1)

        kinds = {"single": [s for pairs in drawn.values() for _, s in pairs], "composite": composites}
        figures[str(folder)] = rows = {}
        for kind, sequences in kinds.items():
            found = answers(hops, names, sequences, command.batch)
            rows[kind] = shares(found, names)
            if command.new:
                old = [n for n in names if n not in command.new]
                rows[kind] |= {"old": shares(found, old), "new": shares(found, command.new)}
        print(folder, json.dumps(rows), flush=True)
    if command.json is not None:
        write_json(command.json, figures)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
