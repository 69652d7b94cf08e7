"""`meteora train gates`, `meteora train adapter` and `meteora train bank`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from meteora_jax.cli.bank import read_description
from meteora_jax.cli.devices import Devices, is_first_process, make_devices_mesh
from meteora_jax.cli.report import console, default_dtype, progress_bar, status, write_json
from meteora_jax.config import InputError, read_json
from meteora_jax.gate_config import FormName, GateConfig
from meteora_jax.io.files import refuse_foreign, train_alone
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.training.recipes import RECIPES, recipe_of, settled
from meteora_jax.training.settings import AdapterTraining, BankTraining, Checkpointing, GateTraining, LoRA, Training

if TYPE_CHECKING:
    from meteora_jax.examples import Example
    from meteora_jax.training.trainer import Callbacks
    from meteora_jax.training.unused import Unused


@dataclass(frozen=True, kw_only=True)
class _Run(Devices):
    """What these commands share."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder: TASKS/<task>/train.jsonl."""
    out: Path
    """Folder to write; replaced once the new one is complete."""
    checkpointing: Checkpointing = Checkpointing()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of base, adapters and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    json: Path | None = None
    """Write the final figures here too."""


@dataclass(frozen=True, kw_only=True)
class TrainGates(_Run):
    """Train the gates of a bank on its adapters' tasks; base and adapters stay frozen.

    Stopped by SIGTERM it saves and exits with status 75; the same command goes on from the last checkpoint.
    """

    bank: Path
    """BANK folder; adapter NAME is trained towards TASKS/NAME."""
    recipe: FormName | None = None
    """token-router (the default): one choice a token before the first layer, trained without the model; meteora: a gate
    at every projection, as in the paper. With --extend that of what is extended. Defaults below are the recipe's."""
    extend: Path | None = None
    """GATES of a part of the bank: their columns keep every bit, the other adapters' are trained, and of a token router
    what all columns read. Their form, and the recipe with it, is taken."""
    replay: Path | None = None
    """TASKS folder of the adapters that the extended GATES know, where a sample of each is enough: 100 lines of
    REPLAY/<task>/train.jsonl. --tasks unless given."""
    background: tuple[str, ...] = ()
    """Text of none of the tasks, which the base is to answer alone: files (.jsonl of prompts and responses or of
    messages, else plain text, a line an example), and `self` for what the base writes by itself. It is read as it is
    and in the frames that tasks share. The gates then get a column for no adapter."""
    new_bank: Path | None = None
    """Train the adapters too, in float32, and write them to this BANK folder."""
    settings: GateTraining = RECIPES["token-router"]


@dataclass(frozen=True, kw_only=True)
class TrainAdapter(_Run):
    """Train one new adapter (LoRA) on one task or several and write it as a BANK of one.

    `meteora export adapter` makes a PEFT folder of it. Stopped by SIGTERM it saves and exits with status 75.
    """

    task: tuple[str, ...]
    """Tasks to train on."""
    own_gate: Path | None = None
    """BANK folder that has the adapter: instead of a new one its own gate is trained, a vector at each projection, on
    these tasks alone (PHATGOOSE). OUT is the bank with that gate."""
    settings: AdapterTraining


@dataclass(frozen=True, kw_only=True)
class TrainBank(_Run):
    """Train an adapter (LoRA) for each of many tasks, all side by side in one run, and write them as a BANK.

    Every token is routed to its own task's adapter; loss and clipping are each adapter's own. A random part of each
    task's examples is scored and not trained on, and the bank holds each adapter as it was when it served them best.
    Stopped by SIGTERM it saves and exits with status 75.
    """

    task: tuple[str, ...] = ()
    """Tasks, each of which gets an adapter of its name; all folders of TASKS with a train file unless given."""
    settings: BankTraining = BankTraining()


