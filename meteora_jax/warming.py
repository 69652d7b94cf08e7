"""Programs compiled before the first request needs them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from meteora_jax.api import Meteora
from meteora_jax.arguments import Arguments
from meteora_jax.engine.scheduler import Limits
from meteora_jax.routing import RouterArgument

Progress = Callable[[str, int, int], None]  # (what was just compiled, how many are, how many in all)


def print_progress(note: str, done: int, total: int) -> None:
    """A line on standard error."""
    print(f"warm-up {done}/{total}: {note}", file=sys.stderr)


def _unequal(size: int, most: int) -> Iterator[list[int]]:
    """Lengths of a call's answers by which its steps meet the other programs: answers do not end together."""
    several = Limits.steps
    single = most - (most - 2) % several  # what is left behind whole dispatches is little: single steps
    if 2 <= single < most:
        yield [single] * size
    if size > 1 and most > 2:
        yield [most, *[2] * (size - 1)]  # fewer rows go on, singly at first


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
    """Compiles what `generate` and `stream` run for requests to come, and runs each once.

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
    shapes = list(itertools.product(sorted(set(batch_sizes), reverse=True), sorted(set(prompt_lengths))))
    for done, (size, length) in enumerate(shapes, start=1):  # the largest first: it decides how many blocks there are
        started = time.perf_counter()
        how: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, routing=routing)
        longest = size
        while longest:  # a call whose other prompts are short has programs of fewer prompt tokens
            prompts = [[0] * length] * longest + [[0]] * (size - longest)
            model.generate(prompts, router, max_new_tokens, **how)
            longest //= 2
        for mosts in _unequal(size, max_new_tokens):
            model.generate([[0] * length] * size, router, mosts, **how)
        if progress is not None:
            took = time.perf_counter() - started
            progress(f"{size} x {length} prompt tokens in {took:.1f} s", done, len(shapes))
    return time.perf_counter() - began
