"""`meteora evaluate`: systems on tasks and composite problems, a record a problem, a table and pictures."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meteora_jax.cli.devices import Devices, as_the_first_says, is_first_process, make_devices_mesh
from meteora_jax.cli.report import console, default_dtype, print_tables, progress_bar, status, write_json
from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import COMPOSITES, COUNT, SEED, SHOTS, generate_composites
from meteora_jax.evaluation.problems import Problem, load_composites, load_problems, load_queries
from meteora_jax.evaluation.systems import Given, System, check_routes, make_system, skipped, with_unseen
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.retriever.index import Index
from meteora_jax.routing import RoutingTrace, adapter_share

_NAMED = 5  # problems that a message about many names


@dataclass(frozen=True)
class Evaluate(Devices):
    """Score systems on tasks and on composite problems; a run that was killed goes on where it was."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder: TASKS/<task>/<split>.jsonl."""
    out: Path
    """Folder of the run: records.jsonl, table.md, table.json, bars.png, radar.png; with --index k.png (accuracy against
    k), similarity.png and similarity.html (of all adapters, by cluster); with --throughput throughput.json and .png."""
    bank: Path | None = None
    """BANK folder."""
    gates: Path | None = None
    """GATES folder."""
    systems: str = "base,oracle,gates-top1,gates-top2"
    """Separated by commas: base, oracle (the adapter named like the task; not for composites), gates-topN, with --index
    retrieval-selection, -mixture, -fusion and gates-within-topN, an adapter's name, or a name of --system-bank.
    retrieval-mixture-k5 retrieves five; gates-top2-unseen has no adapter of a problem's own tasks."""
    system_bank: tuple[str, ...] = ()
    """NAME=FOLDER: a system with a bank of its own, as lora-f=BANK; a BANK folder of one adapter, or a PEFT folder."""
    index: Path | None = None
    """INDEX folder, for the systems that retrieve."""
    retrieve: int = 3
    """Adapters that the index finds for a problem, where the system's name does not say."""
    unseen: bool = False
    """Ask each system that chooses twice: as it is, and with the adapters of a problem's own tasks hidden from it, as
    if they were new (NAME-unseen)."""
    only: str | None = None
    """Tasks, separated by commas, or "all" for one an adapter of the bank; all by default, none beside --composite or
    --queries."""
    composite: str | None = None
    """Composite problems, separated by commas: 3, 5, 10 for MeteoRA's or tasks joined by +, written below TASKS if they
    are not there, and .jsonl files."""
    composite_shots: int = SHOTS
    """Worked examples in a composite prompt; 0 is zero-shot."""
    composite_seed: int = SEED
    """Of what composite problems draw."""
    composite_count: int = COUNT
    """Composite problems to write for each n."""
    composite_temperature: float | None = None
    """Of the gates on composite problems; by default 15, 20, 30 for n = 3, 5, 10."""
    composite_max_new_tokens: int | None = None
    """Longest response to a composite problem; by default n times --max-new-tokens."""
    queries: Path | None = None
    """LoraRetriever's queries, a JSON list of inputs, targets, task and metric; needs --scoring loraretriever."""
    scoring: Literal["meteora", "loraretriever"] = "meteora"
    """What table.md and the pictures show; table.json has both."""
    split: Literal["train", "test", "holdout"] = "test"
    """Holdout is scored once, for a release."""
    limit: int | None = None
    """At most so many problems a task, chosen by their hash."""
    max_prompt: int | None = None
    """Leave out problems of one task whose prompt has more tokens, of those that --limit chose; the table counts those
    that are left."""
    max_new_tokens: int = 64
    """Longest answer."""
    batch_size: int = 16
    """Problems a batch."""
    throughput: str | None = None
    """Batch sizes, separated by commas, as 1,8,32: instead of scoring, time the systems on the problems, side by side,
    --max-new-tokens each; figures are also given over the first system's."""
    repeats: int = 5
    """Measurements of each system and batch size of --throughput; medians count."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    json: Path | None = None
    """Write the table here too."""


def new_tokens(command: Evaluate, parts: int) -> int:
    """The longest response to a problem of so many parts."""
    if parts == 1:
        return command.max_new_tokens
    return command.composite_max_new_tokens or parts * command.max_new_tokens


def response_routing(trace: RoutingTrace) -> dict[str, float]:
    """Each adapter's share of the response's tokens, rounded; empty where nothing routed any (a response of one
    token that was never read back, or of none)."""
    shares = np.sum(adapter_share(trace)[trace.prompt_length :], axis=0)
    shares /= max(float(shares.sum()), 1e-9)
    named = zip(trace.adapter_names, shares.tolist(), strict=True)
    return {name: round(share, 4) for name, share in named if share >= 5e-5}


def answering(system: System, command: Evaluate) -> Callable[[Sequence[Problem]], list[dict[str, Any]]]:
    """A system as the runner calls it: problems of as many parts each -> answers, always in batches of one size."""

    def answer(problems: Sequence[Problem]) -> list[dict[str, Any]]:
        padded = [*problems, *[problems[-1]] * (command.batch_size - len(problems))]
        completions = system.model.generate(
            [p.prompt for p in padded],
            [system.route(p) for p in padded],
            max_new_tokens=new_tokens(command, problems[0].parts),
            stop=problems[0].stop,
        )
        said = []
        for c in completions[: len(problems)]:
            record: dict[str, Any] = {"answer": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            if c.routing is not None:
                record["routing"] = response_routing(c.routing)
                if c.routing.retrieved:
                    record["retrieved"] = {name: round(similarity, 4) for name, similarity in c.routing.retrieved}
            said.append(record)
        return said

    return answer


# What is asked


def gather_problems(command: Evaluate, model: Any) -> list[Problem]:
    """The problems of all rows: tasks, composites, queries.

    Raises:
        InputError: a file was refused, there is nothing to ask, or two rows have one name.
    """
    tasks = []
    if command.only not in (None, "all"):
        tasks = [t for t in command.only.split(",") if t]
    elif command.only == "all" or (command.composite is None and command.queries is None):
        tasks = list(model.adapter_names)
    problems = load_problems(command.tasks, tasks, command.split, command.limit)
    rows = list(tasks)
    for what in filter(None, (command.composite or "").split(",")):
        path = composite_file(command, model, what)
        row = path.stem if what.endswith(".jsonl") else path.parent.name
        rows.append(row)
        problems += load_composites(path, row, command.limit)
    if command.queries is not None:
        if command.scoring != "loraretriever":
            raise InputError(f"--scoring: expected loraretriever beside --queries, found {command.scoring}")
        queries = load_queries(command.queries, command.limit)
        rows += dict.fromkeys(p.task for p in queries)
        problems += queries
    if not rows:
        raise InputError("--only, --composite: expected at least one task or composite, found none")
    if twice := sorted({row for row in rows if rows.count(row) > 1}):
        raise InputError(f"--only, --composite, --queries: expected each name once, found twice: {', '.join(twice)}")
    if command.max_prompt is None:
        return problems
    short = [p for p in problems if p.tasks or len(model.encode(p.prompt)) <= command.max_prompt]
    if gone := set(rows) - {p.task for p in short}:
        raise InputError(f"--max-prompt: expected room for a problem of every row, found none for {', '.join(gone)}")
    if left := len(problems) - len(short):
        status.print(f"{left} problems of more than {command.max_prompt} tokens left out", highlight=False)
    return short


def composite_file(command: Evaluate, model: Any, what: str) -> Path:
    """The file of one entry of `--composite`; one that names tasks is drawn from TASKS, to fit the model's context."""
    if what.endswith(".jsonl"):
        return Path(what)
    tasks = {str(n): names for n, names in COMPOSITES.items()}.get(what, tuple(what.split("+")))
    if len(tasks) < 2:
        sizes = ", ".join(map(str, COMPOSITES))
        raise InputError(f"--composite: expected {sizes}, tasks joined by +, or .jsonl files, found {what!r}")
    if command.split != "test":
        raise InputError(f"--split: expected test beside --composite {what}, found {command.split}")
    limit, scaling = model.config.max_position_embeddings - new_tokens(command, len(tasks)), model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        fits: dict[str, Any] = {}  # such a model's context grows
    else:
        fits = {"max_tokens": limit, "count_tokens": lambda text: len(model.encode(text))}
    return generate_composites(
        command.tasks, tasks, seed=command.composite_seed, count=command.composite_count,
        shots=command.composite_shots, **fits,
    )  # fmt: skip


