"""The judgement of the MeteoRA paper on one base: adapters, gates and baselines trained, then everything scored.

    python scripts/quality.py --base runs/base --tasks runs/tasks --out runs/quality --gpus 0 1 2 3

One `meteora` command a job, one a GPU side by side; a job whose result is there is not repeated, so a run that was
stopped goes on. OUT gets adapters/<task> (BANKs of one), peft/<task>, bank, gates*, lora-*, evaluation/<part>,
jobs.jsonl (every command with its seconds), and of all that is judged table.md and records.json. `--dry-run` prints the
commands in an order that works. Systems in the table:

    gates-topN             the default recipe           gates-original-topN     without composite sequences
    gates-response-topN    prompts without LM loss      gates-beta-5-topN       a tenth of beta
    gates-mean-topN        --gate-input prefix-mean     gates-carry-topN        --carry-logits
    gates-shared-topN      --shared-gates               gates-all-topN          these three together
    gates-independent-topN --independent                gates-grown-topN        four adapters by --extend
    gates-grown-bias-topN  and with --extend-bias       oracle, base, lora-f-rR, lora-b-rR
"""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import tyro
from rich.console import Console

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import load_split

METEORA = ("-m", "meteora_jax.cli")
BASELINES = ("lora-f", "lora-b")  # one LoRA on all data as it comes; on a balanced mixture
BALANCED_SAMPLES = 1000  # a task, of LoRA-B (MeteoRA, section 4.1)
HELD_OUT = 4  # adapters that a bank grows by
SHARES = ("accuracy", "exact_match", "rouge1", "rouge2", "rougeL")  # from 0 to 1 in table.json, percent in records
ABLATIONS: dict[str, tuple[str, ...]] = {  # of training, beside the composite sequences that the default has
    "gates-original": ("--composite", "0"),
    "gates-response": ("--composite", "0.3", "--no-prompt-loss"),
    "gates-beta-5": ("--composite", "0.3", "--beta", "5"),
}
MEAN, CARRY, SHARED = ("--gate-input", "prefix-mean"), ("--carry-logits",), ("--shared-gates",)
FORMS: dict[str, tuple[str, ...]] = {
    "gates-mean": MEAN, "gates-carry": CARRY, "gates-shared": SHARED, "gates-all": (*MEAN, *CARRY, *SHARED)
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """What to train and judge."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder."""
    out: Path
    """Folder for everything."""
    only: tuple[str, ...] = ()
    """Tasks; all folders of TASKS with a train file, if none is named."""
    gpus: tuple[int, ...] = ()
    """CUDA devices; none: the CPU."""
    per_gpu: int = 1
    """Jobs side by side on each."""
    device: str = ""
    """What records.json calls them."""
    adapter_steps: tuple[int, int] = (120, 500)
    """Fewest and most steps of an adapter; between them four epochs."""
    gate_steps: int = 800
    independent_samples: int = 500
    """Examples of a task that an independent column is made from."""
    baseline_steps: int = 2000
    batch_size: int = 32
    limit: int = 100
    """Test problems a task."""
    composite: str = "3,5"
    """As of `meteora evaluate`."""
    composite_count: int = 100
    max_length: int = 2048
    """Tokens of a training sequence."""
    evaluation_batch: int = 50
    parts: tuple[str, ...] = ("single", "composite", "growth", "ablations", "forms", "independent")
    """What is judged beside each other."""
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """A command; `makes` is there once it is done, `after` names the jobs that it needs."""

    name: str
    arguments: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()
    device: bool = True


def plan(q: Quality, tasks: dict[str, int]) -> list[Job]:
    """All jobs, each after those that it needs. tasks: {name: train examples}."""
    out, names = q.out, list(tasks)
    common = ("--base", str(q.base), "--tasks", str(q.tasks), "--max-length", str(q.max_length))
    lora = ("--learning-rate", "1e-3", "--warmup", "0.03", "--clip", "1", "--batch-size", str(q.batch_size))
    jobs: list[Job] = []

    def add(name: str, *arguments: Any, makes: Path, after: tuple[str, ...] = (), device: bool = True) -> None:
        jobs.append(Job(name, tuple(map(str, arguments)), makes, after, device))

    for task, examples in tasks.items():
        low, high = q.adapter_steps
        steps, bank, peft = (
            min(high, max(low, 4 * examples // q.batch_size)),
            out / "adapters" / task,
            out / "peft" / task,
        )
        add(f"adapter {task}", "train", "adapter", *common, *lora, "--task", task, "--name", task, "--steps", steps,
            "--out", bank, makes=bank / "bank.json")  # fmt: skip
        add(f"export {task}", "export", "adapter", bank, task, peft, "--overwrite",
            makes=peft / "adapter_config.json", after=(f"adapter {task}",), device=False)  # fmt: skip
    held = names[-HELD_OUT:] if len(names) > HELD_OUT else []
    banks = {"bank": names, "bank-small": names[: len(names) - len(held)]}
    for bank, inside in banks.items():
        add(bank, "import", "adapters", out / bank, *(f"{n}={out / 'peft' / n}" for n in inside), "--base", q.base,
            "--overwrite", makes=out / bank / "bank.json", after=tuple(f"export {n}" for n in inside),
            device=False)  # fmt: skip

    def gates(name: str, *more: Any, bank: str = "bank", after: tuple[str, ...] = ()) -> None:
        add(name, "train", "gates", *common, "--bank", out / bank, "--out", out / name, "--learning-rate", "2e-3",
            "--warmup", "0.03", "--batch-size", q.batch_size, "--steps", q.gate_steps, "--log", out / f"{name}.jsonl",
            *more, makes=out / name / "gates.json", after=(bank, *after))  # fmt: skip

    gates("gates", "--composite", "0.3")
    variants: list[str] = []  # beside the default, judged as it is
    for name, options in ABLATIONS.items() if "ablations" in q.parts else ():
        gates(name, *options)
        variants.append(name)
    for name, options in FORMS.items() if "forms" in q.parts else ():
        gates(name, "--composite", "0.3", *options)
        variants.append(name)
    if "independent" in q.parts:
        gates("gates-independent", "--independent", "--samples-per-task", q.independent_samples)
        variants.append("gates-independent")
    if "growth" in q.parts and held:
        gates("gates-small", "--composite", "0.3", bank="bank-small")
        for name, options in {"gates-grown": (), "gates-grown-bias": ("--extend-bias",)}.items():
            extend = ("--extend", out / "gates-small", *options)
            gates(name, "--composite", "0.3", *extend, after=("gates-small",))
            variants.append(name)
    for name in BASELINES:
        for rank in (8, 8 * len(names)):
            mixture = ("natural",) if name == "lora-f" else ("balanced", "--samples-per-task", BALANCED_SAMPLES)
            folder = out / f"{name}-r{rank}"
            add(folder.name, "train", "adapter", *common, *lora, "--composite", "0.3", "--task", *names, "--name",
                folder.name, "--rank", rank, "--steps", q.baseline_steps, "--mixture", *mixture, "--out", folder,
                makes=folder / "bank.json")  # fmt: skip

    def evaluate(name: str, systems: str, *more: Any, gates: str = "gates", after: tuple[str, ...] = ()) -> None:
        folder = out / "evaluation" / name
        add(f"evaluate {name}", "evaluate", "--base", q.base, "--bank", out / "bank", "--gates", out / gates,
            "--tasks", q.tasks, "--systems", systems, "--limit", q.limit, "--batch-size", q.evaluation_batch,
            "--out", folder, *more, makes=folder / "table.json", after=(gates, *after))  # fmt: skip

    loras = [f"{name}-r{rank}" for name in BASELINES for rank in (8, 8 * len(names))]
    given = [x for lora in loras for x in ("--system-bank", f"{lora}={out / lora}")]
    evaluate("single", "base,oracle,gates-top1,gates-top2")
    evaluate("baselines", "", *given, after=tuple(loras))
    composite = ("--composite", q.composite, "--composite-count", q.composite_count, "--composite-temperature")
    if "composite" in q.parts:
        evaluate("composite", "gates-top1,gates-top2", *composite, 1)
        evaluate("composite-warm", "gates-top2", *composite, 15)
        evaluate("composite-baselines", "base", *composite, 1, *given, after=tuple(loras))
    for name in variants:
        evaluate(name, "gates-top1,gates-top2", gates=name)
        if "composite" in q.parts:
            evaluate(f"{name}-composite", "gates-top2", *composite, 1, gates=name)
    return jobs


def collect(q: Quality, jobs: list[Job]) -> list[dict[str, Any]]:
    """A record for every figure of every evaluation that is there."""
    records = []
    for job in jobs:
        if job.arguments[0] != "evaluate" or not job.makes.is_file():
            continue
        option = dict(zip(job.arguments, job.arguments[1:], strict=False))
        gates, warm = Path(option["--gates"]).name, option.get("--composite-temperature", "1")
        common = {
            "split": "test", "base": q.base.name, "adapters": sum(j.name.startswith("adapter ") for j in jobs),
            "device": q.device, "date": time.strftime("%Y-%m-%d", time.gmtime(job.makes.stat().st_mtime)),
            "command": shlex.join(["meteora", *job.arguments]),
        }  # fmt: skip
        for task, cells in json.loads(job.makes.read_text(encoding="utf-8"))["tasks"].items():
            for system, cell in cells.items():
                named = system.replace("gates", gates, 1) if system.startswith("gates-") else system
                named += f" at temperature {warm}" if warm != "1" else ""
                for metric, value in cell.items():
                    if isinstance(value, int | float) and metric != "problems":
                        value = round(100 * value, 2) if metric in SHARES else value
                        record = {"system": named, "task": task, "metric": metric, "value": value}
                        records.append({**record, "n": cell["problems"], **common})
    return records


def tell(q: Quality, records: list[dict[str, Any]]) -> None:
    """Writes records.json, and table.md: each system's mean accuracy over the tasks, and its composite problems."""
    (q.out / "records.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    accuracies: dict[str, list[float]] = {}
    composites: dict[str, dict[str, str]] = {}
    for r in records:
        if r["metric"] == "accuracy":
            accuracies.setdefault(r["system"], []).append(r["value"])
        if r["metric"] in ("attempted", "correct"):
            composites.setdefault(r["system"], {})[f"{r['task']}, {r['metric']}"] = f"{r['value']:g}"
    columns = sorted({c for row in composites.values() for c in row})
    lines = [
        "| system | " + " | ".join(["tasks", "mean accuracy", *columns]) + " |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for system in dict.fromkeys([*accuracies, *composites]):
        own, row = accuracies.get(system), composites.get(system, {})
        mean = [str(len(own)), f"{sum(own) / len(own):.1f}"] if own else ["", ""]
        lines.append("| " + " | ".join([system, *mean, *(row.get(c, "") for c in columns)]) + " |")
    (q.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Runner:
    """Runs jobs, each once those that it needs are done; a failed one fails what needs it."""

    def __init__(self, q: Quality):
        self.q = q
        self.slots: Queue[int | None] = Queue()
        for _ in range(q.per_gpu if q.gpus else 1):
            for gpu in q.gpus or (None,):
                self.slots.put(gpu)
        self.lock = threading.Lock()
        self.done: dict[str, Future] = {}

    def run(self, jobs: list[Job]) -> list[str]:
        """The names of the jobs that failed."""
        (self.q.out / "logs").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(jobs)) as pool:
            for job in jobs:
                self.done[job.name] = pool.submit(self._job, job)
        return [name for name, future in self.done.items() if not future.result()]

    def _job(self, job: Job) -> bool:
        if not all([self.done[name].result() for name in job.after]):
            return False
        if job.makes.exists():
            return True
        gpu = self.slots.get() if job.device else None
        started = time.monotonic()
        try:
            log = self.q.out / "logs" / f"{job.name.replace(' ', '-')}.log"
            with log.open("w", encoding="utf-8") as said:
                status = subprocess.run(
                    [sys.executable, *METEORA, *job.arguments], env=self._environment(gpu, job.device), stdout=said,
                    stderr=subprocess.STDOUT, check=False,
                ).returncode  # fmt: skip
        finally:
            if job.device:
                self.slots.put(gpu)
        self._record(job, status, time.monotonic() - started, log)
        return status == 0

    def _environment(self, gpu: int | None, device: bool) -> dict[str, str]:
        if gpu is None:
            return {**os.environ, "JAX_PLATFORMS": "cpu"} if self.q.gpus or not device else dict(os.environ)
        share = str(0.9 / self.q.per_gpu)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "XLA_PYTHON_CLIENT_MEM_FRACTION": share}

    def _record(self, job: Job, status: int, seconds: float, log: Path) -> None:
        command = shlex.join(["meteora", *job.arguments])
        record = {"job": job.name, "status": status, "seconds": round(seconds, 1), "command": command}
        with self.lock, (self.q.out / "jobs.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
        last = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
        console.print(f"{job.name}: {seconds:.0f} s" + (f", status {status}: {last}" if status else ""), markup=False)


console = Console(highlight=False, soft_wrap=True)


def main(q: Quality) -> int:
    names = q.only or tuple(sorted(f.parent.name for f in q.tasks.glob("*/train.jsonl")))
    if len(names) < 2:
        raise InputError(f"{q.tasks}: expected two tasks or more, found {len(names)}")
    jobs = plan(q, {name: len(load_split(q.tasks, name, "train")) for name in names})
    if q.dry_run:
        for job in jobs:
            print(shlex.join(["meteora", *job.arguments]))
        return 0
    failed = Runner(q).run(jobs)
    tell(q, collect(q, jobs))
    for name in failed:
        console.print(f"not done: {name}")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Quality, description=__doc__)))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
