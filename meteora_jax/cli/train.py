"""`meteora train gates`, `meteora train adapter` and `meteora train bank`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from meteora_jax.cli.devices import Devices, is_first_process, make_devices_mesh
from meteora_jax.cli.report import console, default_dtype, progress_bar, status, write_json
from meteora_jax.config import BankConfig, InputError, read_json
from meteora_jax.gate_config import FormName

T = TypeVar("T")
# An option that is the recipe's unless given.
ByRecipe = Annotated[
    T | None, tyro.conf.arg(help_behavior_hint="(default: as the recipe says)"), tyro.conf.DisallowNone
]


@dataclass(frozen=True, kw_only=True)
class _Run(Devices):
    """What these commands share."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder: TASKS/<task>/train.jsonl."""
    packing: bool = True
    """Several sequences a row, each attending to itself alone; else one a row, padded."""
    accumulate: int = 1
    """Parts that a step's batch is worked off in: less memory, the same result."""
    remat: bool = True
    """Recompute activations in the backward pass: less memory, up to half more arithmetic."""
    remat_keeps: Literal["nothing", "dots"] = "nothing"
    """What of a layer is kept all the same: the results of its matmuls, for more memory and less arithmetic."""
    seed: int = 0
    """Of the data's order, and of a new adapter's weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of base, adapters and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    run: Path | None = None
    """Folder of checkpoints, TensorBoard scalars, log and pictures; OUT-run unless given."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder if there is one; --no-resume removes them and starts over."""
    log: Path | None = None
    """JSON lines, one a step; log.jsonl in the run folder unless given."""
    json: Path | None = None
    """Write the final figures here too."""


@dataclass(frozen=True, kw_only=True)
class _Train(_Run):
    """What those that train adapters share."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Sequences a step; packed: on average."""
    learning_rate: float = 5e-4
    """Peak of the cosine schedule."""
    warmup: float = 0.005
    """Share of the steps that warm up."""
    clip: float = 0.3
    """Largest global gradient norm."""
    composite: float = 0.0
    """Share of the sequences that hold several tasks: composite problems."""
    composite_sizes: tuple[int, int] = (3, 3)
    """The fewest and the most tasks that one holds."""
    composite_shots: int = 0
    """At most so many worked examples stand before one, any number as likely as another."""
    samples_per_task: int | None = None
    """At most so many examples of a task, chosen at random."""
    max_length: int = 4096
    """Longer sequences are passed over."""
    rows: int | None = None
    """Rows of the packed batch, instead of what batch size and mean length give."""


@dataclass(frozen=True, kw_only=True)
class TrainGates(_Run):
    """Train the gates of a bank on its adapters' tasks; base and adapters stay frozen.

    Stopped by SIGTERM it saves and exits with status 75; the same command goes on from the last checkpoint.
    """

    bank: Path
    """BANK folder; adapter NAME is trained towards TASKS/NAME."""
    out: Path
    """GATES folder to write; replaced once the new gates are complete."""
    recipe: FormName | None = None
    """token-router (the default): one choice a token before the first layer, trained without the model; meteora: a gate
    at every projection, as in the paper. With --extend that of what is extended."""
    extend: Path | None = None
    """GATES of a part of the bank: their columns keep every bit, only the other adapters' are trained. Their form, and
    the recipe with it, is taken."""
    steps: ByRecipe[int] = None
    """Updates."""
    batch_size: ByRecipe[int] = None
    """Sequences a step; packed: on average."""
    rows: ByRecipe[int] = None
    """Rows of the packed batch, instead of what batch size and mean length give."""
    max_length: ByRecipe[int] = None
    """Longer sequences are passed over."""
    learning_rate: ByRecipe[float] = None
    """Peak of the cosine schedule."""
    warmup: ByRecipe[float] = None
    """Share of the steps that warm up."""
    clip: ByRecipe[float] = None
    """Largest global gradient norm."""
    beta: ByRecipe[float] = None
    """Weight of the gate cross-entropy beside the language model's."""
    top_k: ByRecipe[int] = None
    """Adapters a token."""
    temperature: ByRecipe[float] = None
    """Of the softmax over the chosen gates."""
    lm_loss: ByRecipe[bool] = None
    """Whether the language model's loss is trained on, too; without it, for a token router, no layer runs."""
    prompt_loss: ByRecipe[bool] = None
    """Whether prompt tokens count in the language model's loss, as in the original."""
    mixture: ByRecipe[Literal["balanced", "natural"]] = None
    """Every task equally often, or as often as it has examples."""
    samples_per_task: ByRecipe[int] = None
    """At most so many examples of a task, chosen at random."""
    composite: ByRecipe[float] = None
    """Share of the sequences that hold several tasks: composite problems."""
    composite_sizes: ByRecipe[tuple[int, int]] = None
    """The fewest and the most tasks that one holds."""
    composite_shots: ByRecipe[int] = None
    """At most so many worked examples stand before one, any number as likely as another."""
    composite_cut: ByRecipe[float] = None
    """With --no-lm-loss, share of the composites whose questions and answers are cut to their ends."""
    answer_share: ByRecipe[float] = None
    """With --no-prompt-loss, what the answers' tokens together count in the gate loss; their number unless given."""
    turn_share: ByRecipe[float] = None
    """The part of --answer-share that the first two tokens of each answer count by themselves."""
    order: ByRecipe[float] = None
    """With --no-lm-loss, weight of learning the previous segment's task and the own segment's index, which teaches the
    look-up."""
    train_adapters: bool = False
    """Train the adapters too, in float32, and write them as a new bank."""
    adapter_learning_rate: float | None = None
    """Peak for the adapters that --train-adapters trains; the gates' unless given."""
    new_bank: Path | None = None
    """BANK folder for the adapters that --train-adapters trains."""


