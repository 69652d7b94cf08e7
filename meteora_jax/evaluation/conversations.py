"""Conversations that change their task at every turn, and single messages that ask two tasks in one sentence.

Both are drawn from TASKS' test split, never from another, and from the small talk and system prompts below. The turns
before the one that is asked have the right answers, so that every turn is judged by itself, or those of the system that
is asked, as its users would see them. Both rows have the same turns, and small talk is answered as it was drawn.

A task's example stands in a conversation as the user's message: a prompt that is text without outer whitespace, of
messages the example's own; a system message of the task's own becomes the beginning of its first user message, as chat
templates take one at the beginning alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import ANSWER_SEPARATOR
from meteora_jax.evaluation.metrics import Metric, plain
from meteora_jax.evaluation.named_metrics import metric_for, whole_words
from meteora_jax.evaluation.problems import Problem, limited
from meteora_jax.evaluation.tasks import load_splits
from meteora_jax.evaluation.tasks.settings import read_settings
from meteora_jax.examples import ANSWERS, Example, turn_messages
from meteora_jax.prompts import Message, user_text

# the rows' names, and how a command asks for them
CONVERSATIONS, OWN_CONVERSATIONS, UNNUMBERED = "conversations", "own-conversations", "unnumbered"
ROWS = (CONVERSATIONS, OWN_CONVERSATIONS, UNNUMBERED)
COUNT = 100  # conversations, and messages of two tasks
SEED = 0
TURNS = (3, 6)  # the fewest and the most
_REDRAWN = 20  # times that a conversation beyond the context is drawn anew
_SYSTEM, _GREETING, _TALK = 0.5, 0.25, 0.5  # how often: a system prompt, talk before the first turn and between two

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer as briefly as you can.",
    "Answer every request in the form that it asks for.",
    "You help the staff of a small office with whatever they need.",
    "Today is a weekday. The user writes from a phone.",
    "Be polite, be exact, and do not explain yourself unless asked.",
)
GREETINGS = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Good morning, are you there?", "Good morning! Yes, I am here."),
    ("Hi, I have a few different things today.", "Sure, send them one after the other."),
)
SMALL_TALK = (
    ("Thanks!", "You are welcome."),
    ("Great, that was quick.", "Glad to hear it."),
    ("Thank you. Give me a second for the next one.", "Take your time."),
    ("OK, noted.", "Good. Is there anything else?"),
    ("Sorry, I was away for a moment.", "No problem, I am still here."),
    ("It is raining again over here.", "Then stay inside and dry."),
    ("You are better at this than I am.", "That is kind of you."),
    ("Now something completely different.", "Go ahead."),
    ("I need a coffee before we go on.", "Enjoy it!"),
    ("My colleague says hi.", "Hi back to your colleague!"),
)

Fits = Callable[[Sequence[Message]], bool]
T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One turn: the task that it asks of, the messages up to its question, and the right response.

    conversation, place: which conversation, from 0, and which turn of it, from 1.
    """

    task: str
    messages: tuple[Message, ...]
    response: str
    conversation: int
    place: int


def draw_conversations(
    examples: Mapping[str, Sequence[Example]], count: int = COUNT, seed: int = SEED, fits: Fits | None = None
) -> list[Turn]:
    """The turns of `count` conversations of three to six, each of another task than the one before; a task comes again
    in a conversation only after all others. A task repeats an example after all others of its own.

    Args:
        examples: by task. fits: whether messages leave room in the context for a response; a conversation whose last
            turn does not is drawn anew.

    Raises:
        InputError: fewer than two tasks, or conversations that do not fit.
    """
    random, decks = _begin(examples, seed)
    turns: list[Turn] = []
    for number in range(count):
        for _ in range(_REDRAWN):
            drawn = list(_conversation(decks, random, number))
            if fits is None or fits(drawn[-1].messages):
                turns += drawn
                break
        else:
            raise InputError(
                f"conversations: expected tasks whose conversations leave room for a response in the context, found "
                f"{_REDRAWN} in turn that do not"
            )
    return turns


def draw_unnumbered(
    examples: Mapping[str, Sequence[Example]], count: int = COUNT, seed: int = SEED
) -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """Messages that ask two tasks in one sentence, "..., then ...": (text, the tasks, their right responses)."""
    random, decks = _begin(examples, seed)
    found = []
    for _ in range(count):
        first, second = (list(decks)[i] for i in random.permutation(len(decks))[:2])
        asked = [next(decks[task]) for task in (first, second)]
        texts = [user_text(turn_messages(example)) for example in asked]
        text = f"{texts[0].rstrip().rstrip('.')}, then {texts[1]}"
        found.append((text, (first, second), (asked[0].response, asked[1].response)))
    return found


def _begin(
    examples: Mapping[str, Sequence[Example]], seed: int
) -> tuple[np.random.Generator, dict[str, Iterator[Example]]]:
    if len(examples) < 2:
        raise InputError(f"conversations: expected two tasks or more, found {', '.join(examples) or 'none'}")
    random = np.random.default_rng(seed)
    return random, {task: _dealt(own, random) for task, own in examples.items()}


