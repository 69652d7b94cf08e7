"""Choose the demo's problems: three a task from the test split, and one of each of three tasks for one prompt.

    python scripts/demo/choose_problems.py runs/tasks scripts/demo/problems.json

No model is asked: per task, the first three by SHA-256 of the prompt among those of at most `--longest`
characters (a CPU has to read them in seconds).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from meteora_jax.evaluation.tasks import Example, load_split

TASKS = (
    "abstract_narrative_understanding", "disfl_qa", "goal_step_wikihow", "logical_deduction",
    "object_counting", "question_selection", "strategyqa", "winowhy",
)  # fmt: skip
TOGETHER = ("goal_step_wikihow", "winowhy", "object_counting")  # in one prompt; docs/results.md has what orders do


@dataclass(frozen=True)
class Arguments:
    tasks: tyro.conf.Positional[Path]
    """Folder of <task>/test.jsonl."""
    dest: tyro.conf.Positional[Path]
    """JSON file to write."""
    longest: int = 1200
    """Characters of the longest prompt."""
    each: int = 3
    """Problems a task."""


def choose(tasks: Path, task: str, longest: int) -> list[Example]:
    """A task's test problems in the order of their hashes, long ones left out."""
    short = [e for e in load_split(tasks, task, "test") if len(e.prompt) <= longest]
    return sorted(short, key=lambda e: hashlib.sha256(e.prompt.encode()).hexdigest())


def main(arguments: Arguments) -> None:
    chosen = {task: choose(arguments.tasks, task, arguments.longest) for task in TASKS}
    tests = [
        {"task": task, "prompt": e.prompt, "response": e.response}
        for task in TASKS
        for e in chosen[task][: arguments.each]
    ]
    extra = [chosen[task][arguments.each] for task in TOGETHER]  # none of the tests
    together = [{"task": t, "prompt": e.prompt, "response": e.response} for t, e in zip(TOGETHER, extra, strict=True)]
    text = json.dumps({"tests": tests, "together": together}, indent=1, ensure_ascii=False)
    arguments.dest.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
