"""The judgement of the MeteoRA paper on one base: adapters, gates and baselines trained, then everything scored.

    python scripts/quality.py --base runs/base --tasks runs/tasks --out runs/quality --gpus 0 1 2 3

One `meteora` command a job, one a GPU side by side, the first in the plan first; a job whose result is there is not
repeated, so a run that was stopped goes on. OUT gets bank (all adapters, trained in one job), bank-small (without the
last four), gates*, lora-*, index, evaluation/<part>, jobs.jsonl (every command with its seconds), cache (compiled
programs), and of all that is judged table.md and records.json. `--dry-run` prints the commands in an order that works.
Systems in the table:

    gates-topN             the token router, the recipe of `train gates`
    gates-meteora-topN     a gate at every projection, what follows too
    gates-original-topN    without composite sequences  gates-response-topN     prompts without LM loss
    gates-beta-5-topN      a tenth of beta
    gates-grown-topN       the token router, four adapters by --extend
    oracle, base, lora-f-rR, lora-b-rR
    retrieval-COMPOSE      of k adapters by the index   gates-within-topN       gates among them
    NAME-unseen            without the adapters of a problem's own task
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from quality_tables import BASELINES, Job, collect, tell
from rich.console import Console

from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import COMPOSITES

METEORA = ("-m", "meteora_jax.cli")
BALANCED_SAMPLES = 1000  # a task, of LoRA-B (MeteoRA, section 4.1)
HELD_OUT = 4  # adapters that a bank grows by
PARTS = ("single", "baselines", "composite", "retrieval", "growth", "ablations", "forms")
# Problems of two to ten tasks behind up to two worked examples if they fit: two thirds of the gates' tokens, 44 % of
# the adapters'.
SIZES = ("--composite-sizes", "2", "10", "--composite-shots", "2")
COMPOSITE = ("--composite", "0.2", *SIZES)
LORA = ("--learning-rate", "1e-3", "--warmup", "0.03", "--clip", "1", *SIZES)
METEORA_GATES = ("--recipe", "meteora", *COMPOSITE, "--learning-rate", "2e-3", "--warmup", "0.03")
# Two of MeteoRA's composite-10 tasks are the hub's; what stands for them where they are not at hand.
COMPOSITE_10 = {"news_commentary_de": "vitaminc_fact_verification", "alpaca": "object_counting"}
RETRIEVAL = "retrieval-selection,retrieval-mixture,retrieval-fusion,gates-top2,gates-within-top2"
ABLATIONS: dict[str, tuple[str, ...]] = {  # of training gates at the projections on composite sequences, too
    "gates-original": ("--composite", "0"),
    "gates-response": ("--no-prompt-loss",),
    "gates-beta-5": ("--beta", "5"),
}
FORMS: dict[str, tuple[str, ...]] = {"gates-meteora": ()}


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
    per_gpu: int = 2
    """Evaluations side by side on each (half their time is compiling); a training has its GPU to itself."""
    bank_gpus: int = 1
    """GPUs that the job of the adapters is spread over; the others train baselines meanwhile."""
    device: str = ""
    """What records.json calls them."""
    form_length: int = 4096
    """Tokens of a training sequence of gates at the projections: a composite of ten tasks with a worked example has
    3,700."""
    bank_steps: int = 850
    bank_length: int = 2048
    """Of the adapters' sequences, and the baselines'."""
    bank_rows: int = 32
    bank_composite: float = 0.1
    """Share of the adapters' sequences, and the baselines', that are composites."""
    bank_held_composites: int = 0
    """As of `meteora train bank --held-composites`."""
    bank_tokens: int = 2_500_000
    """As of `meteora train bank --tokens`."""
    bank_epochs: float = 8.0
    """As of `meteora train bank --epochs`."""
    bank_validations: int = 16
    """As of `meteora train bank --validations`."""
    bank_average: float = 0.97
    """As of `meteora train bank --average`."""
    bank_samples: int = 8000
    """Examples of a task that its adapter may see; all of them take a minute to tokenize."""
    gate_samples: int = 2000
    """Examples of a task that gates may see."""
    gate_steps: int = 5000
    form_steps: int = 750
    """Of gates at the projections."""
    form_rows: int = 8
    baseline_steps: int = 470
    baseline_rows: int = 16
    rank: int = 8
    """Of the adapters and the small baselines."""
    accumulate: int = 1
    """Of every training."""
    remat: Literal["all", "dots", "none"] = "all"
    """What every training computes twice instead of keeping it: all, all but the matmuls, nothing."""
    save_every: int = 200
    """Steps between checkpoints."""
    limit: int = 100
    """Test problems a task."""
    max_prompt: int = 2048
    """Longer prompts of single tasks are left out; composites fit the context."""
    composite: str = "3,5,10"
    """As of `meteora evaluate`; without the hub's tasks, 10 has two substitutes, `COMPOSITE_10`."""
    composite_count: int = 100
    composite_shots: int = 2
    evaluation_batch: int = 128
    """Problems a batch; every length of prompts costs a compilation, so few large ones are best."""
    composite_batch: int = 50
    retrieval_limit: int = 40
    """As `limit`, for the many systems of the part retrieval."""
    variant_limit: int = 100
    """As `limit`, for gates beside the default ones."""
    retrieve: int = 3
    """Adapters that the index finds for a problem."""
    dtype: str | None = None
    """Of training and evaluation; `meteora`'s own default unless given."""
    parts: tuple[str, ...] = PARTS
    """What is judged: single (base, oracle, gates on each task), baselines, composite, retrieval, growth, ablations,
    forms."""
    variants: tuple[str, ...] = ()
    """Of ablations, forms and growth only these, by their names (gates-meteora ...), in the plan's order; all unless
    given."""
    seconds: float | None = None
    """After so many, end as at SIGTERM: trainings save, nothing new begins, the tables show what is there. The same
    command goes on."""
    dry_run: bool = False


