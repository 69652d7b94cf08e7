"""Programs compiled before the first request needs them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence

from meteora_jax.api import Meteora
from meteora_jax.arguments import Arguments
from meteora_jax.engine import Sampling
from meteora_jax.routing import RouterArgument

Progress = Callable[[str, int, int], None]  # (what was just compiled, how many are, how many in all)


def print_progress(note: str, done: int, total: int) -> None:
    """A line on standard error."""
    print(f"warm-up {done}/{total}: {note}", file=sys.stderr)


def warm_up(
    model: Meteora,
    prompt_lengths: Sequence[int] = (64,),
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    router: RouterArgument = "gates if loaded",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    routing: bool = True,
    progress: Progress | None = print_progress,
) -> float:
    """Compiles what `generate` and `stream` run for requests to come, and runs each once; with adapter slots whatever
    the time at which adapters arrive in them.

    A program serves a number of rows (1, 8, 32, 64, 128, 256), a number of prompt tokens in a step (64, 128, 256, ...),
    the kinds of router among its rows, and a way of sampling: whether there are a temperature, top-k or top-p, not
    their values.

    Args:
        model: of `load`.
        prompt_lengths: tokens of the prompts.
        batch_sizes: prompts of a call.
        max_new_tokens, router, temperature, top_k, top_p, routing: as the calls to come will have them.
        progress: called after each size; None: nothing is said.

    Returns:
        seconds in all.

    Raises:
        InputError: as `Meteora.generate`.

    Examples:
        >>> mj.warm_up(model, prompt_lengths=[16], batch_sizes=[1], max_new_tokens=4, progress=None)
    """
    with Arguments("warm_up") as given:
        for name, values in (("prompt_lengths", prompt_lengths), ("batch_sizes", batch_sizes)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                given.refuse(name, "a list of whole numbers", values)
                continue
            for value in values:
                given.whole(name, value)
    began = time.perf_counter()
    sampling = Sampling(temperature, top_k, top_p)
    shapes = list(itertools.product(sorted(set(batch_sizes), reverse=True), sorted(set(prompt_lengths))))
    for done, (size, length) in enumerate(shapes, start=1):  # the largest first: it decides how many blocks there are
        started = time.perf_counter()
        longest = size
        while longest:  # a call whose other prompts are short has programs of fewer prompt tokens
            prompts = [[0] * length] * longest + [[0]] * (size - longest)
            requests, _ = model._requests(prompts, router, max_new_tokens, sampling, (), routing)
            model._engines.holding(requests).warm(requests)
            longest //= 2
        if progress is not None:
            took = time.perf_counter() - started
            progress(f"{size} x {length} prompt tokens in {took:.1f} s", done, len(shapes))
    return time.perf_counter() - began