@dataclass(frozen=True, kw_only=True)
class TrainAdapter(_Train):
    """Train one new adapter (LoRA) on one task or several and write it as a BANK of one.

    `meteora export adapter` makes a PEFT folder of it. Stopped by SIGTERM it saves and exits with status 75.
    """

    task: tuple[str, ...]
    """Tasks to train on."""
    name: str
    """The adapter's name."""
    out: Path
    """BANK folder to write; replaced once the adapter is complete."""
    rank: int = 8
    """Of A and B."""
    alpha: float | None = None
    """The scale is alpha / rank; twice the rank unless given."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that the adapter touches."""
    mixture: Literal["balanced", "natural"] = "natural"
    """Every task equally often, or as often as it has examples."""
    prompt_loss: bool = False
    """Whether prompt tokens count in the loss."""


@dataclass(frozen=True, kw_only=True)
class TrainBank(_Train):
    """Train an adapter (LoRA) for each of many tasks, all side by side in one run, and write them as a BANK.

    Every token is routed to its own task's adapter; loss and clipping are each adapter's own. A random cut of each
    task's examples is held back, and the bank holds each adapter as it was when it served them best. Stopped by SIGTERM
    it saves and exits with status 75.
    """

    out: Path
    """BANK folder to write; replaced once the adapters are complete."""
    task: tuple[str, ...] = ()
    """Tasks, each of which gets an adapter of its name; all folders of TASKS with a train file unless given."""
    rank: int = 8
    """Of A and B."""
    alpha: float | None = None
    """The scale is alpha / rank; twice the rank unless given."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that the adapters touch."""
    clip: float = 1.0
    """Largest gradient norm of each adapter."""
    prompt_loss: bool = False
    """Whether prompt tokens count in the loss."""
    tokens: int = 2_500_000
    """How often tasks are drawn: each for so many tokens, but ..."""
    epochs: float = 8.0
    """... none more than so many times over. Shares only: --steps says how long the run is."""
    validations: int = 8
    """Times a run that the held-back examples are scored."""
    held_back: float = 0.05
    """Share of a task's examples that is held back ..."""
    held_least: int = 8
    """... no fewer than these ..."""
    held_most: int = 64
    """... and no more than these."""
    held_composites: int = 0
    """So many composite problems of what is held back are scored, too; an adapter's score is then the mean of both.
    """
    average: float = 0.0
    """Score and keep each adapter's mean over steps, in which each counts so much of the next (0.97: about the last
    30), not what a step left; 0: that."""


def train_gates(command: TrainGates) -> None:
    """Runs `meteora train gates`."""
    from meteora_jax.evaluation.tasks import load_split
    from meteora_jax.training.loop import GateTraining
    from meteora_jax.training.loop import train_gates as train
    from meteora_jax.training.recipes import gate_training

    given = {k: v for k, v in _settings(command, GateTraining).items() if v is not None}
    settings = gate_training(command.recipe, command.extend, given)
    mesh = make_devices_mesh(command)
    names = BankConfig.from_json(read_json(command.bank / "bank.json"), str(command.bank / "bank.json")).names
    tasks = {name: load_split(command.tasks, name, "train") for name in names}
    with _progress("train gates", settings.steps) as progress:
        final = train(
            command.base, command.bank, tasks, command.out, settings,
            dtype=default_dtype(command.dtype), mesh=mesh, run=_run(command), new_bank=command.new_bank,
            extend=command.extend, log=command.log, progress=progress, begun=_begun("train gates"),
        )  # fmt: skip
    _report(command, settings, final, {"gates": str(command.out)})


def train_adapter(command: TrainAdapter) -> None:
    """Runs `meteora train adapter`."""
    from meteora_jax.evaluation.tasks import load_split
    from meteora_jax.training.loop import AdapterTraining
    from meteora_jax.training.loop import train_adapter as train

    mesh = make_devices_mesh(command)
    tasks = {name: load_split(command.tasks, name, "train") for name in command.task}
    alpha = 2.0 * command.rank if command.alpha is None else command.alpha
    settings = AdapterTraining(**{**_settings(command, AdapterTraining), "alpha": alpha})
    with _progress(f"train {command.name}", command.steps) as progress:
        final = train(
            command.base, tasks, command.out, settings, dtype=default_dtype(command.dtype), mesh=mesh,
            run=_run(command), log=command.log, progress=progress, begun=_begun(f"train {command.name}"),
        )  # fmt: skip
    _report(command, settings, final, {"bank": str(command.out), "tasks": list(command.task)})