def gates_by_recipe(args: Sequence[str]) -> TrainGates:
    """What `meteora train gates` is without its other options: --help shows, and options change, the recipe asked for.

    Raises:
        InputError: --recipe and --extend contradict each other, or what is extended is no GATES folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--extend")
    recipe, extend = None, None
    if list(args[:2]) == ["train", "gates"]:
        try:
            asked, _ = parser.parse_known_args(args[2:])
            recipe, extend = asked.recipe, asked.extend
        except (argparse.ArgumentError, SystemExit):  # tyro says what is wrong
            pass
    settings = recipe_of(recipe if recipe in RECIPES else None, extend)
    required = {field: tyro.MISSING for field in ("base", "tasks", "out", "bank")}
    return TrainGates(**required, settings=settings)


def train_gates(command: TrainGates) -> None:
    """Runs `meteora train gates`."""
    from meteora_jax.training.background import SELF, load_background
    from meteora_jax.training.gates import train_gates as train

    settings = settled(command.settings, recipe_of(command.recipe, command.extend))
    _check_replaced(command, "gates.json", command.new_bank)
    mesh = make_devices_mesh(command)
    names = read_description(command.bank).names
    tasks = _gate_tasks(command, names)
    checkpointing, dtype = _checkpointing(command), default_dtype(command.dtype)
    kept = checkpointing.in_run("background.jsonl") if SELF in command.background else None
    # held until the run is over: what the base writes is part of it
    with train_alone(kept.parent) if kept is not None and is_first_process() else nullcontext():
        if kept is not None and not checkpointing.resume and is_first_process():
            kept.unlink(missing_ok=True)
        background = load_background(
            command.background, command.base, dtype=dtype, seed=settings.seed, mesh=mesh, kept=kept
        )
        with _callbacks("train gates", settings) as callbacks:
            final = train(
                command.base, command.bank, tasks, command.out, settings,
                dtype=dtype, mesh=mesh, checkpointing=checkpointing, callbacks=callbacks, new_bank=command.new_bank,
                extend=command.extend, background=background,
            )  # fmt: skip
    _report(command, settings, final, {"gates": str(command.out)})


def _gate_tasks(command: TrainGates, names: Sequence[str]) -> dict[str, list[Example]]:
    """The training examples of each of a bank's adapters, those of a replay for what is extended."""
    from meteora_jax.evaluation.tasks import load_splits

    if command.replay is None:
        return load_splits(command.tasks, names, "train")
    if command.extend is None:
        raise InputError("replay: expected --extend beside it (of whose adapters it has text), found none")
    source = command.extend / "gates.json"
    known = GateConfig.from_json(read_json(source), str(source)).names
    old = load_splits(command.replay, [name for name in names if name in known], "train")
    return load_splits(command.tasks, [name for name in names if name not in known], "train") | old


def train_adapter(command: TrainAdapter) -> None:
    """Runs `meteora train adapter`."""
    from meteora_jax.evaluation.tasks import load_splits
    from meteora_jax.training.adapter import train_adapter as train
    from meteora_jax.training.own_gate import train_own_gate

    settings = command.settings
    if command.own_gate is not None and settings.lora != LoRA():
        raise InputError("--rank, --alpha, --targets: expected none beside --own-gate, found some")
    _check_replaced(command, "bank.json")
    mesh = make_devices_mesh(command)
    tasks = load_splits(command.tasks, command.task, "train")
    with _callbacks(f"train {settings.name}", settings) as callbacks:
        how: dict[str, Any] = dict(
            dtype=default_dtype(command.dtype), mesh=mesh, checkpointing=_checkpointing(command), callbacks=callbacks
        )
        if command.own_gate is None:
            final = train(command.base, tasks, command.out, settings, **how)
        else:
            final = train_own_gate(command.base, command.own_gate, tasks, command.out, settings, **how)
    _report(command, settings, final, {"bank": str(command.out), "tasks": list(command.task)})


def train_bank(command: TrainBank) -> None:
    """Runs `meteora train bank`."""
    from meteora_jax.evaluation.tasks import load_splits
    from meteora_jax.training.bank import train_bank as train

    settings = command.settings
    _check_replaced(command, "bank.json")
    mesh = make_devices_mesh(command)
    names = command.task or tuple(sorted(file.parent.name for file in command.tasks.glob("*/train.jsonl")))
    if not names or len(set(names)) < len(names):
        raise InputError(f"{command.tasks}: expected tasks, each once, found {' '.join(names) or 'none'}")
    tasks = load_splits(command.tasks, names, "train")
    with _callbacks("train bank", settings) as callbacks:
        final = train(
            command.base, tasks, command.out, settings, dtype=default_dtype(command.dtype), mesh=mesh,
            checkpointing=_checkpointing(command), callbacks=callbacks,
        )  # fmt: skip
    if is_first_process():
        for name, kept in final["kept"].items():
            line = f"{name}: step {kept['step']}, exact {kept['exact']:.1%}, loss {kept['loss']:.4f}"
            console.print(line, highlight=False, soft_wrap=True)
    _report(command, settings, final, {"bank": str(command.out), "tasks": list(names)})


