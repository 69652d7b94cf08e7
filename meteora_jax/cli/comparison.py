"""What `meteora evaluate` and `meteora throughput` share: the systems and the problems that their options name."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from meteora_jax.api import Meteora
from meteora_jax.cli.devices import Devices
from meteora_jax.cli.report import status
from meteora_jax.config import InputError
from meteora_jax.engine.request import check_prompts
from meteora_jax.evaluation.problems import Problem, load_problems, load_queries
from meteora_jax.evaluation.systems import Given, Model, System, default_systems, make_system, of_a_family
from meteora_jax.execution import Dtype
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import read_origin
from meteora_jax.io.model_state import assemble
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.loading import load
from meteora_jax.model.layout import base_arrays
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.ranking import read_ranking

_NAMED = 5  # problems that a message about many names


@dataclass(frozen=True)
class Comparison(Devices):
    """Options of a command that compares systems on problems."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder: TASKS/<task>/<split>.jsonl."""
    out: Path
    """Folder of what is written."""
    bank: Path | None = None
    """BANK folder."""
    gates: Path | None = None
    """GATES folder."""
    adapter_slots: int | Literal["auto"] | None = None
    """So many of the bank's adapters are on the device, the others on disk (auto: by the memory); else all."""
    index: Path | None = None
    """INDEX folder, for the systems that retrieve."""
    systems: str | None = None
    """Separated by commas: base, oracle (the adapter named like the task; not for composites), gates-topN, of the bank
    alone arrow-topN, spectr-topN, lag-topN, logo-kN, phatgoose-topN and uniform (all adapters alike), with --index
    retrieval-selection, -mixture, -fusion, gates-within-topN and (an index of tasks) task-retrieval, an adapter's name,
    or NAME=FOLDER: a BANK of one adapter or a PEFT folder. Suffixes, in this order: -k5 retrieves five adapters (else
    3), -t15 sets the gates' temperature (else as trained; 15, 20, 30 on composite-3, 5, 10; of scores 1), -unseen hides
    the adapters of a problem's own tasks, as if these were new: gates-within-top2-k5-t15-unseen. By default of what is
    given: base, with --bank oracle, with --gates gates-top1 and gates-top2, with --index retrieval-selection and, where
    INDEX is ranked, task-retrieval."""
    only: str | None = None
    """Separated by commas: tasks, "all" for one an adapter of the bank, and .json files of LoraRetriever's queries (a
    list of inputs, targets, task, metric). All unless given."""
    split: Literal["train", "test", "holdout"] = "test"
    """Holdout is scored once, for a release."""
    limit: int | None = None
    """At most so many problems a task, chosen by their hash."""
    max_prompt: int | None = None
    """Leave out problems of one task whose prompt has more tokens, of those that --limit chose."""
    max_new_tokens: int = 64
    """Longest answer."""
    json: Path | None = None
    """Write what is printed here too."""


@dataclass(frozen=True)
class Loaded:
    """A comparison's model, systems and index, and the fingerprints of the systems' own banks by name."""

    model: Meteora
    systems: list[System]
    banks: dict[str, str]
    index: Index | None


def load_systems(command: Comparison, mesh: Mesh | None, dtype: Dtype) -> Loaded:
    """Loads the model, onto a mesh if there is one, and makes the systems.

    Raises:
        InputError: a folder was refused, or a system cannot be made of what is given.
    """
    model = load(command.base, command.bank, command.gates, mesh, dtype, command.adapter_slots)
    index = Index.load(command.index) if command.index else None
    ranking = read_ranking(command.index) if command.index else None
    if command.systems is None:
        names, folders = default_systems(Given(model, index=index, ranking=ranking)), {}
    else:
        names, folders = read_systems(command.systems, model.adapter_names)
    arrays = base_arrays(model.graph, model.weights) if folders else {}
    others: dict[str, Model] = {}
    banks: dict[str, str] = {}
    for name, folder in folders.items():
        others[name], banks[name] = other_bank(model, arrays, name, folder, command.base)
    given = Given(model, others, index, ranking)
    return Loaded(model, [make_system(name, given) for name in names], banks, index)


