"""How gates are trained unless somebody says otherwise: one whole value of settings for each form."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from meteora_jax.config import InputError, read_json
from meteora_jax.gate_config import FormName, GateConfig, TokenRouterForm
from meteora_jax.training.settings import Data, Drawing, GateTraining, Objective, Optimization, Schedule

RECIPES: dict[FormName, GateTraining] = {
    # docs/lab-notes.md, "Run to run": no layer of the model runs, so steps cost little and are many
    "token-router": GateTraining(
        form=TokenRouterForm(width=128, depth=4),
        data=Data(batch_size=32, max_length=8192, samples_per_task=2000, composite=0.8),
        drawing=Drawing(
            rows=2, prompt_loss=False, composite_sizes=(2, 10), composite_shots=2, composite_cut=0.6, conversations=0.3
        ),
        optimization=Optimization(steps=5000, learning_rate=3e-3),
        schedule=Schedule(warmup=0.03, clip=1.0),
        objective=Objective(beta=50.0, lm_loss=False, response_weight=0.7, start_weight=0.5, segment_weight=0.5),
    ),
    # MeteoRA (arXiv 2405.13053), section 4.1
    "meteora": GateTraining(
        data=Data(batch_size=32, max_length=4096),
        optimization=Optimization(steps=15_000, learning_rate=5e-4),
        schedule=Schedule(warmup=0.005, clip=0.3),
        objective=Objective(beta=50.0),
    ),
}


def recipe_of(name: FormName | None, extend: str | os.PathLike[str] | None = None) -> GateTraining:
    """A recipe by its name, the token router's unless one is named or extended.

    Args:
        extend: GATES whose form, and with it the recipe, is taken.

    Raises:
        InputError: a recipe of another form than what is extended.
    """
    if extend is None:
        return RECIPES[name or "token-router"]
    source = Path(extend) / "gates.json"
    described = GateConfig.from_json(read_json(source), str(source))
    if name not in (None, described.form_name):
        raise InputError(f"{source}: form: expected one of the recipe {name}, found {described.form_name}")
    return dataclasses.replace(RECIPES[described.form_name], form=described.form)


def settled(settings: GateTraining, recipe: GateTraining) -> GateTraining:
    """The settings of a run by that recipe: its rows belong to its batch size, another asks for as many as it needs."""
    if settings.data.batch_size == recipe.data.batch_size:
        return settings
    return dataclasses.replace(settings, drawing=dataclasses.replace(settings.drawing, rows=None))