class Plan:
    """The jobs in the order of their importance; each comes after those that it needs."""

    def __init__(self, q: Quality, names: Sequence[str]):
        self.q, self.names, self.jobs = q, tuple(names), []
        self.held = self.names[-HELD_OUT:] if len(names) > HELD_OUT + 1 else ()  # gates choose among two or more
        self.loras = tuple(f"{name}-r{rank}" for name in BASELINES for rank in (q.rank, q.rank * len(names)))

    def add(
        self, name: str, *arguments: Any, makes: Path, after: Sequence[str] = (), gpus: int = 1, shares: bool = False
    ) -> None:
        self.jobs.append(Job(name, tuple(map(str, arguments)), makes, tuple(after), gpus, shares))

    def common(self, rows: int | None, steps: int, length: int | None) -> tuple[Any, ...]:
        """Options of every training; rows, length: None for the recipe's."""
        q = self.q
        remat = {"all": (), "dots": ("--remat-keeps", "dots"), "none": ("--no-remat",)}[q.remat]
        dtype = () if q.dtype is None else ("--dtype", q.dtype)
        given = (("--max-length", length), ("--rows", rows), ("--steps", steps))
        shape = tuple(word for option, value in given if value is not None for word in (option, value))
        return ("--base", q.base, "--tasks", q.tasks, *shape, "--accumulate", q.accumulate, "--save-every",
                q.save_every, "--keep", 1, *remat, *dtype)  # fmt: skip

    def bank(self) -> None:
        """All adapters, and the bank that is to grow."""
        q, out = self.q, self.q.out
        self.add("bank", "train", "bank", *self.common(q.bank_rows, q.bank_steps, q.bank_length), *LORA,
                 "--composite", q.bank_composite, "--held-composites", q.bank_held_composites, "--rank", q.rank,
                 "--tokens", q.bank_tokens, "--epochs", q.bank_epochs, "--validations", q.bank_validations,
                 "--average", q.bank_average,
                 "--samples-per-task", q.bank_samples, "--task", *self.names, "--out", out / "bank", "--log",
                 out / "bank.jsonl", makes=out / "bank" / "bank.json", gpus=q.bank_gpus)  # fmt: skip
        if "growth" in q.parts and self.held:
            inside = [n for n in self.names if n not in self.held]
            self.add("bank-small", "export", "bank", out / "bank", out / "bank-small", *inside,
                     makes=out / "bank-small" / "bank.json", after=("bank",), gpus=0)  # fmt: skip

    def gates(self, name: str, *more: Any, bank: str = "bank", after: Sequence[str] = ()) -> None:
        """A training of gates, of the token router unless `more` names another recipe."""
        q, out = self.q, self.q.out
        shape = (q.form_rows, q.form_steps, q.form_length) if "--recipe" in more else (None, q.gate_steps, None)
        self.add(name, "train", "gates", *self.common(*shape), "--bank", out / bank, "--out", out / name,
                 "--samples-per-task", q.gate_samples, "--log", out / f"{name}.jsonl", *more,
                 makes=out / name / "gates.json", after=(bank, *after))  # fmt: skip

    def variants(self) -> None:
        """Gates beside the default ones, each judged as these are."""
        q = self.q
        made = (ABLATIONS if "ablations" in q.parts else {}) | (FORMS if "forms" in q.parts else {})
        wanted = lambda name: not q.variants or name in q.variants  # noqa: E731
        if "growth" in q.parts and self.held and wanted("gates-grown"):
            self.gates("gates-small", bank="bank-small")
            self.gates("gates-grown", "--extend", q.out / "gates-small", after=("gates-small",))
            self.evaluate_variant("gates-grown")
        for name, options in made.items():
            if wanted(name):
                self.gates(name, *METEORA_GATES, *options)
                self.evaluate_variant(name)

    def baselines(self) -> None:
        q, out = self.q, self.q.out
        for lora in self.loras:
            mixture = (
                ("natural",) if lora.startswith("lora-f") else ("balanced", "--samples-per-task", BALANCED_SAMPLES)
            )
            self.add(lora, "train", "adapter", *self.common(q.baseline_rows, q.baseline_steps, q.bank_length),
                     *LORA, "--composite", q.bank_composite, "--task", *self.names, "--name", lora, "--rank",
                     lora.rpartition("-r")[2], "--mixture", *mixture, "--out",
                     out / lora, "--log", out / f"{lora}.jsonl", makes=out / lora / "bank.json")  # fmt: skip

    def evaluate(self, name: str, systems: str, *more: Any, gates: str | None = "gates", after: Sequence[str] = (),
                 batch: int | None = None, limit: int | None = None) -> None:  # fmt: skip
        q, out = self.q, self.q.out
        folder, dtype = out / "evaluation" / name, () if q.dtype is None else ("--dtype", q.dtype)
        given = () if gates is None else ("--gates", out / gates)
        self.add(f"evaluate {name}", "evaluate", "--base", q.base, "--bank", out / "bank", *given, "--tasks", q.tasks,
                 "--systems", systems, "--limit", limit or q.limit, "--max-prompt", q.max_prompt,
                 "--batch-size", batch or q.evaluation_batch, *dtype, "--out", folder, *more,
                 makes=folder / "table.json",
                 after=(gates or "bank", *after), shares=True)  # fmt: skip

    def evaluate_composites(self, name: str, systems: str, *more: Any, temperature: int = 1, **how: Any) -> None:
        q = self.q
        self.evaluate(name, systems, "--composite", composites(q), "--composite-count", q.composite_count,
                      "--composite-shots", q.composite_shots, "--composite-temperature", temperature, *more,
                      batch=q.composite_batch, **how)  # fmt: skip

    def evaluate_variant(self, name: str) -> None:
        self.evaluate(name, "gates-top1,gates-top2", gates=name, limit=self.q.variant_limit)
        if "composite" in self.q.parts:
            self.evaluate_composites(f"{name}-composite", "gates-top2", gates=name)