def read_systems(text: str, adapters: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """The names of `--systems` in their order, each once, and the folders of those given as NAME=FOLDER.

    Raises:
        InputError: no system, an entry that is half of NAME=FOLDER, or a NAME that is another system's as well.
    """
    names: list[str] = []
    folders: dict[str, Path] = {}
    entries = [entry.partition("=") for entry in text.split(",") if entry]
    plain = {name for name, equals, _ in entries if not equals}
    for name, equals, folder in entries:
        if equals:
            if not (name and folder):
                raise InputError(f"--systems: expected NAME=FOLDER, found {name + equals + folder!r}")
            if name in folders or name in plain or name in adapters or of_a_family(name):
                raise InputError(f"--systems: {name}={folder}: expected a NAME that no other system has, found {name}")
            folders[name] = Path(folder)
        names.append(name)
    if not names:
        raise InputError("--systems: expected at least one system, found none")
    return list(dict.fromkeys(names)), folders


def other_bank(
    model: Meteora, arrays: Mapping[tuple[str, ...], object], name: str, folder: Path, base: Path
) -> tuple[Meteora, str]:
    """The model with the one adapter of another bank or PEFT folder instead of its own, and the bank's fingerprint.

    arrays: the base's, of `base_arrays`. All other banks share them, so that each costs its own size and no more.
    """
    import converters

    if not any((folder / file).is_file() for file in ("bank.json", "adapter_config.json")):
        raise InputError(f"--systems: {name}={folder}: expected a BANK or PEFT folder, found none")
    dtype = np.dtype(model.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        bank_folder = folder
        if (folder / "adapter_config.json").is_file():
            bank_folder = Path(temporary) / "bank"
            converters.import_adapters(bank_folder, base, {name: folder})
        bank = load_bank(bank_folder, model.config, dtype, read_origin(base))
        mark = fingerprint(bank_folder)
    if len(bank.names) != 1:
        raise InputError(f"{folder}: expected a bank of one adapter, found {', '.join(bank.names)}")
    graph, state = assemble(model.config, arrays, bank, None, dtype, model.mesh)
    own = dict(bank=bank.config, gates=None, graph=graph, weights=state, pool=None)
    return dataclasses.replace(model, **own), str(mark)


def fingerprint(folder: Path | None, file: str = WEIGHTS) -> str | None:
    """SHA-256 of a folder's weights: a run resumed with others would mix two models' answers."""
    from converters.folders import sha256

    return None if folder is None else sha256(folder / file)


def named_problems(
    command: Comparison, model: Model, only: str, metrics: Mapping[str, str] | None = None
) -> tuple[list[str], list[Problem]]:
    """The rows that an `--only` names, tasks before files of queries, and their problems, scored by `metrics`.

    Raises:
        InputError: a file was refused.
    """
    entries = [entry for entry in only.split(",") if entry]
    files = [Path(entry) for entry in entries if entry.endswith(".json")]
    tasks: list[str] = []
    for entry in entries:
        if not entry.endswith(".json"):
            tasks += model.adapter_names if entry == "all" else [entry]
    rows, problems = list(tasks), load_problems(command.tasks, tasks, command.split, command.limit, metrics)
    for file in files:
        queries = load_queries(file, command.limit)
        rows += dict.fromkeys(p.task for p in queries)
        problems += queries
    return rows, problems


def fitting(command: Comparison, model: Model, rows: Sequence[str], problems: Sequence[Problem]) -> list[Problem]:
    """The problems whose prompts `--max-prompt` allows; composite problems are as long as they are.

    Raises:
        InputError: there is no row, two have one name, or one has no problem left.
    """
    if not rows:
        raise InputError("--only: expected at least one task, or a composite, found none")
    if twice := sorted({row for row in rows if rows.count(row) > 1}):
        raise InputError(f"--only, --composite: expected each name once, found twice: {', '.join(twice)}")
    most = command.max_prompt
    if most is None:
        return list(problems)
    short = [p for p in problems if p.tasks or len(model.encode(p.asked)) <= most]
    if gone := set(rows) - {p.task for p in short}:
        raise InputError(f"--max-prompt: expected room for a problem of every row, found none for {', '.join(gone)}")
    if left := len(problems) - len(short):
        status.print(f"{left} problems of more than {most} tokens left out", highlight=False)
    return short


def check_lengths(command: Comparison, model: Model, problems: Sequence[Problem]) -> None:
    """Refuses problems that are beyond the context together with their responses, before anything runs.

    Raises:
        InputError: a line for each of the first of them.
    """
    wrong = []
    for p in problems:
        try:
            check_prompts([model.encode(p.asked)], model.config, p.new_tokens(command.max_new_tokens))
        except InputError as e:
            wrong.append(f"{p.id}: {str(e).removeprefix('prompt 0: ')}")
    if wrong:
        rest = [f"{len(wrong) - _NAMED} more such problems"] if len(wrong) > _NAMED else []
        raise InputError(wrong[:_NAMED] + rest)
