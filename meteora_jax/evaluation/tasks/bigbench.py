"""The 22 BIG-bench tasks among MeteoRA's 28, from BIG-bench's own task files.

All 22 are JSON tasks, none is a program, and each has the name that MeteoRA gives it. Their format is that of
`bigbench/api/json_task.py` in the sdist `bigbench==1.0.0`; that package is not imported, as its dependencies
are years out of date. On top of BIG-bench's text stands what MeteoRA's authors did: outer whitespace goes,
four tasks get their choices as lines, and `[INST] ... [/INST]` goes round it all. `verify` holds the result
against their data.
"""

import functools
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meteora_jax.config import InputError, read_lines
from meteora_jax.evaluation.tasks import (
    METEORA_TASKS,
    SPLITS,
    SUBSTITUTES,
    Example,
    TaskCounts,
    load_split,
    write_task,
)
from meteora_jax.examples import parse_example
from meteora_jax.text import check_text

NOT_BIGBENCH = (
    "alpaca", "cnn_dailymail", "gsm8k", "news_commentary_de", "news_commentary_es", "news_commentary_it",
)  # fmt: skip
BIGBENCH_TASKS = tuple(task for task in METEORA_TASKS if task not in NOT_BIGBENCH)

# Where BIG-bench shows no choices, MeteoRA appends them to these tasks: this text, then a line a choice.
CHOICE_LINES_AFTER = {
    "abstract_narrative_understanding": "\n",
    "logical_deduction": " Which choice is correct?\n",
    "tracking_shuffled_objects": "\n",
    "unit_conversion": "\n",
}

# The ten sub-questions of a composite-10 problem, in their order; the two others are not from BIG-bench.
COMPOSITE_10 = (
    "logical_deduction", "question_selection", "abstract_narrative_understanding", "goal_step_wikihow",
    "winowhy", "strategyqa", "disfl_qa", "news_commentary_de", "alpaca", "linguistics_puzzles",
)  # fmt: skip
WORKED_EXAMPLES = 2

_TASK_FILE = re.compile(r"(?:^|/)bigbench/benchmark_tasks/(?P<task>[^/]+)/(?:(?P<subtask>[^/]+)/)?task\.json$")


@dataclass
class Reproduction:
    """How one task's distinct sub-questions in a composite-10 file compare with the prepared prompts."""

    task: str
    questions: int = 0
    questions_equal: int = 0
    questions_in_test: int = 0
    answers_equal: int = 0
    examples: int = 0
    examples_equal: int = 0
    different: list[str] = field(default_factory=list)