def _check_replaced(command: _Run, description: str, new_bank: Path | None = None) -> None:
    """Refuses, before anything is trained, folders to write that hold what their replacement would delete."""
    refuse_foreign(command.out, description, WEIGHTS)
    places = {"--out": command.out, "--run": _checkpointing(command).run, "--new-bank": new_bank}
    places |= {"--json": command.json}
    if new_bank is not None:
        refuse_foreign(new_bank, "bank.json", WEIGHTS)
    for option, folder in (("--out", command.out), ("--new-bank", new_bank)):
        for other, inside in places.items():
            if folder and inside and other != option and inside.resolve().is_relative_to(folder.resolve()):
                what = "file" if other == "--json" else "folder"
                raise InputError(
                    f"{other}: expected a {what} outside {option}, which is replaced whole, found {inside}"
                )


def _checkpointing(command: _Run) -> Checkpointing:
    found = command.checkpointing
    return found if found.run else dataclasses.replace(found, run=command.out.with_name(f"{command.out.name}-run"))


@contextmanager
def _callbacks(what: str, settings: Training) -> Iterator[Callbacks]:
    """A bar of the run's steps, and lines about its data and validations."""
    import grain  # noqa: F401 - while it is imported every thread's imports are lazy (etils); the bar draws in a thread

    from meteora_jax.training.trainer import Callbacks

    def begun(lost: Unused) -> None:
        for line in unused_lines(lost.record()) if is_first_process() else ():
            status.print(f"{what}: {line}", highlight=False, soft_wrap=True)

    def validated(record: dict[str, Any]) -> None:
        if is_first_process():
            figures = f"exact {record['exact']:.1%}, loss {record['loss']:.4f}"
            better = sum(task["better"] for task in record["tasks"].values())
            line = f"step {record['step']}, validation: {figures}; {better} of {len(record['tasks'])} better"
            status.print(line, highlight=False)

    with progress_bar(what) as bar:
        yield Callbacks(begun=begun, progress=_progress(bar, settings.optimization.steps), validated=validated)


def _progress(bar: Callable[..., None], steps: int) -> Callable[[int, dict[str, Any]], None]:
    def show(step: int, record: dict[str, Any]) -> None:
        parts = [f"lm {record['lm']:.3f}"] if "lm" in record else []
        if "gate" in record:
            parts.append(f"gate {record['gate']:.4f}  accuracy {record['gate_accuracy']:.3f}")
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.0%}")
        bar(step, steps, "  ".join(parts))

    return show


def unused_lines(lost: Mapping[str, Any]) -> list[str]:
    """What of a run's data is not used, a sentence a reason with all tasks that it concerns; nothing where all is."""

    def of(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {n:,} of {lost['examples'][name]:,}" for name, n in counts.items())

    total, lines = sum(lost["examples"].values()), []
    for key, what in (
        ("too_long", f"sequences are longer than --max-length (here {lost['max_length']:,} tokens) and are not used"),
        ("empty", "responses are empty and train the end token alone"),
        ("unpredicted", "sequences have no token to predict"),
        ("validation_prompts", "examples share their prompt with one of the validation split and are not used"),
    ):
        if counts := lost[key]:
            lines.append(f"{sum(counts.values()):,} of {total:,} {what}: {of(counts)}")
    if count := lost["composites"]:
        tried = f"{count} of {lost['composites_tried']} composites, drawn on trial,"
        lines.append(f"{tried} are longer than --max-length; others take their place")
    return lines


def _report(command: _Run, settings: Training, final: Mapping[str, Any], what: Mapping[str, Any]) -> None:
    if not is_first_process():
        return
    for line in final.get("refused", ()):
        status.print(f"{line}; went on from the one before", highlight=False, soft_wrap=True)
    if final["resumed_at"]:
        status.print(f"went on from step {final['resumed_at']}", highlight=False)
    figures = [f"{k.replace('_', ' ')} {final[k]:.4f}" for k in ("lm", "gate", "gate_accuracy") if k in final]
    steps = settings.optimization.steps
    console.print(
        f"{command.out}: {steps} steps in {final['seconds']:.0f} s; last tenth: {', '.join(figures)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in unused_lines(final["unused"]):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    write_json(command.json, {**what, "settings": settings.record(), **final})