def composites(q: Quality) -> str:
    """`--composite` of `meteora evaluate`, with substitutes for the hub's tasks where TASKS has them not."""
    here = lambda task: task if (q.tasks / task).is_dir() else COMPOSITE_10.get(task, task)  # noqa: E731
    own = {str(n): names for n, names in COMPOSITES.items()}
    drawn = {what: tuple(map(here, names)) for what, names in own.items()}
    return ",".join(
        what if drawn.get(what) == own.get(what) else "+".join(drawn[what]) for what in q.composite.split(",")
    )


def plan(q: Quality, names: Sequence[str]) -> list[Job]:
    """All jobs of the parts asked for, the most important first, each after those that it needs."""
    p = Plan(q, names)
    if unknown := sorted(set(q.parts) - set(PARTS)):
        raise InputError(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    p.bank()
    if set(q.parts) & {"single", "composite", "retrieval"}:
        p.gates("gates")
    if "single" in q.parts:
        p.evaluate("single", "gates-top1,gates-top2")
        p.evaluate("plain", "base,oracle", gates=None)
    if "retrieval" in q.parts:
        p.add("index", "index", "build", q.out / "index", "--tasks", q.tasks, "--only", *names,
              makes=q.out / "index" / "index.json", gpus=0)  # fmt: skip
    given = ("--system-bank", *(f"{lora}={q.out / lora}" for lora in p.loras))
    if "baselines" in q.parts:
        p.baselines()
        p.evaluate("baselines", "", *given, gates=None, after=p.loras)
    if "composite" in q.parts:
        p.evaluate_composites("composite", "gates-top1,gates-top2")
        if "baselines" in q.parts:
            p.evaluate_composites("composite-baselines", "", *given, gates=None, after=p.loras)
    if "retrieval" in q.parts:
        p.evaluate("retrieval", RETRIEVAL, "--index", q.out / "index", "--retrieve", min(q.retrieve, len(names) - 1),
                   "--unseen", after=("index",), limit=q.retrieval_limit)  # fmt: skip
    p.variants()
    if "composite" in q.parts:
        p.evaluate_composites("composite-plain", "base", gates=None)
        p.evaluate_composites("composite-warm", "gates-top2", temperature=15)
    return p.jobs


class Runner:
    """Runs jobs: on free GPUs the first in the plan whose needs are met; a failed one fails what needs it."""

    def __init__(self, q: Quality):
        self.q = q
        self.per_gpu = q.per_gpu if q.gpus else 1
        self.free: list[int | None] = [gpu for _ in range(self.per_gpu) for gpu in q.gpus or (None,)]
        self.lock = threading.Lock()
        self.done: dict[str, bool] = {}
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False

    def stop(self) -> None:
        """Ends the jobs that run, and lets no other begin."""
        with self.lock:
            self.stopping = True
            for process in self.processes:
                process.terminate()

    def run(self, jobs: list[Job]) -> list[str]:
        """The names of the jobs that failed, or that needed one that did."""
        (self.q.out / "logs").mkdir(parents=True, exist_ok=True)
        waiting, running = list(jobs), {}
        with ThreadPoolExecutor(len(jobs)) as pool:
            while waiting or running:
                self._start(waiting, running, pool)
                if not running:
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, slots = running.pop(future)
                    self.free += slots
                    self.done[job.name] = future.result()
        return [job.name for job in jobs if not self.done[job.name]]

    def _start(self, waiting: list[Job], running: dict[Future, tuple[Job, list[int | None]]], pool: Any) -> None:
        """Starts what can start; a job that waits for more GPUs lets no later one have them."""
        reserved = False
        if self.stopping:
            self.done |= dict.fromkeys((job.name for job in waiting), False)
            waiting.clear()
        for job in list(waiting):
            needs = [self.done.get(name) for name in job.after]
            if None in needs:
                continue
            if not all(needs) or job.makes.exists():
                self.done[job.name] = all(needs)
                waiting.remove(job)
                self._start(waiting, running, pool)
                return
            slots = self._slots(job)
            if job.gpus and (reserved or not slots):
                reserved = True
                continue
            for slot in slots:
                self.free.remove(slot)
            waiting.remove(job)
            running[pool.submit(self._job, job, slots)] = (job, slots)

    def _slots(self, job: Job) -> list[int | None]:
        """What it can have now: a part of the GPU with most room, or whole ones, each as often as it has parts."""
        gpus, parts = self.q.gpus or (None,), self.per_gpu
        if job.shares:
            return [max(self.free, key=self.free.count)] if self.free and job.gpus else []
        whole = [gpu for gpu in gpus if self.free.count(gpu) == parts]
        wanted = min(job.gpus, len(gpus))
        return [gpu for gpu in whole[:wanted] for _ in range(parts)] if len(whole) >= wanted else []

    def _job(self, job: Job, slots: list[int | None]) -> bool:
        started = time.monotonic()
        log = self.q.out / "logs" / f"{job.name.replace(' ', '-')}.log"
        with log.open("w", encoding="utf-8") as said:
            with self.lock:
                if self.stopping:
                    return False
                process = subprocess.Popen(
                    [sys.executable, *METEORA, *job.arguments], env=self._environment(slots), stdout=said,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
                self.processes.add(process)
            status = process.wait()
            with self.lock:
                self.processes.remove(process)
        self._record(job, status, time.monotonic() - started, log)
        return status == 0

    def _environment(self, slots: list[int | None]) -> dict[str, str]:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str((self.q.out / "cache").absolute()),  # jobs of one kind compile once
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        }
        if not slots or slots[0] is None:
            return {**cache, **os.environ, **({"JAX_PLATFORMS": "cpu"} if self.q.gpus or not slots else {})}
        visible = dict.fromkeys(map(str, slots))
        share = str(round(0.9 * len(slots) / len(visible) / self.per_gpu, 3))
        own = {"CUDA_VISIBLE_DEVICES": ",".join(visible), "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
        return {**cache, **os.environ, **own}

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
    jobs = plan(q, names)
    if q.dry_run:
        for job in jobs:
            print(shlex.join(["meteora", *job.arguments]))
        return 0
    runner = Runner(q)
    signal.signal(signal.SIGTERM, lambda *_: runner.stop())
    clock = threading.Timer(threading.TIMEOUT_MAX if q.seconds is None else q.seconds, runner.stop)
    clock.daemon = True
    clock.start()
    failed = runner.run(jobs)
    clock.cancel()
    tell(q, jobs, collect(q, jobs, len(names)))
    for name in failed:
        console.print(f"not done: {name}")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Quality, description=__doc__)))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