def check_lengths(command: Evaluate, model: Any, problems: Sequence[Problem]) -> None:
    """Refuses problems that are beyond the context together with their responses, before anything runs."""
    from meteora_jax.generation import check_prompts

    wrong = []
    for p in problems:
        try:
            check_prompts([model.encode(p.prompt)], model.config, new_tokens(command, p.parts))
        except InputError as e:
            wrong.append(f"{p.id}: {str(e).removeprefix('prompt 0: ')}")
    if wrong:
        more = [f"{len(wrong) - _NAMED} more such problems"] if len(wrong) > _NAMED else []
        raise InputError(wrong[:_NAMED] + more)


# Who answers


def gather_systems(command: Evaluate, model: Any, dtype: str) -> tuple[list[System], dict[str, str]]:
    """The systems in the order asked for, those of `--system-bank` last unless `--systems` names them, and the
    fingerprints of their banks."""
    names, folders = [s for s in command.systems.split(",") if s], {}
    for entry in command.system_bank:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or name in folders or name in model.adapter_names:
            raise InputError(f"--system-bank: expected NAME=FOLDER, each name once and no adapter's, found {entry!r}")
        folders[name] = Path(folder)
    names = list(dict.fromkeys([*names, *folders]))
    names = with_unseen(names) if command.unseen else names
    if not names:
        raise InputError("--systems: expected at least one system, found none")
    from meteora_jax.model.llama import base_arrays

    arrays = base_arrays(model.graph, model.weights) if folders else {}
    loaded = {name: other_bank(model, arrays, name, folder, command.base, dtype) for name, folder in folders.items()}
    given = Given(
        model, {name: other for name, (other, _) in loaded.items()}, command.composite_temperature,
        Index.load(command.index) if command.index else None, command.retrieve,
    )  # fmt: skip
    return [make_system(name, given) for name in names], {name: mark for name, (_, mark) in loaded.items()}


