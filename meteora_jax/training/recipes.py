"""How gates are trained unless somebody says otherwise: one whole value of settings for each form."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_json
from meteora_jax.gate_config import FormName, GateConfig, TokenRouterForm
from meteora_jax.training.loop import GateTraining

RECIPES: dict[FormName, GateTraining] = {
    # docs/results.md, "Twenty-eight adapters": no layer of the model runs, so steps cost little and are many
    "token-router": GateTraining(
        form=TokenRouterForm(width=128, depth=4), steps=5000, batch_size=32, rows=2, max_length=8192,
        learning_rate=3e-3, warmup=0.03, clip=1.0, lm_loss=False, prompt_loss=False, answer_share=0.7, turn_share=0.5,
        order=0.5, samples_per_task=2000, composite=0.8, composite_sizes=(2, 10), composite_shots=2, composite_cut=0.6,
    ),
    # MeteoRA (arXiv 2405.13053), section 4.1
    "meteora": GateTraining(
        steps=15_000, batch_size=32, max_length=4096, learning_rate=5e-4, warmup=0.005, clip=0.3, beta=50.0
    ),
}  # fmt: skip


def gate_training(
    recipe: FormName | None, extend: str | os.PathLike[str] | None, changes: dict[str, Any]
) -> GateTraining:
    """A recipe with some of its values changed; that of the token router unless one is named or extended.

    Args:
        extend: GATES whose form, and with it the recipe, is taken. changes: fields of `GateTraining`; a batch_size
            without rows asks for as many rows as it needs.

    Raises:
        InputError: a recipe of another form than what is extended; values that contradict each other.
    """
    form = RECIPES[recipe or "token-router"].form
    if extend is not None:
        source = Path(extend) / "gates.json"
        described = GateConfig.from_json(read_json(source), str(source))
        if recipe not in (None, described.form_name):
            raise InputError(f"{source}: form: expected one of the recipe {recipe}, found {described.form_name}")
        recipe, form = described.form_name, described.form
    if "batch_size" in changes:
        changes = {"rows": None, **changes}
    return dataclasses.replace(RECIPES[recipe or "token-router"], **{"form": form, **changes})
