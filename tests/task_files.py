"""The hand-made BIG-bench folder of fixtures, and what was prepared of it."""

import hashlib
from pathlib import Path

from meteora_jax.evaluation.tasks import SPLITS, load_split
from meteora_jax.evaluation.tasks.bigbench import COMPOSITE_10

BIGBENCH = Path(__file__).parent / "fixtures" / "bigbench"
FIXTURE_TASKS = ("logical_deduction", "object_counting", "question_selection", "strategyqa", "winowhy")


def all_examples(tasks_dir, task):
    return [example for split in SPLITS for example in load_split(tasks_dir, task, split)]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def composite_problem(**asked):
    """A composite-10 problem that asks `asked`, by task, in all three rounds; other questions are dots."""
    prompts = [asked.get(task, ("[INST] . [/INST]\n", ""))[0] for task in COMPOSITE_10]
    answers = [asked.get(task, ("", "."))[1] for task in COMPOSITE_10]
    round_of_ten = "\n".join(prompts)
    dedented = round_of_ten.replace("\n  choice", "\nchoice")
    return {"prompt": dedented + dedented + round_of_ten, "response": "@@@@\n".join(answers)}
