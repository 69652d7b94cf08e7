"""Composite-n problems: n sub-questions of n tasks in one prompt, as MeteoRA's evaluation lays them out.

In the release's composite-10 file a prompt is two worked examples, a line that asks for the same, and the
problem's own sub-questions; its response is the answers joined by "@@@@\\n". In the worked examples the
whitespace that begins a line is gone, two line ends separate questions where three do below, and the answers
stand on lines "i. ...", each on one line. Unlike there, where one pair of worked examples serves all problems,
each problem draws its own from train. A question is its task's own prompt, whatever its format: where the release has
`[INST] ... [/INST]`, a conversation stands as the base's chat template writes it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meteora_jax.config import InputError, LlamaConfig, read_lines
from meteora_jax.evaluation.tasks import load_split, write_splits
from meteora_jax.evaluation.tasks.bigbench import COMPOSITE_10
from meteora_jax.evaluation.wordings import WORDINGS, Wording, check_wording, format_prompt
from meteora_jax.examples import Example, as_text, parse_example, record_of
from meteora_jax.text import check_text

# MeteoRA's own problems, by n.
COMPOSITES: dict[int, tuple[str, ...]] = {
    3: ("logical_deduction", "question_selection", "strategyqa"),
    5: (
        "logical_deduction", "question_selection", "abstract_narrative_understanding", "goal_step_wikihow",
        "strategyqa",
    ),
    10: COMPOSITE_10,
}  # fmt: skip
SEED = 0
COUNT = 200
SHOTS = 2
ANSWER_SEPARATOR = "@@@@\n"

_REDRAWN_SHOTS = 20  # sets of worked examples tried round one set of questions before a question must go
_DEALS_A_PROBLEM = 100  # all `count` problems of `count` possible ones need about ln(count) deals each


@dataclass(frozen=True)
class Composite(Example):
    """A composite problem: beside prompt and response, the sub-questions' tasks and answers in order."""

    tasks: tuple[str, ...]
    answers: tuple[str, ...]
    wording: Wording = "numbered"


def generate_composites(
    tasks_dir: Path,
    tasks: Sequence[str],
    *,
    seed: int = SEED,
    count: int = COUNT,
    shots: int = SHOTS,
    max_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    tokenizer: Any = None,
    dest: Path | None = None,
    wording: Wording = "numbered",
) -> Path:
    """Write `count` composite problems of `tasks` as JSON lines {"prompt", "response", "tasks", "answers"}.

    The file is `dest`, `default_path` unless given. `load_split` reads
    it like any task's. It is complete or it is not there; one that is there must hold the very same problems, and
    is left alone. What is drawn: see `draw_composites`.
    """
    mark = "" if dest else template_mark(tasks_dir, tasks, tokenizer)
    dest = dest or default_path(tasks_dir, tasks, seed=seed, count=count, shots=shots, template=mark, wording=wording)
    if dest.suffix != ".jsonl":
        raise InputError(f"{dest}: expected a name that ends in .jsonl")
    problems = draw_composites(
        tasks_dir, tasks, seed=seed, count=count, shots=shots, max_tokens=max_tokens, count_tokens=count_tokens,
        tokenizer=tokenizer, wording=wording,
    )  # fmt: skip
    if not dest.exists():
        write_splits(dest.parent, {dest.stem: problems}, _record)
    elif read_composites(dest) != problems:
        size = "" if max_tokens is None else f", at most {max_tokens} tokens"
        raise InputError(
            f"{dest}: expected the problems of seed {seed}, count {count}, shots {shots}{size}, found others: remove "
            "the file, or name it as it is"
        )
    return dest


