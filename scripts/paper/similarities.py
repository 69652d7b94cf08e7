"""How similar test problems and general requests are to the adapters of an index: what its threshold can tell apart.

    meteora index build runs/index --tasks runs/tasks
    python scripts/paper/similarities.py runs/index --tasks runs/tasks --general scripts/paper/general.txt

Of the problems: how often the own adapter is found first, and how many are less similar to all adapters than the
threshold asks. The same of the general requests, which are nobody's. With the own adapter hidden: how similar the next
one is, and how often a problem is more similar than a general request is (0.5: the two cannot be told apart).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import meteora_jax as mj
from meteora_jax.evaluation.problems import choose
from meteora_jax.evaluation.tasks import load_split


@dataclass(frozen=True)
class Arguments:
    index: tyro.conf.Positional[Path]
    """INDEX folder, whose names are tasks."""
    tasks: Path
    """TASKS folder."""
    general: Path
    """A text file, a request a line."""
    limit: int = 40
    """Test problems of a task."""


def more_often(first: np.ndarray, second: np.ndarray) -> float:
    """How often a value of the first is larger than one of the second; equal ones count half."""
    return float(np.mean((first[:, None] > second) + 0.5 * (first[:, None] == second)))


def main(settings: Arguments) -> None:
    """Prints the figures."""
    index = mj.Index.load(settings.index)
    texts, own = list[str](), list[int]()
    for place, task in enumerate(index.names):
        asked = [e.prompt for e in load_split(settings.tasks, task, "test")]
        chosen = choose(asked, settings.limit)
        texts += [asked[i] for i in chosen]
        own += [place] * len(chosen)
    found = index.scores(texts)
    general = index.scores(settings.general.read_text(encoding="utf-8").splitlines()).max(axis=1)
    rows, hidden = np.arange(len(own)), found.copy()
    hidden[rows, own] = -np.inf
    unseen, threshold = hidden.max(axis=1), -np.inf if index.threshold is None else index.threshold
    print(f"threshold {threshold:.3f}; {len(texts)} problems, {len(general)} general requests")
    print(f"own adapter first: {np.mean(found.argmax(axis=1) == own):.2%}")
    refused = np.mean(found.max(axis=1) < threshold), np.mean(general < threshold)
    print(f"below the threshold: {refused[0]:.2%} of the problems, {refused[1]:.2%} of the general requests")
    for name, values in {"own": found[rows, own], "the next": unseen, "best, general": general}.items():
        least, middle, most = np.quantile(values, (0.01, 0.5, 0.99))
        print(f"similarity, {name}: median {middle:.3f}, 1 and 99 % {least:.3f} and {most:.3f}")
    print(f"own adapter hidden: more similar than a general request {more_often(unseen, general):.3f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
