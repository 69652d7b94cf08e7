"""The public face: load the folders, ask for logits, generate text."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.adapter_files import read_adapter
from meteora_jax.arguments import Arguments
from meteora_jax.completion import Completion, Delta
from meteora_jax.config import PROJECTIONS, BankConfig, InputError, LlamaConfig
from meteora_jax.engine import Progress, Request, Sampling, bind_row
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.request import GREEDY, Trace, check_prompts, check_token_ids
from meteora_jax.gate_config import GateConfig
from meteora_jax.generation import Ended, Engines, pieces, routing_of
from meteora_jax.io.adapter_change import AdapterChange
from meteora_jax.io.model_bank import fill_spectra, rank_in
from meteora_jax.padding import fill_rows, pad_prompts
from meteora_jax.probing import probed
from meteora_jax.prompts import Prompt, encode, is_messages, read_prompt, read_prompts, read_token_ids, user_texts
from meteora_jax.routing import BoundRouter, RouterArgument, RoutingTrace
from meteora_jax.routing.known import bind_known, within_known
from meteora_jax.routing.named import one_a_row, spelled_out
from meteora_jax.routing.retrieval import Found, Reading, Said, look_up, read_texts
from meteora_jax.routing.scores import SHRUNK
from meteora_jax.routing.trace import adapted_places
from meteora_jax.sequences import Run, all_logits, in_parts
from meteora_jax.sharding import Params, place_rows, use_mesh


@dataclasses.dataclass(eq=False, repr=False)
class Meteora:
    """A base with its bank and gates, ready to run. `mj.load` makes it; `add_adapter` and `remove_adapter` change it.

    A shallow copy (`dataclasses.replace(model)`) shares its arrays, and each of both can change by itself.

    gates: they know the first of the bank's adapters; any that were added do without. folder: the BASE folder. pool:
    of a bank that stays on disk but for some slots, whose adapters come and go by its `load` and `unload`.
    """

    config: LlamaConfig
    bank: BankConfig | None
    gates: GateConfig | None
    tokenizer: Any  # transformers' PreTrainedTokenizerBase, whose package is imported where it is used
    graph: nnx.GraphDef
    weights: Params
    mesh: Mesh | None = None
    folder: Path | None = None
    pool: AdapterPool | None = None

    def __repr__(self) -> str:
        names, count = self.adapter_names, len(self.adapter_names)
        named = f": {', '.join(names[:4])}{f' and {count - 4} more' if count > 4 else ''}" if count else ""
        gates = f", {self.gates.form_name} gates of {len(self.gates.names)}" if self.gates else ""
        name = "" if self.folder is None else f"{str(self.folder)!r}, "
        where = jax.devices()[:1] if self.mesh is None else self.mesh.devices.flat
        on = f"{len(where)} {where[0].device_kind}" if self.mesh is not None else where[0].device_kind
        return f"Meteora({name}{self.config.num_layers} layers, {count} adapters{named}{gates}, {self.dtype}, {on})"

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The bank's adapters in its order; empty without a bank."""
        own = self.bank.names if self.bank else ()
        return own if self.pool is None else self.pool.names()

    @property
    def dtype(self) -> str:
        """Of base, adapters and activations: float32, bfloat16 or float16."""
        return str(self.weights["norm"]["scale"].dtype)

    @functools.cached_property
    def _engines(self) -> Engines:
        return Engines(self.graph, self.weights, self.config, self.mesh, self.decode_tokens, self.pool)

    @functools.cached_property
    def _adapted(self) -> np.ndarray | None:
        return adapted_places(self.weights) if self.pool is None else None

    @functools.cached_property
    def _spectra(self) -> Params:
        fill_spectra(self.graph, self.weights, self.mesh)
        return self.weights

    def bind(
        self, router: RouterArgument, batch: int, prompts: Sequence[Sequence[int]] | None = None
    ) -> BoundRouter | None:
        """A caller's `router=` made ready for a batch. prompts: token ids, for adapters with an invocation."""
        return jax.tree.map(jnp.asarray, self._bound(router, batch, prompts))

    def _bound(self, router: Any, batch: int, prompts: Sequence[Sequence[int]] | None) -> BoundRouter | None:
        if self.pool is not None:
            raise InputError("adapter_slots: expected all adapters on the device for this, found slots")
        router = router if prompts is None else self.after_pass(router, prompts)
        bound = bind_known(router, self.bank, self.gates, batch, prompts)
        if bound is not None and bound.asks & SHRUNK:
            _ = self._spectra
        return bound

    def after_pass(self, router: RouterArgument, prompts: Sequence[Sequence[int]]) -> RouterArgument:
        """Routers that choose by one pass of a prompt (token ids), replaced by what they chose."""
        if self.pool is not None:
            return router
        return probed(router, prompts, self.adapter_names, self.graph, lambda: self._spectra, self.mesh)

    def look_up(
        self, router: RouterArgument, batch: int, texts: Callable[[], Sequence[Said]]
    ) -> tuple[RouterArgument, list[Found]]:
        """Routers that read the requests' texts, replaced by what they found; and for each request what that was."""
        routers, found = look_up(spelled_out(router, self.gates, lambda: self.adapter_names), batch, texts)
        return within_known(routers, found, self.adapter_names, self.gates), found

    def add_adapter(self, path: str | os.PathLike[str], name: str, *, any_base: bool = False) -> Meteora:
        """Puts one adapter more into this model, behind the others, and returns the model; refused, it is as it was.

        Arrays are replaced one by one: at most one is in memory twice, and none with adapter slots (`pool.load`).
        Streams that were begun, and an `Engine` of this model, keep what they have, and its memory, to their end. No
        other thread may use the model meanwhile. Gates have no column of the new adapter and go on choosing among
        those that they know; `Fixed` and `Retrieval` reach it (and gates of `meteora train gates --extend`, loaded).

        Args:
            path: a PEFT folder, or a BANK folder that has an adapter of this name.
            name: what it will be called. any_base: take an adapter whose settings name another base.

        Raises:
            InputError: a name that is taken or none, and what `meteora import adapters` refuses.

        Examples:
            >>> model.add_adapter("my-adapters/poems", "poems").adapter_names[-1]
        """
        with Arguments("add_adapter") as given:
            given.path("path", path)
            given.texts("name", [name])
        if self.folder is None:
            raise InputError("add_adapter: expected a model of mj.load, found one whose BASE folder is not known")
        if name in self.adapter_names:
            raise InputError(f"add_adapter: name: expected one that no adapter has, found {name!r}")
        if self.pool is not None:
            self.pool.load(path, name, any_base=any_base)
            return self
        added = read_adapter(Path(path), name, self.folder, self.config, jnp.dtype(self.dtype), any_base)
        bank = added.config if self.bank is None else self.bank.join(added.config)
        order, columns = (*range(len(self.adapter_names)), None), range(self.gates.columns if self.gates else 0)
        return self._change((bank, self.gates), order, columns, added)

    def remove_adapter(self, name: str) -> Meteora:
        """Takes an adapter, and the gates' column of it, out of this model, and returns the model; as in `add_adapter`.

        Args:
            name: the adapter.

        Raises:
            InputError: no adapter has the name, or it is the last one.

        Examples:
            >>> model.remove_adapter("poems").adapter_names[-1]
        """
        if self.bank is None or name not in self.adapter_names:
            found = ", ".join(self.adapter_names) or "none"
            raise InputError(f"remove_adapter: name: expected an adapter's ({found}), found {name!r:.200}")
        if len(self.adapter_names) == 1:
            raise InputError(f"remove_adapter: expected an adapter that stays, found {name!r} alone (load the base)")
        if self.pool is not None:
            self.pool.unload(name)
            return self
        keep = [i for i, n in enumerate(self.adapter_names) if n != name]
        gates, columns = (None, []) if self.gates is None else self.gates.without(name)
        return self._change((self.bank.take(keep, rank_in(self.weights)), gates), keep, columns, None)

    def _change(self, becomes, order, columns, added) -> Meteora:
        change = AdapterChange(self.graph, self.weights, self.config, self.mesh)
        self.weights = nnx.State({})  # the change alone has the arrays
        for name in ("_engines", "_adapted", "_spectra"):
            self.__dict__.pop(name, None)
        try:
            change.run((self.bank, self.gates), becomes, order, columns, added)
            self.bank, self.gates = becomes
        finally:
            self.graph, self.weights = change.graph, change.weights
        return self

    def _as_it_is(self) -> Meteora:
        """For what outlasts this call: the same model, with the same engine, that later changes leave alone."""
        _ = self._engines
        return copy.copy(self)

    def request_text(self, prompt: Prompt | Sequence[int], read: Reading = "last") -> str:
        """What a retrieval reads: the text, that of token ids, or what the user said in messages, last or all."""
        return "\n".join(text for text, _ in read_texts(self.request_texts(prompt), read))

    def request_texts(self, prompt: Prompt | Sequence[int]) -> Said:
        """What retrievals choose from: the text itself, the text of token ids, or the user's messages one by one."""
        return self._request_texts(read_prompt(prompt, "prompt"))

    def _request_texts(self, prompt: Any) -> Said:
        others = user_texts if is_messages(prompt) else self.decode_tokens
        return prompt if isinstance(prompt, str) else others(prompt)

    def logits(
        self, token_ids: Sequence[Sequence[int]] | np.ndarray | jax.Array, router: RouterArgument = "gates if loaded"
    ) -> jax.Array:
        """Next-token logits at every position.

        Args:
            token_ids: int [B, T], or a list of B token lists of any lengths.
            router: as in `generate`; of a list one a row.

        Returns:
            float32 [B, T, V], T the longest row; what stands behind a shorter row's end means nothing.

        Raises:
            InputError: ids that the vocabulary has not, rows beyond the context, an unknown adapter.

        Examples:
            >>> model.logits([model.encode("Name a fruit."), [1, 2]], router=mj.Arrow(top_k=2)).shape
        """
        rows = read_token_ids(token_ids)
        check_prompts(rows, self.config, 0)
        router, _ = self.look_up(router, len(rows), lambda: [self.decode_tokens(row) for row in rows])
        tokens, lengths = pad_prompts(rows)

        def run(tokens: np.ndarray, lengths: np.ndarray, bound: BoundRouter | None) -> jax.Array:
            batch, own = fill_rows((tokens, lengths), bound, self.mesh)
            with use_mesh(self.mesh):
                return all_logits(self.graph, self.weights, *place_rows(batch, self.mesh), own)

        return self.over_rows(router, rows, (tokens, lengths), run)[: len(rows), : int(lengths.max())]

    def over_rows(
        self, router: RouterArgument, rows: Sequence[Sequence[int]], arrays: Sequence[np.ndarray], run: Run
    ) -> Any:
        """`run(*arrays, bound)` of token lists and arrays [B, ...] of them; with slots joined of `in_parts`."""
        if self.pool is None:
            return run(*arrays, self.bind(router, len(rows), rows))
        own = spelled_out(one_a_row(router, len(rows)), self.gates, lambda: self.adapter_names)
        wanted = [self.pool.want(r, row) for r, row in zip(own, rows, strict=True)]
        return in_parts(self.pool, wanted, arrays, run)

    def encode(self, prompt: Prompt) -> list[int]:
        """Text -> token ids as the tokenizer does by itself; a list of messages goes through the chat template."""
        return encode(self.tokenizer, read_prompt(prompt, "prompt"), "prompt")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens left out."""
        (row,) = read_token_ids([token_ids])
        check_token_ids(row, self.config)
        return self.decode_tokens(row)

    def decode_tokens(self, token_ids: Any) -> str:
        """As `decode`, without a check."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        router: RouterArgument = "gates if loaded",
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        routing: Trace = True,
    ) -> list[Completion]:
        """Answers a batch of prompts (text, messages, or token ids), one `Completion` each; greedy at temperature 0.

        Args:
            prompts: texts, lists of messages {"role", "content"}, or lists of token ids, mixed as you like.
            router: any of `mj` (`Gates`, `Fixed`, `Retrieval`, ..), "gates" (as they were trained), "base" or None (the
                bare base), a list of these (one a prompt); by default "gates if loaded", else the base.
            max_new_tokens: at most so many tokens a response; of a list one a prompt.
            temperature: 0 takes the likeliest token; else what logits are divided by before one is drawn.
            top_k, top_p: draws from so many of the likeliest tokens, or from the fewest with this probability, only.
            seed: of the draws; a row's draws depend on it, its place in the batch and the step alone.
            stop: texts that end a response, or one text.
            routing: whether completions say what routed each token (beginnings that were read are read again for it);
                "response": each of the response's tokens, as if there were no prompt.

        Raises:
            InputError: empty prompt, prompt beyond the context, messages that the chat template refuses, text that
                UTF-8 cannot hold, unknown adapter, bad sampling values.

        Examples:
            >>> both = model.generate(["A fruit?", "A tool?"], router=["gates", mj.Fixed("winowhy")], max_new_tokens=4)
            >>> print(both[0].text, both[0].routing)
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        found = dict(self._completed(*self._requests(prompts, router, max_new_tokens, sampling, stop, routing)))
        return [found[i] for i in sorted(found)]

    def completions(
        self, prompts: Sequence[Prompt | Sequence[int]], router: RouterArgument = "gates if loaded",
        max_new_tokens: int | Sequence[int] = 64, stop: Sequence[str] | Sequence[Sequence[str]] = (),
        routing: Trace = True,
    ) -> Iterator[tuple[int, Completion]]:  # fmt: skip
        """As `generate`, greedy: (place in the list, completion) as each ends, so that none waits for a longer one.
        max_new_tokens, stop: the same for all, or a list, one a prompt."""
        asked = self._requests(prompts, router, max_new_tokens, GREEDY, stop, routing)
        return self._as_it_is()._completed(*asked)

    def stream(
        self, prompts: Sequence[Prompt | Sequence[int]], router: RouterArgument = "gates if loaded",
        max_new_tokens: int | Sequence[int] = 64, temperature: float = 0.0, top_k: int | None = None,
        top_p: float | None = None, seed: int = 0, stop: str | Sequence[str] = (), routing: Trace = True,
    ) -> Iterator[Delta | list[Completion]]:  # fmt: skip
        """As `generate`, in pieces: `Delta`s as text becomes certain, then the completions.

        Examples:
            >>> for piece in model.stream(["Name a fruit."], max_new_tokens=4):
            ...     print(piece.text if isinstance(piece, mj.Delta) else piece[0].finish_reason)
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        asked = self._requests(prompts, router, max_new_tokens, sampling, stop, routing)
        return self._as_it_is()._streamed(*asked)

    def _requests(self, prompts, router, max_new_tokens, sampling, stop, routing) -> tuple[list[Request], list[Found]]:
        """What the engine is asked, and what was retrieved for each prompt."""
        with Arguments() as given:
            mosts_of, stops_of = given.ends(max_new_tokens, stop)
            if not isinstance(routing, bool) and routing != "response":
                given.refuse("routing", "true, false or 'response'", routing)
        asked, ids, problems = read_prompts(prompts), [], []
        once = functools.cache(functools.partial(encode, self.tokenizer, where=""))  # a text may be there several times
        for i, prompt in enumerate(asked):
            try:
                ids.append(once(prompt) if isinstance(prompt, str) else encode(self.tokenizer, prompt, f"prompt {i}"))
            except InputError as e:
                problems += e.problems
        if problems:
            raise InputError(problems)
        check_prompts(ids, self.config, mosts := mosts_of(len(ids)))
        router, retrieved = self.look_up(router, len(ids), lambda: list(map(self._request_texts, asked)))
        router = self.after_pass(router, ids)
        if self.pool is None:
            self._bound(router, len(ids), ids)  # refuses all that is wrong at once
        per_prompt = one_a_row(router, len(ids))
        requests = [
            self.request(row, own, most, dataclasses.replace(sampling, index=i), texts, trace=routing)
            for i, (row, own, most, texts) in enumerate(zip(ids, per_prompt, mosts, stops_of(len(ids)), strict=True))
        ]
        return requests, retrieved

    def request(
        self, token_ids: Sequence[int], router: RouterArgument, max_new_tokens: int, sampling: Sampling = GREEDY,
        stop: Sequence[str] = (), logprobs: int | None = None, trace: Trace = False,
    ) -> Request:  # fmt: skip
        """What the engine is asked for one prompt; a router that reads text has been replaced by what it found."""
        prompt = tuple(token_ids)
        if self.pool is not None:
            wanted = self.pool.want(spelled_out(router, self.gates, lambda: self.adapter_names), prompt)
            return Request(prompt, max_new_tokens, None, sampling, tuple(stop), logprobs, trace, wanted)
        bound = self._bound([router, None], 2, [prompt, prompt])  # an array on a device is read behind steps under way
        return Request(prompt, max_new_tokens, bind_row(bound), sampling, tuple(stop), logprobs, trace)

    def _completed(self, requests: list[Request], retrieved: list[Found]) -> Iterator[tuple[int, Completion]]:
        for piece in pieces(self._engines.holding(requests), requests, self.decode_tokens, stream=False):
            assert isinstance(piece, Ended)
            yield piece.index, self.completion(piece.progress, piece.text, retrieved[piece.index])

    def _streamed(self, requests: list[Request], retrieved: list[Found]) -> Iterator[Delta | list[Completion]]:
        found: dict[int, Completion] = {}
        for piece in pieces(self._engines.holding(requests), requests, self.decode_tokens, stream=True):
            if isinstance(piece, Delta):
                yield piece
            else:
                found[piece.index] = self.completion(piece.progress, piece.text, retrieved[piece.index])
        yield [found[i] for i in sorted(found)]

    def completion(self, progress: Progress, text: str, retrieved: Found) -> Completion:
        """What became of a request, with its text."""
        prompt, tokens = progress.request.prompt, progress.tokens
        assert progress.finish_reason is not None
        routing, trace = routing_of(progress), None
        if routing is not None:
            names, (read, indices, weights) = self.adapter_names, routing
            shown = tuple(self.tokenizer.decode([t]) for t in read)
            if self.pool is not None:
                names, indices = self.pool.versions.named_choices(indices)
            first = len(read) - len(tokens)
            trace = RoutingTrace(names, PROJECTIONS, shown, first, indices, weights, retrieved, self._adapted)
        own = tuple((value, tuple(best)) for value, best in progress.logprobs)
        return Completion(text, tokens, progress.finish_reason, len(prompt), trace, own)
