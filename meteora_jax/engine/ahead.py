"""Programs that are compiled before a dispatch needs them, several at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax

from meteora_jax.engine.batch import Dispatch
from meteora_jax.engine.programs import Program
from meteora_jax.engine.request import BoundRow, Request

THREADS = 16  # at most


class AheadCompiler:
    """Compiles programs in threads of its own. A call of the same program then finds it compiled: JAX keeps what it
    lowers by function and types of the arguments, and with it what was compiled of it."""

    def __init__(self) -> None:
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._begun: set[Hashable] = set()
        self._pending: list[concurrent.futures.Future[None]] = []

    def begin(
        self, programs: Iterable[Program], like: Request, kinds: Sequence[BoundRow],
        idle: Callable[[Program], Dispatch], lower: Callable[[Dispatch], Any],
    ) -> None:  # fmt: skip
        """Begins to compile programs that it has not begun before.

        Args:
            like: a request that they serve. kinds: of their routers. lower: a dispatch -> `jax.stages.Lowered`.
        """
        if self._threads is None:
            self._threads = concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "compiler")
        drawn = dataclasses.replace(like.sampling, seed=0, index=0)
        how = drawn, like.logprobs, like.trace, tuple(k.kind for k in kinds)
        for program in programs:
            if (program, how) not in self._begun:
                self._begun.add((program, how))
                self._pending.append(self._threads.submit(_compile, functools.partial(lower, idle(program))))

    def wait(self) -> None:
        """Waits for all of them: a GPU's compiler times products, which steps would disturb. An error is left to the
        call that meets it again."""
        if self._pending:
            concurrent.futures.wait(self._pending)
            self._pending.clear()

    def stop(self) -> None:
        """Gives up what no thread has begun: a process would compile it before it ends."""
        for future in self._pending:
            future.cancel()


def _compile(lower: Callable[[], Any]) -> None:
    lower().compile()  # both let other threads run: XLA's compiler, and on a GPU Triton's, which lowering calls


def abstract(tree: Any) -> Any:
    """Arrays by their types alone, with the devices of those that are bound to theirs."""

    def of(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)

    return jax.tree.map(of, tree)
