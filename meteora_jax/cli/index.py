"""`meteora index build | query | add | remove | evaluate`; `rank` has a file of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table

from meteora_jax.cli.index_rank import IndexRank
from meteora_jax.cli.report import console, status, write_json
from meteora_jax.config import InputError
from meteora_jax.io.files import change_alone, refuse_unwritable

if TYPE_CHECKING:
    from meteora_jax.retriever.evaluation import Query
    from meteora_jax.retriever.index import Index
else:  # slow to import
    Index = Query = Any

K = 3  # adapters a text


@dataclass(frozen=True)
class IndexBuild:
    """Make an index of adapters from 1 to 20 sample inputs each."""

    dest: tyro.conf.Positional[Path]
    """INDEX folder to make; an index that is there is replaced once the new one is complete."""
    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=FILE, one an adapter: its training file, JSON lines with a "prompt" or "messages"; 20 are taken, evenly
    spread."""
    profiles: Path | None = None
    """A JSON file {NAME: [inputs]}, or the profiles of LoraRetriever's release."""
    tasks: Path | None = None
    """A TASKS folder: every TASKS/NAME/train.jsonl is adapter NAME's training file."""
    describe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SENTENCE, an adapter that a sentence describes; may be given several times."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Of all these, an adapter to take; may be given several times; by default all."""
    encoder: Path | None = None
    """ENCODER folder; the index keeps a copy."""
    scoring: str | None = None
    """How profiles are compared: cosine, inner-product, whitened, tfidf-words, tfidf-characters, bm25, lexical, dense,
    hybrid, or several with "+" between them; by default hybrid with an encoder, else lexical."""
    instruction: str = ""
    """Stands before every text that the encoder reads."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class IndexAdd:
    """Add adapters to an index; what it knows of the others stays."""

    index: tyro.conf.Positional[Path]
    """INDEX folder."""
    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=FILE, one an adapter: its training file, JSON lines with a "prompt" or "messages"."""
    profiles: Path | None = None
    """A JSON file {NAME: [inputs]}."""
    tasks: Path | None = None
    """A TASKS folder."""
    describe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SENTENCE, an adapter that a sentence describes; may be given several times."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Of all these, an adapter to take; may be given several times; by default all."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class IndexRemove:
    """Remove adapters from an index."""

    index: tyro.conf.Positional[Path]
    """INDEX folder."""
    names: tyro.conf.Positional[tuple[str, ...]]
    """The adapters."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class IndexQuery:
    """Say which adapters fit a text best."""

    index: tyro.conf.Positional[Path]
    """INDEX folder."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts; none: standard input is one."""
    k: int | None = None
    """Adapters a text; 3 unless given, and in a smaller index as many as there are."""
    exclude: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An adapter that is not to be found; may be given several times."""
    json: Path | None = None
    """Write names and similarities here too."""


@dataclass(frozen=True)
class IndexEvaluate:
    """Score an index on queries whose adapter is known, and draw how similar its adapters are."""

    index: tyro.conf.Positional[Path]
    """INDEX folder."""
    queries: tyro.conf.Positional[Path]
    """A JSON file, a list of {"inputs": text, "task": adapter, "domain": cluster} ("domain" may be missing), or a TASKS
    folder: the test problems of the index's adapters."""
    limit: int | None = None
    """At most so many queries an adapter, chosen by their hash."""
    paraphrases: Path | None = None
    """A JSON file {adapter: [instructions with {text}]}: adds the column of other words."""
    except_for: tuple[str, ...] = ()
    """Leave out the queries of these adapters: with those that an encoder was trained on, only unseen ones count."""
    out: Path | None = None
    """Folder for similarity.png and similarity.html."""
    json: Path | None = None
    """Write the figures here too."""


@dataclass(frozen=True)
class IndexCommand:
    """Build, change, ask and judge an index: the adapters' sample inputs, and what finds them by a request's text."""

    what: (
        Annotated[IndexBuild, tyro.conf.subcommand("build")]
        | Annotated[IndexQuery, tyro.conf.subcommand("query")]
        | Annotated[IndexAdd, tyro.conf.subcommand("add")]
        | Annotated[IndexRemove, tyro.conf.subcommand("remove")]
        | Annotated[IndexRank, tyro.conf.subcommand("rank")]
        | Annotated[IndexEvaluate, tyro.conf.subcommand("evaluate")]
    )


def _pairs(option: str, pairs: Sequence[str], right: str) -> list[tuple[str, str]]:
    split = [(pair, *pair.partition("=")[::2]) for pair in pairs]
    if wrong := [f"{option}: expected NAME={right}, found {p!r}" for p, name, rest in split if not (name and rest)]:
        raise InputError(wrong)
    return [(name, rest) for _, name, rest in split]


