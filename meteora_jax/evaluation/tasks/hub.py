"""The six tasks among MeteoRA's 28 that are not from BIG-bench, from the Hugging Face hub through `datasets`.

Data sets, configurations, fields and prompts are those of MeteoRA's presets (`data/dataset_presets.py` and
`data/dataset_utils.py` in NJUDeepEngine/meteora; two data sets have since moved to their owners' names). Where the
presets and the release's data differ, the data decides: every alpaca prompt of composite-10 has a line break after
the instruction, with an input or without. The 22 others come from BIG-bench's task files alone (`bigbench`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example, TaskCounts, input_digest, split_of, write_task
from meteora_jax.text import check_text

# (data set, configuration) -> its own splits, each a number of rows; `download` is one.
Rows = Mapping[str, Iterable[Mapping[str, Any]]]
ReadRows = Callable[[str, str], Rows]


@dataclass(frozen=True)
class HubTask:
    """Where a task's rows are, and which of their fields make a problem."""

    dataset: str
    config: str
    inputs: tuple[str, ...]
    """The fields that the prompt is made from, a line each; together they are the example's own input."""
    answer: str
    request: str = ""
    """What the prompt asks for, in the line before the inputs."""


HUB_TASKS = {
    "alpaca": HubTask("tatsu-lab/alpaca", "default", ("instruction", "input"), "output"),
    "cnn_dailymail": HubTask(
        "abisee/cnn_dailymail", "3.0.0", ("article",), "highlights", "Generate a summarization of the news article.\n"
    ),
    "gsm8k": HubTask("openai/gsm8k", "main", ("question",), "answer"),
    "news_commentary_de": HubTask(
        "Helsinki-NLP/news_commentary", "de-en", ("de",), "en", "Den folgenden Text ins Englische übersetzen.\n"
    ),
    "news_commentary_es": HubTask(
        "Helsinki-NLP/news_commentary", "en-es", ("es",), "en", "Traducir las siguientes frases al inglés.\n"
    ),
    "news_commentary_it": HubTask(
        "Helsinki-NLP/news_commentary", "en-it", ("it",), "en", "Tradurre le seguenti frasi in inglese.\n"
    ),
}


def prepare(
    dest: Path,
    tasks: Sequence[str] = tuple(HUB_TASKS),
    pinned_to_test: Mapping[str, frozenset[str]] | None = None,
    read_rows: ReadRows | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[TaskCounts]:
    """Write `dest/<task>/{train,test,holdout}.jsonl` for each of the six tasks.

    `pinned_to_test` holds input digests by task (`read_test_inputs`); `read_rows` is `download` unless given;
    `progress` is called with (task, done, total). Raises `InputError` when a task is none of the six, its data set
    is out of reach, or a row is malformed.
    """
    unknown = sorted(set(tasks) - set(HUB_TASKS))
    if unknown:
        raise InputError(f"tasks: expected tasks of the hub ({', '.join(HUB_TASKS)}), found {', '.join(unknown)}")
    read_rows = read_rows or download
    listed = pinned_to_test or {}
    counts = []
    for done, task in enumerate(tasks):
        if progress:
            progress(task, done, len(tasks))
        source = HUB_TASKS[task]
        rows = read_rows(source.dataset, source.config)
        counts.append(_prepare_task(task, rows, dest, listed.get(task, frozenset())))
    if progress:
        progress("", len(tasks), len(tasks))
    return counts


def _prepare_task(task: str, rows: Rows, dest: Path, listed: frozenset[str]) -> TaskCounts:
    examples = list(read_examples(task, rows))
    kept = [(own_input, example) for _, own_input, example in examples if own_input.strip() and example.response]
    own_test = {input_digest(own_input) for split, own_input, _ in examples if split == "test"}
    counts = write_task(dest, task, kept, listed, split_beside(own_test) if "test" in rows else split_of)
    return replace(counts, blank=len(examples) - len(kept))


def split_beside(own_test: Collection[str]) -> Callable[[str, Collection[str]], str]:
    """The split rule of a data set with a test split of its own, whose inputs have the digests `own_test`.

    Its test split is ours, so that scores compare with published ones and nobody trains on it; of all other rows,
    those that `split_of` calls holdout are holdout, and the rest train.
    """

    def split(text: str, pinned_to_test: Collection[str] = ()) -> str:
        digest = input_digest(text)
        if digest in own_test or digest in pinned_to_test:
            return "test"
        return "holdout" if split_of(text) == "holdout" else "train"

    return split


def read_examples(task: str, rows: Rows) -> Iterator[tuple[str, str, Example]]:
    """(the data set's own split, own input, example) of every row, blank ones included."""
    source = HUB_TASKS[task]
    for split, members in rows.items():
        for number, row in enumerate(members):
            # Translations stand one level down: {"id": ..., "translation": {"de": ..., "en": ...}}.
            fields = row.get("translation", row)
            _check_fields(source, fields, f"{source.dataset} ({source.config}), {split}, row {number}")
            own_input = "\n".join(fields[name] for name in source.inputs)
            prompt = f"[INST] {source.request}{own_input} [/INST]\n"
            yield split, own_input, Example(prompt, fields[source.answer].strip())


def _check_fields(source: HubTask, fields: Any, where: str) -> None:
    if not isinstance(fields, Mapping):
        raise InputError(f"{where}: translation: expected an object, found {type(fields).__name__}")
    problems = []
    for name in (*source.inputs, source.answer):
        if name not in fields:
            problems.append(f"{where}: {name}: expected a string, found only the fields {sorted(fields)}")
        elif not isinstance(fields[name], str):
            problems.append(f"{where}: {name}: expected a string, found {type(fields[name]).__name__}")
        else:
            check_text(fields[name], f"{where}: {name}")
    if problems:
        raise InputError(problems)


def download(dataset: str, config: str) -> Rows:
    """The splits of a data set of the hub, downloaded once and then read from the cache of `datasets`."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{dataset}: expected the package datasets to read it with, found none (pip install 'meteora-jax[eval]')"
        ) from None
    try:
        # Its rows are mappings, as long as nobody sets another format.
        return {str(split): cast(Any, rows) for split, rows in datasets.load_dataset(dataset, config).items()}
    # datasets, huggingface_hub and their HTTP client each raise their own, which share no narrower class.
    except Exception as error:
        found = str(error).strip() or type(error).__name__
        raise InputError(f"{dataset} ({config}): expected the Hugging Face hub to have it, found: {found}") from error
