"""`meteora evaluate`: systems on tasks and composite problems, a record a problem, a table and pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from meteora_jax.cli.comparison import (
    Comparison,
    check_lengths,
    fingerprint,
    fitting,
    load_systems,
    named_problems,
)
from meteora_jax.cli.devices import is_first_process, make_replica_mesh
from meteora_jax.cli.report import check_counts, default_dtype, print_tables, progress_bar, status, write_json
from meteora_jax.config import InputError
from meteora_jax.evaluation import runner
from meteora_jax.evaluation.composite import (
    COMPOSITES,
    default_path,
    generate_composites,
    longest_prompt,
    read_composites,
    tasks_of,
    template_mark,
)
from meteora_jax.evaluation.conversations import ROWS, load_conversations
from meteora_jax.evaluation.dealing import exchange
from meteora_jax.evaluation.problems import Problem, load_composites, longest_response, with_earlier
from meteora_jax.evaluation.report import write_report
from meteora_jax.evaluation.systems import Model, System, check_routes, routing_kind, skipped
from meteora_jax.evaluation.wordings import WORDINGS, Wording
from meteora_jax.io.files import refuse_unwritable
from meteora_jax.retriever.index import ENCODER
from meteora_jax.retriever.ranking import FILE as RANKING
from meteora_jax.routing import RoutingTrace, adapter_share, null_share
from meteora_jax.text import tokenizer_digest


@dataclass(frozen=True)
class Evaluate(Comparison):
    """Score systems on tasks and on composite problems; a run that was killed goes on where it was.

    --out gets records.jsonl, table.md, table.json, bars.png, radar.png; with --index k.png (accuracy against k),
    similarity.png and similarity.html (of all adapters, by cluster). Where --only has LoraRetriever's queries, table.md
    and the pictures show LoraRetriever's metrics; table.json has MeteoRA's as well. With --composite no task is asked
    unless --only names it.
    """

    composite: str | None = None
    """Composite problems, separated by commas: 3, 5, 10 for MeteoRA's or tasks joined by +, drawn into TASKS if they
    are not there; a folder of TASKS that `meteora compose` wrote; or .jsonl files. A response has at most n times
    --max-new-tokens. conversations: turns of other tasks each, of the bank's (conversations=a+b+c: of these),
    after the right earlier answers; own-conversations: the same turns after the system's own earlier answers;
    unnumbered: two tasks in one sentence, of the same tasks. lettered=3 and reversed=3 (or of tasks joined by +): the
    same layout with other answer lines."""
    metric: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """TASK=METRIC, another than task.json's, MeteoRA's of that task or what fits its responses (exact if they are
    short, else rougeL): exact, contains, choice (the label that the answer says first), number (the last one), bleu,
    rouge, rougeL, regex:PATTERN (what it finds, or its group, is the same) or python:MODULE.FUNCTION (of answer and
    response, from 0 to 1). May be given several times; answers that are there are scored again."""


def response_routing(trace: RoutingTrace) -> dict[str, float]:
    """Each adapter's share of the response's tokens, rounded, less than 1 together where gates chose none of them;
    empty where nothing routed any (a response of one token that was never read back, or of none)."""
    shares = np.sum(adapter_share(trace)[trace.prompt_length :], axis=0)
    shares /= max(float(shares.sum() + null_share(trace)[trace.prompt_length :].sum()), 1e-9)
    named = zip(trace.adapter_names, shares.tolist(), strict=True)
    return {name: round(share, 4) for name, share in named if share >= 5e-5}


def answering(
    systems: Sequence[System], problems: Sequence[Problem], leave: Collection[tuple[str, str]], command: Evaluate
) -> dict[str, runner.Answer]:
    """Each system as the runner calls it. Systems of one model that choose alike share an engine's batches and its
    compiled programs, unless adapters change the embedding or the head: a batch with a choice by token leaves those
    out."""
    groups: dict[Any, list[System]] = {}
    for s in systems:
        alone = s.model.bank is not None and s.model.bank.vocab_adapter_names
        own = next((p for p in problems if (s.name, p.task) not in leave), None)
        kind = (s.name,) if alone or own is None else routing_kind(s, own)
        groups.setdefault((id(s.model), kind), []).append(s)
    return {s.name: answer for own in groups.values() for answer in [_answer(own, command)] for s in own}


def _answer(systems: Sequence[System], command: Evaluate) -> runner.Answer:
    """Systems of one model, asked together."""
    routes, model = {s.name: s.route for s in systems}, systems[0].model

    def answer(asked: Sequence[tuple[str, Problem]]) -> Iterator[tuple[int, dict[str, Any]]]:
        # a turn that a system's own answers made too long is not asked: it has no answer, and the run goes on
        fits = [not p.earlier or _fits(model, p, command.max_new_tokens) for _, p in asked]
        for place in (i for i, does in enumerate(fits) if not does):
            yield place, {"answer": "", "tokens": 0, "finish_reason": "context"}
        places = [i for i, does in enumerate(fits) if does]
        if not places:
            return
        problems = [asked[i][1] for i in places]
        completions = model.completions(
            [p.asked for p in problems],
            [routes[system](p) for system, p in (asked[i] for i in places)],
            max_new_tokens=[p.new_tokens(command.max_new_tokens) for p in problems],
            stop=[p.stop for p in problems],
            routing="response",
        )
        for place, c in completions:
            record: dict[str, Any] = {"answer": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            if c.routing is not None:
                record["routing"] = response_routing(c.routing)
                if c.routing.retrieved:
                    record["retrieved"] = {name: round(similarity, 4) for name, similarity in c.routing.retrieved}
            yield places[place], record

    return answer


def _fits(model: Model, problem: Problem, new_tokens: int) -> bool:
    most = longest_prompt(model.config, problem.new_tokens(new_tokens))
    return most is None or len(model.encode(problem.asked)) <= most


# What is asked


def gather_problems(command: Evaluate, model: Model) -> list[Problem]:
    """The problems of all rows: tasks, queries, composites.

    Raises:
        InputError: a file was refused, there is nothing to ask, or two rows have one name.
    """
    only = command.only if command.only is not None else "all" if command.composite is None else ""
    metrics = named_metrics(command.metric)
    rows, problems = named_problems(command, model, only, metrics)
    for what in filter(None, (command.composite or "").split(",")):
        if what.partition("=")[0] in ROWS:
            rows.append(what.partition("=")[0])
            problems += conversations(command, model, what, metrics)
            continue
        row, path = composite_file(command, model, what)
        rows.append(row)
        problems += load_composites(path, row, command.limit, command.tasks, metrics, command.max_new_tokens)
    asked = {task for p in problems if not p.metric for task in p.own_tasks}
    if strange := [task for task in metrics if task not in asked]:
        raise InputError(f"--metric: expected tasks that are asked, found {', '.join(strange)}")
    return fitting(command, model, rows, problems)


def named_metrics(entries: Sequence[str]) -> dict[str, str]:
    """The metrics of `--metric` by their tasks.

    Raises:
        InputError: an entry that is half of TASK=METRIC, or a task with two.
    """
    pairs = [(entry, *entry.partition("=")[::2]) for entry in entries]
    wrong = [f"--metric: expected TASK=METRIC, found {entry!r}" for entry, *pair in pairs if not all(pair)]
    tasks = [task for _, task, _ in pairs]
    wrong += [f"--metric: expected one of {t}, found {tasks.count(t)}" for t in {*tasks} if tasks.count(t) > 1]
    if wrong:
        raise InputError(wrong)
    return {task: metric for _, task, metric in pairs}


def conversations(command: Evaluate, model: Model, what: str, metrics: dict[str, str]) -> list[Problem]:
    """The problems of an entry of `--composite` that is drawn anew each time: the same of the same TASKS."""
    row, equals, tasks = what.partition("=")
    if command.split != "test":
        raise InputError(f"--split: expected test with --composite {what}, found {command.split}")
    if equals and len(tasks.split("+")) < 2:
        raise InputError(f"--composite: expected {row}=TASK+TASK, found {what!r}")
    if not equals and len(model.adapter_names) < 2:
        raise InputError(f"--composite: expected {row}=TASK+TASK with fewer than two adapters, found {what!r}")
    of = tasks.split("+") if equals else model.adapter_names
    return load_conversations(
        command.tasks, row, of, command.limit, command.max_new_tokens, metrics, longest_prompt(model.config, 0),
        lambda messages: len(model.encode(messages)),
    )  # fmt: skip


def composite_file(command: Evaluate, model: Model, what: str) -> tuple[str, Path]:
    """The row and the file of one entry of `--composite`; one that names tasks is drawn if TASKS does not have it."""
    if what.endswith(".jsonl"):
        path = Path(what)
        return path.parent.name if path.stem == "test" else path.stem, path
    if command.split != "test":
        raise InputError(f"--split: expected test with --composite {what}, found {command.split}")
    written = command.tasks / what / "test.jsonl"
    if what.startswith("composite_") and written.is_file():
        return what, written
    word, equals, named = what.partition("=")
    wordings: dict[str, Wording] = {w: w for w in WORDINGS}
    wording = wordings.get(word, WORDINGS[0]) if equals else WORDINGS[0]
    tasks = tasks_of(named if equals else what)
    if len(tasks) < 2 or (equals and word != wording):
        sizes = ", ".join(map(str, COMPOSITES))
        raise InputError(
            f"--composite: expected {sizes}, tasks joined by +, what meteora compose wrote below TASKS, or .jsonl "
            f"files, found {what!r}"
        )
    mark = template_mark(command.tasks, tasks, model.tokenizer)
    path = default_path(command.tasks, tasks, template=mark, wording=wording)
    if not path.is_file():
        limit = longest_prompt(model.config, longest_response(command.tasks, tasks, command.max_new_tokens))
        generate_composites(
            command.tasks, tasks, max_tokens=limit, count_tokens=counting(model) if limit else None,
            tokenizer=model.tokenizer, wording=wording,
        )  # fmt: skip
    found = read_composites(path)[0].tasks
    if found != tasks:
        raise InputError(f"{path}: tasks: expected {', '.join(tasks)}, found {', '.join(found)}")
    return path.parent.name, path


def counting(model: Model) -> Callable[[str], int]:
    """The length of a text in the model's tokens."""

    def count(text: str) -> int:
        return len(model.encode(text))

    return count