def _dealt(items: Sequence[T], random: np.random.Generator) -> Iterator[T]:
    """Items in random order without end; none comes twice before all have come."""
    while True:
        yield from (items[i] for i in random.permutation(len(items)))


def _order(tasks: Sequence[str], random: np.random.Generator) -> Iterator[str]:
    """Tasks in random order without end, as `_dealt`, none twice in a row."""
    before = None
    while True:
        order = [tasks[int(i)] for i in random.permutation(len(tasks))]
        if order[0] == before:
            order = order[1:] + order[:1]
        yield from order
        before = order[-1]


def _conversation(decks: Mapping[str, Iterator[Example]], random: np.random.Generator, number: int) -> Iterator[Turn]:
    messages: list[Message] = []
    if random.random() < _SYSTEM:
        messages.append({"role": "system", "content": SYSTEM_PROMPTS[random.integers(len(SYSTEM_PROMPTS))]})
    size = int(random.integers(TURNS[0], TURNS[1] + 1))
    for place, task in enumerate(itertools.islice(_order(list(decks), random), size), start=1):
        often, talks = (_GREETING, GREETINGS) if place == 1 else (_TALK, SMALL_TALK)
        if random.random() < often:
            said, answered = talks[random.integers(len(talks))]
            messages += [{"role": "user", "content": said}, {"role": ANSWERS, "content": answered}]
        example = next(decks[task])
        messages += turn_messages(example)
        yield Turn(task, tuple(messages), example.response, number, place)
        messages.append({"role": ANSWERS, "content": example.response})


# As problems of an evaluation


def load_conversations(
    tasks_dir: Path,
    what: str,
    tasks: Sequence[str],
    limit: int | None,
    new_tokens: int,
    named: Mapping[str, str] | None = None,
    max_tokens: int | None = None,
    count_tokens: Callable[[Sequence[Message]], int] = len,
) -> list[Problem]:
    """The problems of the row `what`: the turns of CONVERSATIONS, each scored by its own task's metric, or UNNUMBERED,
    whose answers are right where they say the response.

    OWN_CONVERSATIONS are the same turns with all `earlier` ones, which are asked as well but are no problems of the row
    where `limit` left them out. Conversations are drawn, and turns chosen, with the right answers, so that both rows
    have the same: a turn that a system's own answers made too long for the context gets an empty answer.

    Args:
        limit: at most so many turns or messages. new_tokens: of an answer whose task does not say how many it takes.
        named: metrics by task. max_tokens: of a prompt by `count_tokens` and the longest response; None: any.

    Raises:
        InputError: test files and metrics that `load_problems` refuses; fewer than two tasks.
    """
    if len(tasks) < 2:
        raise InputError(f"conversations: expected two tasks or more, found {', '.join(tasks) or 'none'}")
    examples = load_splits(tasks_dir, tasks, "test")
    wrong: list[str] = []
    metrics: dict[str, Metric] = {}
    own_tokens: dict[str, int | None] = {}
    for task, own in examples.items():
        try:
            own_tokens[task] = read_settings(tasks_dir, task).max_new_tokens
            metrics[task] = metric_for(tasks_dir, task, own, (named or {}).get(task))
        except InputError as error:
            wrong += error.problems
    if wrong:
        raise InputError(wrong)
    longest = sorted(own or new_tokens for own in own_tokens.values())
    if what == UNNUMBERED:
        problems = [
            Problem(
                f"{what}/{i}", what, text, ANSWER_SEPARATOR.join(answers), both, answers, numbered=False,
                messages=({"role": "user", "content": text},), metrics=(SAYS, SAYS),
                max_new_tokens=sum(longest[-2:]),
            )
            for i, (text, both, answers) in enumerate(draw_unnumbered(examples))
        ]  # fmt: skip
        return limited(problems, limit)
    most = math.inf if max_tokens is None else max_tokens - longest[-1]

    def fits(messages: Sequence[Message]) -> bool:
        return max_tokens is None or count_tokens(messages) <= most

    problems: list[Problem] = []
    for t in draw_conversations(examples, fits=fits):
        before = t.place - 1 if what == OWN_CONVERSATIONS else 0
        problems.append(
            Problem(
                f"{what}/{t.conversation}/{t.place}", what, user_text(t.messages), t.response, asks=t.task,
                turn=t.place, messages=t.messages, metrics=(metrics[t.task],), max_new_tokens=own_tokens[t.task],
                earlier=tuple(problems[len(problems) - before :]),
            )
        )  # fmt: skip
    return limited(problems, limit)


def says(answer: str, response: str) -> bool:
    """Whether an answer says the response somewhere, as whole words."""
    words = plain(response)
    return words != "" and whole_words(words).search(plain(answer)) is not None


SAYS = Metric(("accuracy",), says)
