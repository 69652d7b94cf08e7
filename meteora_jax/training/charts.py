"""Pictures of a run: its curves, and where in the model the gates are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.io.files import whole_file


def write_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses and gate accuracy by step (each pale, its running mean strong), one panel each."""
    panels = [(k, t) for k, t in (("lm", "LM loss, nats a token"), ("gate", "gate cross-entropy, nats"),
                                  ("gate_accuracy", "gate accuracy")) if k in records[-1]]  # fmt: skip

    def draw(figure: Any) -> None:
        figure.set_size_inches(8, 2.2 * len(panels) + 0.6)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        steps = np.asarray([r["step"] for r in records])
        window = max(1, len(records) // 50)
        for axis, (key, title) in zip(axes, panels, strict=True):
            values = np.asarray([r[key] for r in records], float)
            axis.plot(steps, values, color="#4888f0", alpha=0.35, linewidth=1, label="each step")
            means = np.convolve(values, np.ones(window) / window, mode="valid")
            middle = (window - 1) // 2  # of a mean's steps
            shown = steps[middle : middle + len(means)]
            axis.plot(shown, means, color="#4888f0", linewidth=1.8, label=f"mean of {window}")
            axis.set_ylabel(title)
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].set_xlabel("step")
        axes[0].legend(frameon=False, fontsize=8)

    _save(draw, path)


def write_accuracy_map(accuracy: np.ndarray, path: Path) -> None:
    """Gate accuracy float [L, P] as a heat map, layers downwards."""

    def draw(figure: Any) -> None:
        layers = len(accuracy)
        figure.set_size_inches(5.5, 1.4 + 0.22 * layers)
        axes = figure.add_subplot()
        image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(PROJECTIONS)), [p.removesuffix("_proj") for p in PROJECTIONS])
        axes.set(ylabel="layer", title=f"gate accuracy, mean {accuracy.mean():.3f}")
        figure.colorbar(image, ax=axes)

    _save(draw, path)


def _save(draw: Callable[[Any], None], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('matplotlib: expected for pictures, found none; pip install "meteora-jax[eval]"') from None
    figure = Figure(layout="constrained")
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
