"""What a schedule costs without a device: the plans of requests that come all at once, priced by what steps took.

    python scripts/bench_schedule.py                     # the requests of bench_engine.py's last measurement
    python scripts/bench_schedule.py --requests 1024

The scheduler is the engine's own, and so are its plans: nothing in them depends on the model or on time. The price is
one H200's for Llama-3-8B's shape, bare (docs/performance.md, "The engine"): decoding steps by rows, prompts by tokens;
a step with prompts takes the decoding step of its rows beside.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np
import tyro
from bench_timing import console

from meteora_jax.engine.batch import prompt_sizes, round_up, row_sizes
from meteora_jax.engine.prefix_cache import PrefixCache
from meteora_jax.engine.programs import Sizes
from meteora_jax.engine.request import Progress, Request
from meteora_jax.engine.scheduler import Limits, Plan, Scheduler
from pallas_kernels.paged_attention import QUERY_BLOCK

DECODING = {1: 4.64, 8: 4.96, 32: 5.55, 64: 6.17, 128: 8.36, 256: 14.2}  # rows -> ms
PROMPTS = {0: 8.0, 512: 17.5, 4096: 88.0, 16384: 347.0}  # tokens -> ms; 0 by the line through those behind it
IN_FLIGHT = 2  # dispatches, as in the engine


@dataclasses.dataclass(frozen=True)
class BenchSchedule:
    """Prices a schedule."""

    requests: int = 256
    """Prompts of 64 to 1,024 tokens and responses of 16 to 256, all at once."""
    rows: int = 128
    """Sequences that decode at once."""
    budget: int = 16384
    """Tokens of prompts in a step."""
    seed: int = 0
    """Of the lengths; 0 has those of `bench_engine.py`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A dispatch: its decoding steps, rows that decode and rows of its program, prompt tokens and those of its
    program, and the most blocks of a row."""

    steps: int
    decoding: int
    rows: int
    prompt: int
    padded: int
    blocks: int

    def parts(self) -> tuple[float, float]:
        """Milliseconds of its prompts and of decoding."""
        prompts = float(np.interp(self.padded, [*PROMPTS], [*PROMPTS.values()])) if self.padded else 0.0
        return prompts, self.steps * float(np.interp(self.rows, [*DECODING], [*DECODING.values()])) * (
            self.decoding > 0
        )


def lengths(settings: BenchSchedule) -> list[tuple[int, int]]:
    """Tokens of each prompt and of its response."""
    draw, count = np.random.default_rng(settings.seed), settings.requests
    return list(zip(draw.integers(64, 1025, count).tolist(), draw.integers(16, 257, count).tolist(), strict=True))


def schedule(asked: Sequence[tuple[int, int]], most: int, budget: int) -> tuple[list[Step], list[float]]:
    """The dispatches, and when the first token of each request is known, in ms.

    Args:
        asked: tokens of each prompt and of its response. most: rows at once. budget: prompt tokens in a step.
    """
    rows, prompts = row_sizes(most), prompt_sizes(budget + most)
    reading, blocks = Sizes.of(rows, prompts, ()).reading, most * (sum(map(max, zip(*asked, strict=True))) // 16 + 2)
    scheduler = Scheduler(Limits(most, budget + most, prompt_sizes=prompts), PrefixCache(blocks, 16, False))
    for i, (prompt, new) in enumerate(asked):
        scheduler.add(Progress(Request((7,) * prompt, new), i, [7] * prompt))
    steps, first, now = list[Step](), dict[int, float](), 0.0
    in_flight: deque[tuple[Plan, float]] = deque()
    while scheduler.busy or in_flight:
        if (plan := scheduler.plan(bool(in_flight))) is not None:
            runs = sum(-(-(c.stop - c.start) // QUERY_BLOCK) for c in plan.chunks)
            read = sum(c.stop - c.start for c in plan.chunks)
            padded = round_up(runs * QUERY_BLOCK, prompts) if runs else 0
            owners = [*plan.decoding, *(c.progress for c in plan.chunks)]
            used, widest = round_up(len(owners), reading if runs else rows), max(len(p.blocks) for p in owners)
            steps.append(Step(plan.steps, len(plan.decoding), used, read, padded, widest))
            now += sum(steps[-1].parts())
            in_flight.append((plan, now))
        if in_flight and (plan is None or len(in_flight) == IN_FLIGHT):
            done, at = in_flight.popleft()
            for p in [*done.decoding, *(c.progress for c in done.chunks if c.last)]:
                p.tokens += [7] * min(done.steps, p.request.max_new_tokens - len(p.tokens))
                first.setdefault(p.number, at)
                if len(p.tokens) == p.request.max_new_tokens and p.finish_reason is None:
                    p.finish_reason = "length"
                    scheduler.release(p)
    return steps, [*first.values()]


def main(settings: BenchSchedule) -> None:
    """Prints the sum and its parts."""
    steps, first = schedule(lengths(settings), settings.rows, settings.budget)
    prompts, decoding = (sum(part) for part in zip(*(s.parts() for s in steps), strict=True))
    new = sum(n for _, n in lengths(settings))
    last = max(i for i, s in enumerate(steps) if s.padded)
    reading, tail = [s for s in steps if s.padded], steps[last + 1 :]
    rate, full = 347 / 16384, DECODING[128] / 128
    lines = {
        "all": f"{prompts + decoding:.0f} ms, {1e3 * new / (prompts + decoding):.0f} new tokens/s; "
        f"{len(steps)} dispatches, {sum(s.steps for s in steps)} steps",
        "first tokens": f"mean {np.mean(first):.0f} ms, median {np.median(first):.0f}, last {max(first):.0f}",
        "prompts": f"{prompts:.0f} ms in {len(reading)} steps, {sum(s.prompt for s in reading)} tokens padded to "
        f"{sum(s.padded for s in reading)}; in steps of 16,384: {sum(s.prompt for s in reading) * rate:.0f} ms",
        "decoding": f"{decoding:.0f} ms; at the rate of 128 rows: {(new - settings.requests) * full:.0f} ms",
        "behind the last prompt": f"{sum(sum(s.parts()) for s in tail):.0f} ms in {sum(s.steps for s in tail)} steps; "
        f"at the rate of 128 rows: {sum(s.steps * s.decoding for s in tail) * full:.0f} ms",
    }
    for name, said in lines.items():
        console.print(f"{name}: {said}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(BenchSchedule, description=__doc__))
