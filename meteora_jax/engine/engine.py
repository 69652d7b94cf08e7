"""Continuous batching: requests come and go while others decode.

The host plans a dispatch, hands it to the device and does not wait: while the device works, the tokens of the dispatch
before are read, and what they end is taken out. Everything that decides who is served is `Scheduler`, which knows of no
device; everything the device does is `run_steps`, which knows of no request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.config import PROJECTIONS, InputError, LlamaConfig
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.ahead import AheadCompiler, abstract
from meteora_jax.engine.batch import Dispatch, JoinedRouters, dispatch_of, prompt_sizes, row_sizes, traced
from meteora_jax.engine.handle import Handle
from meteora_jax.engine.job import Job
from meteora_jax.engine.prefix_cache import PrefixCache
from meteora_jax.engine.programs import Program, Sizes, idle, programs
from meteora_jax.engine.request import BoundRow, FinishReason, Progress, Request, Trace, check_prompts
from meteora_jax.engine.scheduler import Limits, Plan, Scheduler
from meteora_jax.engine.step import EngineState, StepResult, new_state, run_steps
from meteora_jax.execution import platform
from meteora_jax.routing import NO_ADAPTER
from meteora_jax.sharding import Params, fetch, place_whole, use_mesh
from meteora_jax.text import Decode
from pallas_kernels.paged_attention import EMPTY, QUERY_BLOCK

IN_FLIGHT = 2  # dispatches: one that the device works on, one behind it


@dataclasses.dataclass(frozen=True)
class EngineSize:
    """How much an engine holds at once.

    rows: sequences. tokens: of prompts and decoding rows in one step. blocks, block_size: of the paged cache; all
    sequences share blocks * block_size positions.
    """

    rows: int
    tokens: int
    blocks: int
    block_size: int = 16

    def __post_init__(self):
        if self.tokens < self.rows + QUERY_BLOCK:
            expected = f"at least {self.rows + QUERY_BLOCK} (rows and {QUERY_BLOCK} of a prompt)"
            raise InputError(f"Engine: tokens: expected {expected}, found {self.tokens}")


@dataclasses.dataclass
class Counters:
    """What an engine has done since it was made."""

    dispatches: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class EngineCore:
    """Serves requests by one model. Who waits for a result moves it on; so may a thread by `step`."""

    def __init__(
        self, graph: nnx.GraphDef, weights: Params, config: LlamaConfig, size: EngineSize, *, mesh: Mesh | None = None,
        decode: Decode | None = None, prefix_cache: bool = True, pool: AdapterPool | None = None,
        few_programs: bool = False,
    ):  # fmt: skip
        """decode: token ids -> text, which stop strings need. pool: of the adapters, where the model has slots.
        few_programs: for callers who wait for all that they submit: see `job`."""
        self.pool = pool
        self.graph, self.weights, self.config, self.size, self.mesh = graph, weights, config, size, mesh
        self.counters = Counters()
        grows = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
        # there a prompt's keys depend on its length
        cache = PrefixCache(size.blocks, size.block_size, prefix_cache and not grows)
        self.row_sizes, self.prompt_sizes = row_sizes(size.rows), prompt_sizes(size.tokens)
        self.scheduler = Scheduler(Limits(size.rows, size.tokens, prompt_sizes=self.prompt_sizes), cache, pool)
        self._decode = decode
        self.table_sizes = (*(8 << 2 * i for i in range(12) if 8 << 2 * i < size.blocks), size.blocks)
        self._end = place_whole(jnp.asarray(config.eos_token_ids or (-1,), jnp.int32), mesh)
        self._job = Job(nnx.merge(graph, weights).execution.reads_filled(mesh)) if few_programs else None
        self._routers = JoinedRouters(mesh)
        self._ahead = AheadCompiler()
        self._handles: dict[int, Handle] = {}
        self._numbers = 0
        self._in_flight: deque[tuple[Dispatch, StepResult, np.ndarray | None]] = deque()  # and what lay in the slots
        self._lock = threading.RLock()  # of everything above
        self._news = threading.Condition()
        self._failure: BaseException | None = None
        with self._exclusive(), use_mesh(mesh):
            self._state: EngineState = new_state(graph, weights, size.blocks, size.block_size, size.rows)
        if pool is not None:
            pool.sharing.add(self, self.scheduler)
        if pool is not None and mesh is None:  # bound to its device as steps leave it: else the next compiles anew
            self._state = jax.device_put(self._state, jax.devices()[0])

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return self.scheduler.busy or bool(self._in_flight)

    @property
    def serving(self) -> bool:
        """Whether somebody waits for a result."""
        return self.scheduler.busy

    @property
    def failed(self) -> bool:
        """Whether the device raised an error; nothing is served any more."""
        return self._failure is not None

    def submit(self, request: Request) -> Handle:
        """Queues a request.

        Raises:
            InputError: no prompt, tokens the model does not have, more positions than its context or the cache has; an
                adapter that was unloaded since the request was made.
        """
        check_prompts([request.prompt], self.config, request.max_new_tokens)
        most, capacity = len(request.prompt) + request.max_new_tokens, self.scheduler.capacity()
        if most > capacity:
            raise InputError(f"prompt: expected at most {capacity} tokens with its response (the cache), found {most}")
        with self._lock:
            progress = Progress(request, self._numbers, list(request.prompt))
            if self._job is not None:
                if not self.busy:
                    self._job.clear()
                self._job.add(request)
                sizes = self._job.prompts(self.prompt_sizes)
                self.scheduler.limits = dataclasses.replace(self.scheduler.limits, prompt_sizes=sizes)
            if request.adapters is not None and self.pool is not None:
                self.pool.enlist(request.adapters)
            handle = self._handles[self._numbers] = Handle(self, progress, self._decode)
            self._numbers += 1
            self.scheduler.add(progress)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Ends a request wherever it stands; its blocks are others' from now on."""
        with self._lock:
            if not handle.done:
                self._finish(handle, "cancelled")
        self._tell()

    def advance(self, handle: Handle | None) -> None:
        """One round for the sake of a request (None: of any): by this thread, or awaited if another is at it."""
        if self._lock.acquire(blocking=False):
            try:
                if handle is None or not handle.done:
                    self.step()
            finally:
                self._lock.release()
        elif handle is not None:
            with self._news:
                self._news.wait(0.05)

    def step(self) -> bool:
        """One round: plans and dispatches if there is something to do, reads the oldest results if enough are under way
        or nothing else is left. False: there was nothing at all.

        Raises:
            RuntimeError: what the device raised, here and from every request that was under way.
        """
        with self._lock:
            if (found := self._round()) is None:  # its requests wait for slots alone
                assert self.pool is not None
                self.pool.wait(self)
        self._tell()
        return found is not False

    def step_for_others(self) -> bool:
        """One round for the sake of another engine, which waits for slots that requests of this one hold; False: there
        was none, or another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return not self.failed and self.busy and self._round() is True
        except Exception:
            return True  # those who wait here are told so; the slots are free
        finally:
            self._lock.release()
            self._tell()

    def _round(self) -> bool | None:
        """One round, as `step` says; None: there is nothing to do before somebody gives slots back or copies arrive."""
        if self._failure is not None:
            raise RuntimeError("the engine has failed") from self._failure
        try:
            if (job := self._job) is not None and job.changed:
                job.changed = False
                # on a CPU the compiler's cores are the model's
                if platform() != "cpu" and self.pool is None and job.alike():
                    self.compile(job.requests, None)
            with self._exclusive():
                if self.pool is not None:
                    self.pool.advance()
                plan = self.scheduler.plan(in_flight=bool(self._in_flight))
                if plan is not None:
                    self._dispatch(plan)
            refused = self._refuse()
            if self._in_flight and (plan is None or len(self._in_flight) >= IN_FLIGHT):
                self._read()
            elif plan is None and not refused:
                return None if self.pool is not None and self.scheduler.busy else False
        except BaseException as e:
            self._failure = e
            self._ahead.stop()
            for handle in self._handles.values():
                self.scheduler.release(handle.progress)  # others share the pool
            raise
        return True

    def _exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts no other thread changes what lies in the slots."""
        return contextlib.nullcontext() if self.pool is None else self.pool.lock

    def _refuse(self) -> bool:
        """Ends the requests whose adapters cannot be read; whether there were any."""
        refused = [p for p in self.scheduler.waiting if p.failure is not None]
        for p in refused:
            self._finish(self._handles[p.number], "cancelled")
        return bool(refused)

    def drain(self) -> None:
        """Serves until no request is left."""
        while self.busy:
            self.step()

    def warm(self, requests: Sequence[Request]) -> None:
        """Serves requests, which differ in their lengths alone, and then runs, for nobody, every program that the same
        together can meet whenever their adapters arrive and their responses end."""
        handles = [self.submit(request) for request in requests]
        if self.pool is None:  # else its router is known when it has slots
            self.compile(requests, handles[0].progress.router)
        self.drain()
        for handle in handles:
            handle.check()
        with self._lock, self._exclusive():
            for work in self.compile(requests, handles[0].progress.router):
                jax.block_until_ready(self._run(work, requests[0].logprobs, requests[0].trace))

    def compile(
        self, requests: Sequence[Request], router: BoundRow | None, found: Sequence[Program] = ()
    ) -> Iterator[Dispatch]:
        """Begins to compile programs: those `found`, or all that requests which differ in their lengths can meet. The
        next dispatch waits for them. Of each a dispatch for nobody."""
        with self._lock:
            (sizes, kinds), one = self._sizes(), requests[0]
            kinds = kinds or (() if router is None else (router,))
            found = found or [*programs(requests, sizes, self.size.block_size, self.scheduler.limits.steps)]
            args = one, self.size.rows, self.config.vocab_size, kinds, self._routers
            how = abstract(self._state), one.logprobs, one.trace
            if self.mesh is None or not self.mesh.is_multi_process:  # hosts compile in one order
                self._ahead.begin(
                    found, one, kinds, lambda p: idle(p, *args), lambda work: self._call(run_steps.lower, work, *how)
                )
        return (idle(program, *args) for program in found)

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()

    def _dispatch(self, plan: Plan) -> None:
        slots = None
        if self.pool is not None:
            slots = self.pool.numbers()
            for p in (*plan.decoding, *(c.progress for c in plan.chunks)):
                if (wanted := p.request.adapters) is not None and wanted.every and p.placed_at != self.pool.changes:
                    p.placed, p.placed_at = self.pool.place(wanted), self.pool.changes
        sizes, kinds = self._sizes()
        rows, vocabulary = sizes.reading if plan.chunks else sizes.rows, self.config.vocab_size
        work = dispatch_of(plan, rows, sizes.prompts, sizes.tables, vocabulary, kinds, self._routers)
        asked = [p.request.logprobs for p in work.owners if p.request.logprobs is not None]
        result = self._run(work, max(asked) if asked else None, traced(work))
        for leaf in jax.tree.leaves(result):
            if leaf.is_fully_addressable:
                leaf.copy_to_host_async()
        self._in_flight.append((work, result, slots))
        self.counters.dispatches += 1
        self.counters.steps += work.steps
        self.counters.prompt_tokens += sum(c.stop - c.start for c, _ in work.chunks)

    def _sizes(self) -> tuple[Sizes, Sequence[BoundRow]]:
        """Of the programs in use, and the routers whose kinds are among every dispatch's."""
        every = Sizes.of(self.row_sizes, self.prompt_sizes, self.table_sizes)
        if self._job is None:
            return every, ()
        return self._job.sizes(every, self.size.block_size), tuple(self._job.kinds.values())

    def _run(self, work: Dispatch, logprobs: int | None, trace: Trace) -> StepResult:
        """Gives a dispatch to the device."""
        self._ahead.wait()
        self._state, result = self._call(run_steps, work, self._state, logprobs, trace)
        return result

    def _call(self, function: Any, work: Dispatch, state: EngineState, logprobs: int | None, trace: Trace) -> Any:
        rows, prompt = place_whole((work.rows, work.prompt), self.mesh)
        given = self.graph, self.weights, state, rows, prompt, work.router, self._end
        with use_mesh(self.mesh):
            return function(*given, steps=work.steps, logprobs=logprobs, trace=trace)

    def _read(self) -> None:
        """Waits for the oldest dispatch and gives everyone what is theirs."""
        work, result, slots = self._in_flight.popleft()
        told = fetch(result.tokens).T
        tokens, counts = told.tolist(), np.sum(told != EMPTY, axis=1).tolist()  # a row that draws no more is EMPTY
        over = np.isin(told, self.config.eos_token_ids)
        ends = np.where(over.any(axis=1), over.argmax(axis=1), -1).tolist()
        logprob = None if result.logprob is None else fetch(result.logprob)
        likely = None if result.likely is None else tuple(map(fetch, result.likely))
        trace = None if result.trace is None else tuple(map(fetch, result.trace))
        if trace is not None and slots is not None:  # a slot's number says nothing later
            indices = np.where(trace[0] == NO_ADAPTER, NO_ADAPTER, slots[trace[0]])
            trace = indices, np.where((indices == NO_ADAPTER) & (trace[0] != NO_ADAPTER), 0, trace[1])
        for chunk, first in work.chunks:
            p, at = chunk.progress, first - chunk.start
            start = max(chunk.start, p.recorded)
            if trace is not None and p.request.trace and p.router is not None and start < chunk.stop:
                self._traced(p, *(np.moveaxis(z[0, :, at + start : at + chunk.stop], 1, 0) for z in trace))
        read = len(work.owners) - len(work.chunks)  # rows that read a token of their own
        drawing = [int(chunk.last) for chunk, _ in work.chunks]
        for b, p in enumerate(work.owners):
            if (handle := self._handles.get(p.number)) is None:
                continue
            drawn = tokens[b][: counts[b]]
            asked = min(work.steps, p.request.max_new_tokens - len(p.tokens)) if b < read else drawing[b - read]
            if len(drawn) < asked and ends[b] < 0:  # else it would be waited for without an end
                raise RuntimeError(f"expected {asked} tokens of a request in a step, found {len(drawn)}")
            if trace is not None and p.request.trace and p.router is not None and b < read:
                self._traced(p, *(z[: len(drawn), :, b] for z in trace))
            if not drawn:
                continue
            kept = drawn if (end := ends[b]) < 0 else drawn[:end]
            before = len(p.tokens)
            stopped = handle._take(kept)
            if logprob is not None and p.request.logprobs is not None:
                for i in range(len(p.tokens) - before):
                    best = [] if likely is None else list(zip(*(z[i, b].tolist() for z in likely), strict=True))
                    p.logprobs.append((float(logprob[i, b]), best[: p.request.logprobs]))
            self.counters.new_tokens += len(drawn)
            self.scheduler.learned(p)
            if stopped:
                self._finish(handle, "stop")
            elif end >= 0:
                self._finish(handle, "end")
            elif len(p.tokens) >= p.request.max_new_tokens:
                self._finish(handle, "length")

    def _traced(self, progress: Progress, indices: np.ndarray, weights: np.ndarray) -> None:
        """Adds the routing of tokens as [T, L, P, C]; a choice that waits for its invocation is no adapter yet."""
        shape = len(indices), self.config.num_layers, len(PROJECTIONS), indices.shape[-1]
        chosen = np.where(weights == 0, NO_ADAPTER, indices)
        progress.routing.append((np.broadcast_to(chosen, shape), np.broadcast_to(weights, shape)))

    def _finish(self, handle: Handle, reason: FinishReason) -> None:
        self.scheduler.release(handle.progress)
        handle.progress.finish_reason = reason
        del self._handles[handle.progress.number]