def other_bank(model: Any, arrays: Any, name: str, folder: Path, base: Path, dtype: str) -> tuple[Any, str]:
    """The model with the one adapter of another bank or PEFT folder instead of its own, and the bank's fingerprint.

    arrays: the base's, of `base_arrays`. All other banks share them, so that each costs its own size and no more.
    """
    import converters
    from meteora_jax.io.bank import load_bank
    from meteora_jax.io.base import read_origin
    from meteora_jax.io.model_state import assemble

    with tempfile.TemporaryDirectory() as temporary:
        bank_folder = folder
        if (folder / "adapter_config.json").is_file():
            bank_folder = Path(temporary) / "bank"
            converters.import_adapters(bank_folder, base, {name: folder})
        bank = load_bank(bank_folder, model.config, np.dtype(dtype), read_origin(base))
        mark = fingerprint(bank_folder)
    if len(bank.names) != 1:
        raise InputError(f"{folder}: expected a bank of one adapter, found {', '.join(bank.names)}")
    graph, state = assemble(model.config, arrays, bank, None, np.dtype(dtype), model.mesh)
    return dataclasses.replace(model, bank=bank.config, gates=None, graph=graph, weights=state), str(mark)


def fingerprint(folder: Path | None, file: str = WEIGHTS) -> str | None:
    """SHA-256 of a folder's weights: a run resumed with others would mix two models' answers."""
    from converters.folders import sha256

    return None if folder is None else sha256(folder / file)