def prepare(
    source: Path,
    dest: Path,
    tasks: Sequence[str] = BIGBENCH_TASKS,
    pinned_to_test: Mapping[str, frozenset[str]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[TaskCounts]:
    """Write `dest/<task>/{train,test,holdout}.jsonl` for each task of a BIG-bench checkout or sdist.

    `pinned_to_test` holds input digests by task (`read_test_inputs`); `progress` is called with (task, done,
    total), first when the source has been read. Raises `InputError` when a task is
    unknown, absent from `source`, or malformed.
    """
    known = (*BIGBENCH_TASKS, *SUBSTITUTES)
    if unknown := sorted(set(tasks) - set(known)):
        raise InputError(f"tasks: expected BIG-bench tasks ({', '.join(known)}), found {', '.join(unknown)}")
    files = read_task_files(source, tasks)
    listed = pinned_to_test or {}
    counts = []
    for done, task in enumerate(tasks):
        if progress:
            progress(task, done, len(tasks))
        counts.append(write_task(dest, task, read_examples(task, files[task]), listed.get(task, frozenset())))
    if progress:
        progress("", len(tasks), len(tasks))
    return counts


# --- BIG-bench's files ---


def read_task_files(source: Path, tasks: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """The `task.json` files of each task: `{task: {subtask: content}}`, the task's own file under "".

    `source` is a folder that holds `bigbench/benchmark_tasks`, or the sdist's .tar.gz, read as it is.
    """
    if source.is_dir():
        found = _folder_task_files(source, tasks)
    elif source.is_file():
        found = _archive_task_files(source, tasks)
    else:
        raise InputError(f"{source}: expected a BIG-bench folder or sdist (.tar.gz), found nothing")
    files: dict[str, dict[str, bytes]] = {task: {} for task in tasks}
    for task, subtask, content in found:
        files[task][subtask] = content
    missing = ", ".join(task for task in tasks if "" not in files[task])
    if missing:
        raise InputError(f"{source}: expected bigbench/benchmark_tasks/<task>/task.json, found none for {missing}")
    return files


def _folder_task_files(source: Path, tasks: Sequence[str]) -> Iterator[tuple[str, str, bytes]]:
    for task in tasks:
        for path in (source / "bigbench" / "benchmark_tasks" / task).rglob("task.json"):
            if match := _TASK_FILE.search(path.as_posix()):
                yield task, match["subtask"] or "", path.read_bytes()


def _archive_task_files(source: Path, tasks: Sequence[str]) -> Iterator[tuple[str, str, bytes]]:
    try:
        # "r|*" reads forwards once; going back in 350 compressed MB costs a whole pass.
        with tarfile.open(source, mode="r|*") as archive:
            for member in archive:
                match = _TASK_FILE.search(member.name)
                file = archive.extractfile(member) if match and match["task"] in tasks else None
                if match and file:
                    yield match["task"], match["subtask"] or "", file.read()
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{source}: expected a whole tar archive, found one cut or broken: {error}") from None


def read_examples(task: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, Example]]:
    """Each example of a task with its own input (BIG-bench's `input`), subtasks in the order of their names.

    As in BIG-bench, a task file with examples has no subtasks, and an example that occurs twice in one file,
    equal in every field, counts once.
    """
    whole = _parse_task_file(files[""], f"{task}/task.json")
    for subtask in [""] if "examples" in whole else sorted(filter(None, files)):
        file = "/".join(filter(None, (task, subtask, "task.json")))
        content = _parse_task_file(files[subtask], file)
        if not isinstance(content.get("examples"), list):
            raise InputError(f"{file}: examples: expected a list, found {type(content.get('examples')).__name__}")
        _check_prefixes(content, file)
        distinct = {json.dumps(sample): sample for sample in content["examples"]}
        for number, sample in enumerate(distinct.values()):
            where = f"{file}: example {number}"
            _check_sample(sample, where)
            example = Example(format_prompt(task, content, sample), right_answer(sample, where))
            for key, text in (("input", example.prompt), ("target", example.response)):
                check_text(text, f"{where}: {key}")
            yield sample["input"], example


def _parse_task_file(content: bytes, file: str) -> dict:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or beyond Python's own limits
        raise InputError(f"{file}: expected a JSON object, found a file that is none ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _check_prefixes(content: Mapping, file: str) -> None:
    problems = [
        f"{file}: {key}: expected a string, found {_kind(content[key])}"
        for key in ("task_prefix", "example_input_prefix", "example_output_prefix", "choice_prefix")
        if key in content and not isinstance(content[key], str)
    ]
    if problems:
        raise InputError(problems)


def _check_sample(sample: object, where: str) -> None:
    if not isinstance(sample, dict):
        raise InputError(f"{where}: expected a JSON object, found {_kind(sample)}")
    problems = []
    if not isinstance(sample.get("input"), str):
        problems.append(f"{where}: input: expected a string, found {_kind(sample.get('input'))}")
    target, scores = sample.get("target", ""), sample.get("target_scores", {})
    first = target[0] if isinstance(target, list) and target else target
    # A number is a target, too: the answer is how it is written.
    if isinstance(first, bool) or not (isinstance(first, str | int | float) or first == []):
        found = _kind(target) if first is target else f"a list with {_kind(first)}"
        problems.append(f"{where}: target: expected a string or a list of strings, found {found}")
    if not isinstance(scores, dict):
        problems.append(f"{where}: target_scores: expected a JSON object, found {_kind(scores)}")
    elif strange := [choice for choice, score in scores.items() if not _is_number(score)]:
        found = f"{_kind(scores[strange[0]])} for {strange[0]!r:.60}"
        problems.append(f"{where}: target_scores: expected a number for each choice, found {found}")
    if not (problems or scores or _is_target(target)):
        problems.append(f"{where}: target: expected target or target_scores, found only {sorted(sample)}")
    if problems:
        raise InputError(problems)


def _is_target(value: object) -> bool:
    """Whether a target says an answer; 0 is one."""
    return value not in ("", [])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value  # JSON of Python's has NaN, which is above nothing


def _kind(value: object) -> str:
    return "NaN" if value != value else type(value).__name__


# --- The text of a prompt ---


def format_prompt(task: str, content: Mapping, sample: Mapping) -> str:
    """The prompt of one example: BIG-bench's zero-shot text (`content` holds the task's prefixes), as MeteoRA
    wraps it.

    >>> format_prompt("strategyqa", {}, {"input": "Is ice cold?"})
    '[INST] Q: Is ice cold?\\nA: [/INST]\\n'
    """
    choices = list(sample.get("target_scores", ()))
    text = content.get("task_prefix", "") + content.get("example_input_prefix", "\nQ: ") + sample["input"]
    # Truth of the value, as in BIG-bench: one task says "false", a string, and so does get its choices.
    if choices and content.get("append_choices_to_input", True):
        choice_prefix = content.get("choice_prefix", "\n  choice: ")
        text += "".join(choice_prefix + choice for choice in permuted(choices))
    text = (text + content.get("example_output_prefix", "\nA: ")).strip()
    if choices and task in CHOICE_LINES_AFTER:
        # In the file's order, as the original: in these tasks the right choice is as often at any place.
        text += CHOICE_LINES_AFTER[task] + "".join(f"choice: {choice}\n" for choice in choices)
    return f"[INST] {text} [/INST]\n"


def right_answer(sample: Mapping, where: str) -> str:
    """The target (the first of several), else the first choice of the highest score; stripped."""
    if _is_target(target := sample.get("target", "")):
        first = target[0] if isinstance(target, list) else target
        return str(first).strip()
    scores = sample["target_scores"]
    if max(scores.values()) <= (min(scores.values()) if len(scores) > 1 else 0):
        raise InputError(f"{where}: target_scores: expected a choice above the others, found {scores}")
    return max(scores, key=scores.__getitem__).strip()


def permuted(choices: Sequence[str]) -> list[str]:
    """The order in which BIG-bench appends choices: sorted, then permuted by a generator of seed 42.

    Sound as well as faithful: a choice's place follows from the choices' alphabet alone, never from the
    file's order, which in question_selection has the right choice always first.
    """
    ordered = sorted(choices)
    return [ordered[i] for i in _permutation(len(ordered))]


@functools.cache
def _permutation(size: int) -> tuple[int, ...]:
    # BIG-bench makes a new generator for each example; NumPy keeps RandomState's stream fixed (NEP 19).
    return tuple(np.random.RandomState(seed=42).permutation(size).tolist())


# --- Against MeteoRA's own data ---


def verify(reference: Path, tasks_dir: Path, tasks: Sequence[str] = BIGBENCH_TASKS) -> list[Reproduction]:
    """Look up every sub-question of a composite-10 file among the prepared prompts of `tasks_dir`.

    Questions are compared character for character. The worked examples are in the original without the
    whitespace that begins a line, so they are compared without it.
    """
    questions, examples = _composite_sub_questions(reference)
    return [_compare(task, questions[task], examples[task], tasks_dir) for task in COMPOSITE_10 if task in tasks]


def _compare(task: str, questions: Mapping[str, str], examples: set[str], tasks_dir: Path) -> Reproduction:
    responses = defaultdict(set)
    in_test = set()
    for split in SPLITS:
        for example in load_split(tasks_dir, task, split):
            # A prompt may occur with two answers: winowhy has six such pairs.
            responses[example.prompt].add(example.response)
            if split == "test":
                in_test.add(example.prompt)
    dedented = {_dedented(prompt) for prompt in responses}
    return Reproduction(
        task,
        questions=len(questions),
        questions_equal=sum(question in responses for question in questions),
        questions_in_test=sum(question in in_test for question in questions),
        answers_equal=sum(answer in responses.get(question, ()) for question, answer in questions.items()),
        examples=len(examples),
        examples_equal=len(examples & dedented),
        different=[question for question in questions if question not in responses] + sorted(examples - dedented),
    )


def _composite_sub_questions(reference: Path) -> tuple[dict[str, dict[str, str]], dict[str, set[str]]]:
    """By task: the questions with their answers, and the dedented worked examples, of all problems."""
    questions = {task: {} for task in COMPOSITE_10}
    examples = {task: set() for task in COMPOSITE_10}
    expected = (WORKED_EXAMPLES + 1) * len(COMPOSITE_10)
    for where, line in read_lines(reference):
        problem = parse_example(line, where)
        prompts = re.findall(r"\[INST\] .*?\[/INST\]\n", problem.prompt, flags=re.DOTALL)
        answers = problem.response.split("@@@@\n")
        if len(prompts) != expected or len(answers) != len(COMPOSITE_10):
            raise InputError(
                f"{where}: expected {expected} [INST] parts and {len(COMPOSITE_10)} answers, "
                f"found {len(prompts)} and {len(answers)}"
            )
        for i, prompt in enumerate(prompts[: -len(COMPOSITE_10)]):
            examples[COMPOSITE_10[i % len(COMPOSITE_10)]].add(_dedented(prompt))
        for task, prompt, answer in zip(COMPOSITE_10, prompts[-len(COMPOSITE_10) :], answers, strict=True):
            questions[task][prompt] = answer.strip()
    return questions, examples


def _dedented(text: str) -> str:
    return re.sub(r"\n[ \t]+", "\n", text)
