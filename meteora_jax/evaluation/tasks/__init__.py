"""Task data: prompts with their right answers, in three splits that never share an input.

A folder of tasks is `TASKS/<task>/{train,test,holdout}.jsonl`, a line an example (`meteora_jax.examples`).
Each family of tasks has a module here that writes such folders (`bigbench`, `hub`); everything that trains or
scores reads them with `load_split`. Holdout is scored once, for a release, and never trained on or tuned on.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_lines
from meteora_jax.examples import Example as Example
from meteora_jax.examples import parse_example, record_of
from meteora_jax.io.files import whole_file

SPLITS = ("train", "test", "holdout")

# MeteoRA's 28 tasks. The order is part of its checkpoints: adapter i is task i.
METEORA_TASKS = (
    "abstract_narrative_understanding",
    "alpaca",
    "cnn_dailymail",
    "contextual_parametric_knowledge_conflicts",
    "cs_algorithms",
    "disfl_qa",
    "elementary_math_qa",
    "epistemic_reasoning",
    "formal_fallacies_syllogisms_negation",
    "goal_step_wikihow",
    "gsm8k",
    "language_identification",
    "linguistics_puzzles",
    "logical_deduction",
    "news_commentary_de",
    "news_commentary_es",
    "news_commentary_it",
    "object_counting",
    "paragraph_segmentation",
    "play_dialog_same_or_different",
    "question_selection",
    "reasoning_about_colored_objects",
    "strategyqa",
    "topical_chat",
    "tracking_shuffled_objects",
    "unit_conversion",
    "vitaminc_fact_verification",
    "winowhy",
)
# Six other BIG-bench tasks that fill a bank of 28 where the hub's are not at hand.
SUBSTITUTES = (
    "hyperbaton", "logical_fallacy_detection", "navigate", "sports_understanding", "temporal_sequences", "timedial",
)  # fmt: skip


@dataclass(frozen=True)
class TaskCounts:
    """What was written of one task: examples a split, how many listed test inputs were met, how many rows of the
    source were blank and left out."""

    task: str
    train: int
    test: int
    holdout: int
    pinned: int
    listed: int
    blank: int = 0


def input_digest(text: str) -> str:
    """SHA-256 (hex) by which an example's own input is known: stripped, UTF-8."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def split_of(text: str, pinned_to_test: Collection[str] = ()) -> str:
    """The split of the example whose own input is `text`.

    Digests in `pinned_to_test` are test; else the first hex digit decides: 0-c train, d-e test, f holdout.
    The same input therefore lands in the same split, however often and wherever it occurs.
    """
    digest = input_digest(text)
    if digest in pinned_to_test:
        return "test"
    return {"d": "test", "e": "test", "f": "holdout"}.get(digest[0], "train")


def read_test_inputs(path: Path) -> dict[str, frozenset[str]]:
    """Input digests by task, from lines `SHA-256 task`: what is test, whatever the split rule says."""
    digests = defaultdict(set)
    # A byte that is no UTF-8 must not pass as a digest or a task; replaced, its line is refused below.
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})\s+(\S+)", line)
        if not match:
            raise InputError(f"{path}:{number}: expected 64 hex digits and a task, found {line!r}")
        if match[2] not in METEORA_TASKS:
            raise InputError(f"{path}:{number}: expected one of the {len(METEORA_TASKS)} tasks, found {match[2]!r}")
        digests[match[2]].add(match[1])
    return {task: frozenset(values) for task, values in digests.items()}


def write_task(
    dest: Path,
    task: str,
    examples: Iterable[tuple[str, Example]],
    listed: frozenset[str] = frozenset(),
    split: Callable[[str, Collection[str]], str] = split_of,
) -> TaskCounts:
    """Write `dest/<task>/{train,test,holdout}.jsonl` from examples with their own inputs.

    `listed` holds the digests that are test, `split` decides from an own input and them.
    """
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    pinned = set()
    for own_input, example in examples:
        splits[split(own_input, listed)].append(example)
        pinned |= {input_digest(own_input)} & listed
    write_splits(dest / task, splits)
    sizes = {name: len(members) for name, members in splits.items()}
    return TaskCounts(task, **sizes, pinned=len(pinned), listed=len(listed))


def write_splits(
    task_dir: Path, splits: Mapping[str, Iterable[Example]], record: Callable[[Any], dict[str, Any]] = record_of
) -> None:
    """Write `task_dir/<split>.jsonl` for each split, a `record` a line; a file is complete or it is not there."""
    task_dir.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        lines = (json.dumps(record(example), ensure_ascii=False) + "\n" for example in examples)
        with whole_file(task_dir / f"{split}.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)


def _check_folder(tasks_dir: Path) -> None:
    if not tasks_dir.is_dir():
        found = "a file" if tasks_dir.exists() else "no such folder"
        raise InputError(f"{tasks_dir}: expected a TASKS folder, found {found}")


def load_split(tasks_dir: Path, task: str, split: str) -> list[Example]:
    """Examples of `<tasks_dir>/<task>/<split>.jsonl`, in file order; bad lines raise `InputError`, all together."""
    _check_folder(tasks_dir)
    path = tasks_dir / task / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: expected the {split} split of {task}, found no file")
    examples, problems = [], []
    for where, line in read_lines(path):
        try:
            examples.append(parse_example(line, where))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return examples


def load_splits(tasks_dir: Path, tasks: Sequence[str], split: str) -> dict[str, list[Example]]:
    """Every task's examples of a split; what is wrong with any of them is said together.

    Raises:
        InputError: there is no such folder, a task is named twice, or a file is missing, empty or malformed.
    """
    _check_folder(tasks_dir)  # once, not for every task
    problems = [f"{tasks_dir / task}: expected a task once, found it twice" for task in _repeated(tasks)]
    loaded = {}
    for task in dict.fromkeys(tasks):
        try:
            loaded[task] = load_split(tasks_dir, task, split)
            if not loaded[task]:
                problems.append(f"{tasks_dir / task / f'{split}.jsonl'}: expected {split} examples, found none")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return loaded


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