def _record(problem: Composite) -> dict[str, object]:
    wording = {} if problem.wording == "numbered" else {"wording": problem.wording}
    return {**record_of(problem), "tasks": problem.tasks, "answers": problem.answers, **wording}


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks of a composite as the command line names it: 3, 5, 10 for MeteoRA's, or tasks joined by +; one word
    of another kind for itself."""
    return {str(n): tasks for n, tasks in COMPOSITES.items()}.get(name, tuple(name.split("+")))


def longest_prompt(config: LlamaConfig, new_tokens: int) -> int | None:
    """Tokens of a prompt that leave room for a response of `new_tokens` in the context; None where a context grows."""
    scaling = config.rope_scaling
    grows = scaling is not None and scaling.rope_type == "dynamic"
    return None if grows else config.max_position_embeddings - new_tokens


def default_path(
    tasks_dir: Path,
    tasks: Sequence[str],
    *,
    seed: int = SEED,
    count: int = COUNT,
    shots: int = SHOTS,
    template: str = "",
    wording: Wording = "numbered",
) -> Path:
    """`tasks_dir/composite_<n>/test.jsonl`; what is not the usual shots, seed or count is in the folder's name, and a
    digest of the tasks where they are not MeteoRA's: their problems must not pass for those. So is the `template_mark`
    of conversations: another base has other prompts."""
    n = len(tasks)
    own = hashlib.sha256("+".join(tasks).encode()).hexdigest()[:8]
    unusual = [f"of_{own}"] if COMPOSITES.get(n) != tuple(tasks) else []
    unusual += [wording] if wording != "numbered" else []
    unusual += [template] if template else []
    unusual += [f"{shots}_shot"] if shots != SHOTS else []
    unusual += [f"seed_{seed}"] if seed != SEED else []
    unusual += [f"count_{count}"] if count != COUNT else []
    return tasks_dir / "_".join(["composite", str(n), *unusual]) / "test.jsonl"


def template_mark(tasks_dir: Path, tasks: Sequence[str], tokenizer: Any) -> str:
    """What tells the chat template's composites from another's: a digest of it where a task has conversations, else "".

    Raises:
        InputError: a task has conversations and the tokenizer no template, or there is no tokenizer.
    """
    there = [task for task in tasks if (tasks_dir / task / "test.jsonl").is_file()]
    talks = [task for task in there if any(example.messages for example in load_split(tasks_dir, task, "test"))]
    if not talks:
        return ""
    template = tokenizer.chat_template if tokenizer is not None else None
    if not template:
        found = "none" if tokenizer is None else "one without"
        raise InputError(
            f"{tasks_dir}: expected a base whose tokenizer has a chat template (--base) for the conversations of "
            f"{', '.join(talks)}, found {found}"
        )
    return f"template_{hashlib.sha256(json.dumps(template).encode()).hexdigest()[:8]}"


def read_composites(path: Path) -> list[Composite]:
    """The problems of a file that `generate_composites` wrote, or of the MeteoRA release's.

    The release's lines have no "tasks" and "answers": answers are the response's parts, and their number tells
    which of `COMPOSITES` was asked. Raises `InputError` for a malformed line, or problems of different tasks.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected composite problems, found no file")
    problems = [_read_composite(line, where) for where, line in read_lines(path)]
    if not problems:
        raise InputError(f"{path}: expected composite problems, found none")
    for number, problem in enumerate(problems, start=1):
        if problem.tasks != problems[0].tasks:
            expected, found = ", ".join(problems[0].tasks), ", ".join(problem.tasks)
            raise InputError(f"{path}:{number}: tasks: expected those of line 1 ({expected}), found {found}")
    return problems


def _read_composite(line: bytes, where: str) -> Composite:
    example, record = parse_example(line, where), json.loads(line)
    if "tasks" not in record and "answers" not in record:
        answers = example.response.split(ANSWER_SEPARATOR)
        if len(answers) not in COMPOSITES:
            sizes = ", ".join(map(str, COMPOSITES))
            raise InputError(f"{where}: response: expected {sizes} answers where no tasks stand, found {len(answers)}")
        return Composite(example.prompt, example.response, COMPOSITES[len(answers)], tuple(answers))
    tasks, answers = record.get("tasks"), record.get("answers")
    for key, value in (("tasks", tasks), ("answers", answers)):
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise InputError(f"{where}: {key}: expected a list of texts, found {str(value)[:60]}")
        for i, text in enumerate(value):
            check_text(text, f"{where}: {key}: {i}")
    if len(tasks) != len(answers):
        raise InputError(f"{where}: answers: expected one a task ({len(tasks)}), found {len(answers)}")
    wording = record.get("wording", "numbered")
    if wording not in WORDINGS:
        raise InputError(f"{where}: wording: expected one of {', '.join(WORDINGS)}, found {str(wording)[:60]}")
    try:
        check_wording(wording, len(tasks), shots=1)
    except InputError as error:
        raise InputError([f"{where}: {problem}" for problem in error.problems]) from None
    return Composite(example.prompt, example.response, tuple(tasks), tuple(answers), wording)