def train_bank(command: TrainBank) -> None:
    """Runs `meteora train bank`."""
    from meteora_jax.evaluation.tasks import load_split
    from meteora_jax.training.bank import BankTraining
    from meteora_jax.training.bank import train_bank as train

    mesh = make_devices_mesh(command)
    names = command.task or tuple(sorted(file.parent.name for file in command.tasks.glob("*/train.jsonl")))
    if not names or len(set(names)) < len(names):
        raise InputError(f"{command.tasks}: expected tasks, each once, found {' '.join(names) or 'none'}")
    tasks = {name: load_split(command.tasks, name, "train") for name in names}
    alpha = 2.0 * command.rank if command.alpha is None else command.alpha
    settings = BankTraining(**{**_settings(command, BankTraining), "alpha": alpha})

    def told(record: dict[str, Any]) -> None:
        if is_first_process():
            figures = f"exact {record['exact']:.1%}, loss {record['loss']:.4f}"
            better = sum(task["better"] for task in record["tasks"].values())
            status.print(
                f"step {record['step']}, held back: {figures}; {better} of {len(names)} better", highlight=False
            )

    with _progress("train bank", command.steps) as progress:
        final = train(
            command.base, tasks, command.out, settings, dtype=default_dtype(command.dtype), mesh=mesh,
            run=_run(command), log=command.log, progress=progress, told=told,
            begun=_begun("train bank"),
        )  # fmt: skip
    if is_first_process():
        for name, kept in final["kept"].items():
            line = f"{name}: step {kept['step']}, exact {kept['exact']:.1%}, loss {kept['loss']:.4f}"
            console.print(line, highlight=False, soft_wrap=True)
    _report(command, settings, final, {"bank": str(command.out), "tasks": list(names)})


def _settings(command: _Run, kind: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {k: v for k, v in vars(command).items() if k in kind.__dataclass_fields__}
    return fields | {"remat": "dots" if command.remat and command.remat_keeps == "dots" else command.remat}


def _run(command: _Run) -> Any:
    from meteora_jax.training.loop import RunFolder

    out: Path = vars(command)["out"]
    folder = command.run or out.with_name(f"{out.name}-run")
    return RunFolder(folder, command.save_every, command.keep, command.resume)


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    import grain  # noqa: F401 - while it is imported every thread's imports are lazy (etils); the bar draws in a thread

    with progress_bar(what) as bar:

        def show(step: int, record: dict[str, Any]) -> None:
            parts = [f"lm {record['lm']:.3f}"]
            if "gate" in record:
                parts.append(f"gate {record['gate']:.4f}  accuracy {record['gate_accuracy']:.3f}")
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
            if record["mfu"] is not None:
                parts.append(f"MFU {record['mfu']:.0%}")
            bar(step, steps, "  ".join(parts))

        yield show


def _begun(what: str) -> Callable[[Any], None]:
    def say(lost: Any) -> None:
        for line in unused_lines(lost.record()) if is_first_process() else ():
            status.print(f"{what}: {line}", highlight=False, markup=False, soft_wrap=True)

    return say


def unused_lines(lost: Mapping[str, Any]) -> list[str]:
    """What of a run's data is not used, a sentence a reason with all tasks that it concerns; nothing where all is."""

    def of(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {n:,} of {lost['examples'][name]:,}" for name, n in counts.items())

    total, lines = sum(lost["examples"].values()), []
    for key, what in (
        ("too_long", f"sequences are longer than --max-length (here {lost['max_length']:,} tokens) and are not used"),
        ("empty", "responses are empty and train the end token alone"),
        ("unpredicted", "sequences have no token to predict"),
        ("beside_held_back", "examples share their prompt with one that is held back and are not used"),
    ):
        if counts := lost[key]:
            lines.append(f"{sum(counts.values()):,} of {total:,} {what}: {of(counts)}")
    if count := lost["composites"]:
        tried = f"{count} of {lost['composites_tried']} composites, drawn on trial,"
        lines.append(f"{tried} are longer than --max-length; others take their place")
    return lines


def _report(command: _Run, settings: Any, final: dict[str, Any], what: dict[str, Any]) -> None:
    if not is_first_process():
        return
    for line in final.get("refused", ()):
        status.print(f"{line}; went on from the one before", highlight=False, soft_wrap=True)
    if final["resumed_at"]:
        status.print(f"went on from step {final['resumed_at']}", highlight=False)
    figures = [f"{k.replace('_', ' ')} {final[k]:.4f}" for k in ("lm", "gate", "gate_accuracy") if k in final]
    out: Path = vars(command)["out"]
    console.print(
        f"{out}: {settings.steps} steps in {final['seconds']:.0f} s; last tenth: {', '.join(figures)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in unused_lines(final["unused"]):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    write_json(command.json, {**what, "settings": asdict(settings), **final})