def files_read(command: Evaluate) -> dict[str, str | None]:
    """Fingerprints of what beside weights decides answers: the same weights under other names of adapters, gates with
    another temperature and another chat template give others."""
    named = {"base": (command.base, "config.json"), "bank": (command.bank, "bank.json")}
    named["gates"] = command.gates, "gates.json"
    found = {f"{key}/{file}": fingerprint(folder, file) for key, (folder, file) in named.items() if folder is not None}
    if command.index is not None and (command.index / ENCODER).is_dir():
        found[f"index/{ENCODER}"] = fingerprint(command.index / ENCODER)
    return {**found, "tokenizer": tokenizer_digest(command.base)}


def evaluate(command: Evaluate) -> None:
    """Runs `meteora evaluate`."""
    check_counts(
        max_new_tokens=command.max_new_tokens,
        limit=command.limit,
        max_prompt=command.max_prompt,
    )
    refuse_unwritable("--out", command.out, folder=True)
    mesh, shared_out = make_replica_mesh(command)
    dtype = default_dtype(None)
    with status.status(f"loading as {dtype}"):
        loaded = load_systems(command, mesh, dtype)
        model, systems = loaded.model, loaded.systems
        problems = gather_problems(command, model)
        asked = with_earlier(problems)
        check_routes(systems, asked)
        check_lengths(command, model, asked)
    settings: dict[str, Any] = {
        "base": fingerprint(command.base), "bank": fingerprint(command.bank), "gates": fingerprint(command.gates),
        "split": command.split, "max_new_tokens": command.max_new_tokens, "dtype": dtype,
        "system banks": loaded.banks, "index": fingerprint(command.index, "index.json"),
        "new_tokens": {p.asks or p.task: p.new_tokens(command.max_new_tokens) for p in asked},
        "files": files_read(command),
    }  # fmt: skip
    if command.index is not None and (command.index / RANKING).exists():  # another ranking gives other answers
        settings["ranking"] = fingerprint(command.index, RANKING)
    first = is_first_process()
    records = runner.Records(command.out, settings) if first else None
    leave = skipped(systems, asked)
    answers = answering(systems, asked, leave, command)
    others = exchange()
    if others is not None and shared_out:
        dealt = {id(answer): others.dealt(answer) for answer in answers.values()}
        answers = {name: dealt[id(answer)] for name, answer in answers.items()}
    with progress_bar("evaluate", shown=first) as progress:
        agree = list if others is None else others.as_the_first_says
        runner.run(asked, answers, records, progress, leave, agree)
    if others is not None:
        others.finish()
    if records:
        report = write_report(command.out, problems, systems, records.answers, leave, loaded.index)
        write_json(command.json, report.table)
        for remark in report.remarks:
            status.print(remark, highlight=False)
        print_tables(report.text)
