"""How many tokens a second systems generate at growing batch sizes (LoraRetriever's figure 4), side by side.

End tokens are ignored, so that every system and request generates as many tokens; what a request retrieves is looked up
before the clock starts and timed by itself. Systems take turns, and medians are reported.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meteora_jax.evaluation.charts import save_picture
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.systems import System
from meteora_jax.evaluation.table import escaped
from meteora_jax.generation import Engines
from meteora_jax.prompts import user_texts
from meteora_jax.routing.picture import drawable
from meteora_jax.routing.retrieval import look_up


def choose_prompts(problems: Sequence[Problem], batch: int) -> list[Problem]:
    """`batch` problems around the median length; all of them in turns where there are fewer."""
    ordered = sorted(problems, key=lambda p: (len(p.prompt), p.id))
    start = max(0, (len(ordered) - batch) // 2)
    middle = ordered[start : start + batch]
    return [middle[i % len(middle)] for i in range(batch)]


def time_generation(system: System, problems: Sequence[Problem], new_tokens: int) -> dict[str, float]:
    """Seconds of one batch: `retrieval` of its adapters, or the pass that chooses
    them; `prefill`, until every request has its first token; `decoding`
    of the rest of its `new_tokens`."""
    model: Any = system.model
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=()))
    ids = [model.encode(p.asked) for p in problems]
    start = time.perf_counter()
    routers = [system.route(p) for p in problems]
    router, _ = look_up(
        routers, len(problems), lambda: [user_texts(p.messages) if p.messages else p.prompt for p in problems]
    )
    router = model.after_pass(router, ids)
    found = time.perf_counter()
    requests = [model.request(row, own, new_tokens) for row, own in zip(ids, router, strict=True)]
    engine = Engines(model.graph, model.weights, model.config, model.mesh, None).holding(requests)
    begin = time.perf_counter()
    handles = [engine.submit(request) for request in requests]
    while not all(h.progress.tokens for h in handles):
        engine.step()
    read = time.perf_counter()
    engine.drain()
    done = time.perf_counter()
    counts = {len(h.progress.tokens) for h in handles}
    assert counts == {new_tokens}, counts
    return {"retrieval": found - start, "prefill": read - begin, "decoding": done - read}


def measure(
    systems: Sequence[System],
    problems: Sequence[Problem],
    batch_sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """A record a batch size and system.

    Returns:
        {"system", "batch", "prompt_tokens" (of the longest prompt), "new_tokens", the median "retrieval_s", "prefill_s"
        and "decoding_s", "tokens_per_s" (all new tokens over prefill and decoding), "decoding_tokens_per_s",
        "requests_per_s"}.
    """
    records, total, count = [], len(batch_sizes) * repeats * len(systems), 0
    for size in batch_sizes:
        chosen = choose_prompts(problems, size)
        longest = max(len(systems[0].model.encode(p.asked)) for p in chosen)
        for system in systems:  # compiles
            time_generation(system, chosen, new_tokens)
        samples: dict[str, list[dict[str, float]]] = {s.name: [] for s in systems}
        for _ in range(repeats):
            for system in systems:
                samples[system.name].append(time_generation(system, chosen, new_tokens))
                count += 1
                if progress is not None:
                    progress(count, total, f"{system.name}, batch {size}")
        for name, rows in samples.items():
            median = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
            spent = median["prefill"] + median["decoding"]
            records.append({
                "system": name, "batch": size, "prompt_tokens": longest, "new_tokens": new_tokens,
                **{f"{part}_s": value for part, value in median.items()},
                "tokens_per_s": size * new_tokens / spent, "requests_per_s": size / spent,
                "decoding_tokens_per_s": size * (new_tokens - 1) / median["decoding"],
            })  # fmt: skip
    return records


def throughput_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Tokens a second by system and batch size, in brackets over the first system's; decoding alone below."""
    sizes, systems = (list(dict.fromkeys(r[key] for r in records)) for key in ("batch", "system"))
    cells = {(r["system"], r["batch"]): r for r in records}
    lines = ["| new tokens a second | " + " | ".join(f"batch {n}" for n in sizes) + " |"]
    lines.append("| --- " * (len(sizes) + 1) + "|")
    for what, key in (("", "tokens_per_s"), (", decoding alone", "decoding_tokens_per_s")):
        for system in systems:
            values = [(cells[system, n][key], cells[systems[0], n][key]) for n in sizes]
            lines.append(
                f"| {escaped(system)}{what} | " + " | ".join(f"{v:.1f} ({v / first:.2f})" for v, first in values) + " |"
            )
    return "\n".join(lines) + f"\n\nIn brackets: over {escaped(systems[0])}.\n"


def write_throughput(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens a second against the batch size, a line a system."""

    def draw(figure: Any) -> None:
        figure.set_size_inches(7, 4.5)
        axes = figure.add_subplot()
        for system in dict.fromkeys(r["system"] for r in records):
            own = [r for r in records if r["system"] == system]
            axes.plot([r["batch"] for r in own], [r["tokens_per_s"] for r in own], marker="o", label=drawable(system))
        sizes = np.unique([r["batch"] for r in records])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set(xlabel="batch size", ylabel="new tokens a second", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    save_picture(draw, path)