def evaluate(command: Evaluate) -> None:
    """Runs `meteora evaluate`."""
    from meteora_jax.api import load
    from meteora_jax.evaluation import runner

    counts = ("max_new_tokens", "batch_size", "limit", "max_prompt", "composite_max_new_tokens", "retrieve", "repeats")
    for name in counts:
        if (value := getattr(command, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
    sizes = read_sizes(command)
    mesh = make_devices_mesh(command)
    dtype = default_dtype(command.dtype)
    with status.status(f"loading as {dtype}"):
        model = load(command.base, command.bank, command.gates, mesh, dtype)
        systems, banks = gather_systems(command, model, dtype)
        problems = gather_problems(command, model)
        check_routes(systems, problems)
        check_lengths(command, model, problems)
    if sizes:
        time_systems(command, systems, problems, sizes)
        return
    settings = {
        "base": fingerprint(command.base), "bank": fingerprint(command.bank), "gates": fingerprint(command.gates),
        "split": command.split, "max_new_tokens": command.max_new_tokens, "dtype": dtype, "system banks": banks,
        "composite_temperature": command.composite_temperature,
        "composite_max_new_tokens": command.composite_max_new_tokens,
        "index": fingerprint(command.index, "index.json"), "retrieve": command.retrieve,
    }  # fmt: skip
    first = is_first_process()
    records = runner.Records(command.out, settings) if first else None
    leave = skipped(systems, problems)
    answers = {s.name: answering(s, command) for s in systems}
    with progress_bar("evaluate") if first else nullcontext(lambda *_: None) as progress:
        runner.run(problems, answers, records, command.batch_size, progress, leave, as_the_first_says)
    if records:
        report(command, problems, systems, records.answers, leave)


def report(command: Evaluate, problems: Sequence[Problem], systems: Sequence[System], answers: Any, leave: Any) -> None:
    """Writes the run's table and pictures, and prints the table."""
    from meteora_jax.evaluation import charts
    from meteora_jax.evaluation.table import markdown, retrieval_markdown, tabulate

    names = [s.name for s in systems]
    table = tabulate(problems, names, answers, leave)
    text = markdown(table, names, command.scoring)
    if command.index is not None:
        table["retrieval"] = retrieval = report_retrieval(command, problems, systems, table)
        text += "\n" + retrieval_markdown(retrieval) if retrieval else ""
    (command.out / "table.md").write_text(text, encoding="utf-8")
    write_json(command.out / "table.json", table)
    write_json(command.json, table)
    charts.write_bars(table, names, command.out / "bars.png", command.scoring)
    charts.write_radar(table, names, command.out / "radar.png", command.scoring)
    print_tables(text)


def report_retrieval(
    command: Evaluate, problems: Sequence[Problem], systems: Sequence[System], table: Any
) -> dict[str, Any]:
    """What the index finds for the problems whose own adapter it knows, beside what was answered; draws it.

    Returns:
        as `retriever.evaluation.judge`; nothing if no problem's own adapter is in the index.
    """
    from meteora_jax.evaluation import charts
    from meteora_jax.evaluation.table import mean_shares
    from meteora_jax.retriever.evaluation import KS, MOST_DRAWN, Query, judge, write_heat_map

    assert command.index is not None
    index = Index.load(command.index)
    queries = [Query(p.prompt, p.task, p.cluster) for p in problems if not p.tasks and p.task in index.names]
    if len(index.names) <= MOST_DRAWN:
        write_heat_map(index, queries, command.out)
    else:
        status.print(f"similarity.png: not drawn, {len(index.names)} adapters are more than {MOST_DRAWN}")
    if not queries or len(index.names) < 2:
        return {}
    curve = judge(index, queries, range(1, min(len(index.names), 20) + 1))
    answered: dict[str, dict[int, float]] = {}
    for system in sorted(systems, key=lambda s: s.retrieves or 0):
        share = mean_shares(table, command.scoring).get(system.name)
        if system.retrieves is not None and share is not None:
            answered.setdefault(system.kind, {})[system.retrieves] = 100 * share
    panels = {
        "own adapter among the first k": {"own adapter": curve["iid"], "own hidden: one of its cluster": curve["ood"]},
        "mean accuracy of the answers": {kind: ks for kind, ks in answered.items() if len(ks) > 1},
    }
    panels = {title: {line: v for line, v in lines.items() if v} for title, lines in panels.items()}
    charts.write_against_k(panels, command.out / "k.png")
    return judge(index, queries, KS)


# How fast


def read_sizes(command: Evaluate) -> list[int]:
    """The batch sizes of `--throughput`."""
    sizes = [s for s in (command.throughput or "").split(",") if s]
    if wrong := [s for s in sizes if not (s.isascii() and s.isdigit() and int(s) > 0)]:
        raise InputError(f"--throughput: expected batch sizes of 1 or more, found {wrong[0]!r}")
    return [int(s) for s in sizes]


def time_systems(
    command: Evaluate, systems: Sequence[System], problems: Sequence[Problem], sizes: Sequence[int]
) -> None:
    """Times the systems, writes throughput.json and throughput.png, and prints a table."""
    import jax

    from meteora_jax.evaluation.throughput import measure, throughput_markdown, write_throughput

    plain = [p for p in problems if not p.tasks]
    if not plain or command.max_new_tokens < 2:
        raise InputError("--throughput: expected problems of one task each and 2 new tokens or more, found others")
    first = is_first_process()
    with progress_bar("throughput") if first else nullcontext(lambda *_: None) as progress:
        records = measure(systems, plain, sizes, command.max_new_tokens, command.repeats, progress)
    if not first:
        return
    device = jax.devices()[0]
    about = {"device": device.device_kind, "devices": jax.device_count(), "dtype": default_dtype(command.dtype)}
    command.out.mkdir(parents=True, exist_ok=True)
    for path in (command.out / "throughput.json", command.json):
        write_json(path, {**about, "jax": jax.__version__, "records": records})
    write_throughput(records, command.out / "throughput.png")
    console.print(f"{device.device_kind}, jax {jax.__version__}, {about['dtype']}", highlight=False)
    print_tables(throughput_markdown(records))