def _training_files(tasks: Path) -> list[tuple[str, Path]]:
    """(task, its training file) of a TASKS folder. Raises InputError: there is none."""
    files = [folder / "train.jsonl" for folder in sorted(tasks.glob("*"))]
    if found := [(path.parent.name, path) for path in files if os.path.lexists(path)]:
        if strange := [path for _, path in found if not path.is_file()]:  # a pipe's reader would wait for ever
            raise InputError([f"--tasks: {path}: expected a file, found none or another thing" for path in strange])
        return found
    there = "a folder without one" if tasks.is_dir() else "a file" if tasks.exists() else "no such folder"
    raise InputError(f"--tasks: {tasks}: expected a folder of TASK/train.jsonl, found {there}")


def read_sources(command: IndexBuild | IndexAdd) -> dict[str, list[str]]:
    """{adapter: inputs} from everything that a command names.

    Raises:
        InputError: an adapter named twice, a file or folder that is refused, or no adapter at all.
    """
    from meteora_jax.retriever.profiles import read_profiles, read_training_file

    found: list[tuple[str, list[str]]] = []
    if command.profiles is not None:
        found += read_profiles(command.profiles).items()
    files = [(name, Path(file)) for name, file in _pairs("files", command.files, "FILE")]
    if command.tasks is not None:
        files += _training_files(command.tasks)
    wanted = set(command.only)
    found += [(name, read_training_file(file)) for name, file in files if not wanted or name in wanted]
    found += [(name, [sentence]) for name, sentence in _pairs("--describe", command.describe, "SENTENCE")]
    names = [name for name, _ in found]
    problems = [f"{name}: expected once, found twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"--only: expected a named adapter, found {name!r}" for name in sorted(wanted - set(names))]
    if not found:
        problems.append("profiles: expected NAME=FILE, --profiles, --tasks or --describe, found none")
    if problems:
        raise InputError(problems)
    return {name: inputs for name, inputs in found if not wanted or name in wanted}


def report(index: Index, folder: Path, path: Path | None, added: Mapping[str, Sequence[str]] | None = None) -> None:
    """Says what an index holds now, and which of the inputs that were `added` its encoder reads in part only."""
    from meteora_jax.cli.train_retriever import cut_line

    cut = {}
    if added and index.encoder is not None:
        cut = {name: len(index.encoder.cut(inputs, index.instruction)) for name, inputs in added.items()}
        cut = {name: count for name, count in cut.items() if count}
    count = sum(map(len, index.profiles.values()))
    how = f"{index.scoring} (means: too many inputs for a regression)" if index.large else index.scoring
    console.print(f"{folder}: {len(index.names)} adapters, {count} inputs, scoring {how}", highlight=False)
    if line := cut_line(cut, added or {}, None):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    sizes = {name: len(inputs) for name, inputs in index.profiles.items()}
    write_json(
        path, {"index": str(folder), "scoring": index.scoring, "large": index.large, "inputs": sizes, "cut": cut}
    )


def index_build(command: IndexBuild) -> None:
    """Runs `meteora index build`."""
    from meteora_jax.retriever.index import Index, check_replaced

    check_replaced(command.dest)
    profiles = read_sources(command)
    encoder = None
    if command.encoder is not None:
        from meteora_jax.retriever.encoder import TextEncoder

        encoder = TextEncoder.load(command.encoder)
    with status.status("building"):
        index = Index.build(profiles, command.scoring, encoder, command.instruction)
        index.fit()
        index.save(command.dest)
    report(index, command.dest, command.json, profiles)


def _replace(index: Index, folder: Path) -> None:
    """Saves a changed index, and says so where that ends a ranking: it is of the adapters that there were."""
    from meteora_jax.retriever.ranking import FILE

    ranked = (folder / FILE).exists()
    index.save(folder)
    if ranked:
        said = f"{folder / FILE}: gone with the index before; `meteora index rank` makes one"
        status.print(said, highlight=False, soft_wrap=True)


def index_add(command: IndexAdd) -> None:
    """Runs `meteora index add`."""
    from meteora_jax.retriever.index import Index, check_replaced

    check_replaced(command.index)
    profiles = read_sources(command)
    with change_alone(command.index):
        index = Index.load(command.index)
        index.add(profiles)
        _replace(index, command.index)
    report(index, command.index, command.json, profiles)


def index_remove(command: IndexRemove) -> None:
    """Runs `meteora index remove`."""
    from meteora_jax.retriever.index import Index, check_replaced

    check_replaced(command.index)
    with change_alone(command.index):
        index = Index.load(command.index)
        index.remove(command.names)
        _replace(index, command.index)
    report(index, command.index, command.json)


def read_standard_input() -> str:
    """The one text that standard input is; refuses bytes that are no UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise InputError(f"standard input: expected UTF-8 text, found byte {e.object[e.start]:#04x}") from None


def index_query(command: IndexQuery) -> None:
    """Runs `meteora index query`."""
    from meteora_jax.retriever.index import Index

    texts = list(command.texts) or [read_standard_input()]
    index = Index.load(command.index)
    k = K if command.k is None else command.k
    found = index.query(texts, k, [command.exclude] * len(texts) if command.exclude else None)
    count = found.similarities.shape[1]
    if command.k is not None and count < k:
        status.print(f"--k {k}: found all adapters that there are to find, {count}", highlight=False)
    table = Table("text", *(f"{i + 1}" for i in range(count)))
    rows = [(t, n, s[: len(n)].tolist()) for t, n, s in zip(texts, *found, strict=True)]
    for text, names, similarities in rows:
        shown = " ".join(text.split())
        cells = [f"{n} {s:.3f}" for n, s in zip(names, similarities, strict=True)]
        table.add_row(shown if len(shown) <= 40 else f"{shown[:39]}…", *cells)
    console.print(table)
    write_json(command.json, [{"text": t, "names": list(n), "similarities": s} for t, n, s in rows])


def read_asked(command: IndexEvaluate, names: Sequence[str]) -> list[Query]:
    """The queries of a JSON file, or of a TASKS folder's test splits."""
    from meteora_jax.evaluation.problems import choose
    from meteora_jax.evaluation.tasks import load_split
    from meteora_jax.retriever.evaluation import Query, read_queries

    if command.limit is not None and command.limit < 1:
        raise InputError(f"--limit: expected 1 or more, found {command.limit}")
    if command.queries.is_dir():
        # a task may state one prompt with several right answers: as a query it is one
        prompts = [
            (name, dict.fromkeys(e.request for e in load_split(command.queries, name, "test"))) for name in names
        ]
        queries = [Query(prompt, name, "") for name, own in prompts for prompt in own]
    else:
        queries = read_queries(command.queries)
    own = {name: [q for q in queries if q.adapter == name] for name in dict.fromkeys(q.adapter for q in queries)}
    return [rows[i] for rows in own.values() for i in choose([q.text for q in rows], command.limit)]


def index_evaluate(command: IndexEvaluate) -> None:
    """Runs `meteora index evaluate`."""
    from meteora_jax.retriever import evaluation
    from meteora_jax.retriever.index import Index

    if command.out:
        refuse_unwritable("--out", command.out, folder=True)
    index = Index.load(command.index)
    if command.out and len(index.names) > evaluation.MOST_DRAWN:
        most = evaluation.MOST_DRAWN
        raise InputError(f"--out: expected at most {most} adapters in a similarity map, found {len(index.names)}")
    asked = read_asked(command, index.names)
    known = {*index.names, *(q.adapter for q in asked)}
    if strange := [name for name in command.except_for if name not in known]:
        raise InputError(f"--except-for: expected adapters of {', '.join(sorted(known))}, found {', '.join(strange)}")
    queries = [q for q in asked if q.adapter not in command.except_for]
    if not queries:
        raise InputError(f"{command.queries}: expected queries other than those of --except-for, found none")
    paraphrases = evaluation.read_paraphrases(command.paraphrases) if command.paraphrases else None
    figures: dict[str, Any] = {}
    for wording in evaluation.WORDINGS if paraphrases else evaluation.WORDINGS[:2]:
        with status.status(f"{wording} wording"):
            reworded = evaluation.reword(queries, index, wording, paraphrases)
        if not reworded:
            status.print(f"{wording} wording: all queries are the profiles' wording alone", highlight=False)
            continue
        with status.status(f"{wording} wording"):
            figures[wording] = evaluation.judge(index, reworded)
    ks = list(next(iter(figures.values()))["iid"])
    title = f"{command.index}: {len(index.names)} adapters, scoring {index.scoring}; % found among the first k"
    table = Table("wording", "queries", "", *(f"k={k}" for k in ks), title=title, title_justify="left")
    for wording, row in figures.items():
        for kind, label in (("iid", "own adapter"), ("ood", "own masked: its cluster")):
            if not row[kind]:
                continue
            cells = [f"{row[kind][k]:.1f}" for k in row[kind]]
            table.add_row(wording if kind == "iid" else "", str(row["queries"]) if kind == "iid" else "", label, *cells)
    console.print(table)
    written = evaluation.write_heat_map(index, queries, command.out) if command.out else []
    for path in written:
        console.print(str(path), highlight=False)
    write_json(command.json, {"index": str(command.index), "scoring": index.scoring, "wordings": figures})