def draw_composites(
    tasks_dir: Path,
    tasks: Sequence[str],
    *,
    seed: int,
    count: int,
    shots: int,
    max_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    tokenizer: Any = None,
    wording: Wording = "numbered",
) -> list[Composite]:
    """`count` problems: sub-questions from test, `shots` worked examples each from train (0 is zero-shot).

    No two problems have the same sub-questions, and a task repeats one only after all others have been used.
    Without `max_tokens` a seed gives the same sub-questions whatever `shots` is. A prompt of more than `max_tokens` by
    `count_tokens` gets other worked examples; where many do not help, its longest sub-question is never drawn
    again and the others later. Conversations become text by the tokenizer's chat template. Raises `InputError` for data
    that cannot give so many problems.
    """
    _check(tasks, seed=seed, count=count, shots=shots, max_tokens=max_tokens, count_tokens=count_tokens)
    check_wording(wording, len(tasks), shots)
    length, limit = count_tokens or len, math.inf if max_tokens is None else max_tokens
    # Two generators: what the worked examples draw leaves the questions as they are.
    question_random, shot_random = (np.random.RandomState([seed, stream]) for stream in (0, 1))
    asked = _load_all(tasks_dir, tasks, "test", tokenizer, least=1)
    decks = [_Deck(task, examples, question_random) for task, examples in zip(tasks, asked, strict=True)]
    worked = _load_all(tasks_dir, tasks, "train", tokenizer, least=shots) if shots else []

    problems: dict[tuple[Example, ...], Composite] = {}
    for _ in range(_DEALS_A_PROBLEM * count):
        questions = tuple(deck.deal() for deck in decks)
        if questions in problems:
            continue
        for _ in range(_REDRAWN_SHOTS if shots else 1):
            drawn = _draw_shots(worked, shots, shot_random)
            prompt = format_prompt(questions, drawn, wording)
            if length(prompt) <= limit:
                problems[questions] = _composite(tasks, questions, prompt, wording)
                break
        else:
            _set_aside(decks, questions, length)
        if len(problems) == count:
            return list(problems.values())
    size = "" if max_tokens is None else f" of at most {max_tokens} tokens"
    raise InputError(f"{tasks_dir}: expected tests for {count} different problems{size}, found {len(problems)}")


def _composite(tasks: Sequence[str], questions: Sequence[Example], prompt: str, wording: Wording) -> Composite:
    answers = tuple(question.response for question in questions)
    return Composite(prompt, ANSWER_SEPARATOR.join(answers), tuple(tasks), answers, wording)


# Drawing


class _Deck:
    """A task's test examples, dealt in random order; none comes twice before all have come."""

    def __init__(self, task: str, examples: Sequence[Example], random: np.random.RandomState):
        self.task = task
        self._random = random
        self._all = list(examples)
        self._left: list[Example] = []

    def deal(self) -> Example:
        if not self._all:
            raise InputError(f"{self.task}: expected test examples short enough for max_tokens, found none left")
        if not self._left:
            self._left = [self._all[i] for i in self._random.permutation(len(self._all))]
        return self._left.pop()

    def put_back(self, example: Example) -> None:
        """The example comes again once those that are left have come."""
        self._left.insert(0, example)

    def remove(self, example: Example) -> None:
        """The example, which has just been dealt, never comes again."""
        self._all.remove(example)


def _set_aside(decks: Sequence[_Deck], questions: Sequence[Example], length: Callable[[str], int]) -> None:
    """Remove the longest of the questions just dealt, and put the others back."""
    longest = max(questions, key=lambda question: length(question.prompt))
    for deck, question in zip(decks, questions, strict=True):
        if question is longest:
            deck.remove(question)
        else:
            deck.put_back(question)


def _draw_shots(
    worked: Sequence[Sequence[Example]], shots: int, random: np.random.RandomState
) -> list[tuple[Example, ...]]:
    """`shots` worked examples, each one train example a task; no example is in two of them."""
    drawn = [[examples[i] for i in random.choice(len(examples), shots, replace=False)] for examples in worked]
    return list(zip(*drawn, strict=True))


def _load_all(tasks_dir: Path, tasks: Sequence[str], split: str, tokenizer: Any, least: int) -> list[list[Example]]:
    """Each task's examples of different prompts, as text; of two answers to one prompt the first counts."""
    loaded, problems = [], []
    for task in tasks:
        examples: dict[str, Example] = {}
        for example in load_split(tasks_dir, task, split):
            examples.setdefault(example.key, example)
        if len(examples) < least:
            where = tasks_dir / task / f"{split}.jsonl"
            problems.append(f"{where}: expected {least} or more different prompts, found {len(examples)}")
        try:
            loaded.append([as_text(example, tokenizer) for example in examples.values()])
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return loaded


def _check(
    tasks: Sequence[str],
    *,
    seed: int,
    count: int,
    shots: int,
    max_tokens: int | None,
    count_tokens: Callable[[str], int] | None,
) -> None:
    problems = []
    if not tasks or len(set(tasks)) < len(tasks):
        problems.append(f"tasks: expected one or more, each once, found {', '.join(tasks) or 'none'}")
    if paths := [task for task in tasks if Path(task).name != task]:
        problems.append(f"tasks: expected names of folders in TASKS, found {', '.join(map(repr, paths))}")
    for name, value, least in (("seed", seed, 0), ("count", count, 1), ("shots", shots, 0)):
        if value < least:
            problems.append(f"{name}: expected {least} or more, found {value}")
    if seed >= 2**32:
        problems.append(f"seed: expected less than 2**32, found {seed}")
    if max_tokens is not None and max_tokens < 1:
        problems.append(f"max_tokens: expected room for a prompt beside its response, found {max_tokens}")
    if (max_tokens is None) != (count_tokens is None):
        problems.append("max_tokens: expected with count_tokens, the tokenizer's length of a text, found only one")
    if problems:
        raise InputError(problems)
