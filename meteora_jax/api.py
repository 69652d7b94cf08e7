"""The public face: load the folders, ask for logits, generate text."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.arguments import Arguments
from meteora_jax.config import PROJECTIONS, BankConfig, InputError, LlamaConfig
from meteora_jax.execution import default_dtype, jit, platform
from meteora_jax.gate_config import GateConfig
from meteora_jax.generation import Generator, Sampling, check_prompts, check_token_ids, pad_batch
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.gates import load_gates
from meteora_jax.io.model_state import assemble
from meteora_jax.model.kv_cache import EMPTY
from meteora_jax.model.llama import pack
from meteora_jax.prompts import Prompt, is_messages, read_prompt, read_prompts, read_token_ids, render_chat
from meteora_jax.routing import BoundRouter, RoutingTrace, bind
from meteora_jax.routing.alora import watch
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.retrieval import Found, look_up
from meteora_jax.routing.trace import adapted_places
from meteora_jax.sharding import Params, place_rows, use_mesh
from meteora_jax.text import TextStream, load_tokenizer

FinishReason = Literal["end", "stop", "length"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One response.

    token_ids exclude the end token; `text` ends before a stop string, whose tokens token_ids still hold.
    routing covers prompt and response; None where no router acted.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_length: int
    routing: RoutingTrace | None


@dataclasses.dataclass(frozen=True)
class Delta:
    """A piece of streamed text: `text` is to be appended to response `index`."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class Meteora:
    """A base with its bank and gates, ready to run. Made by `load`."""

    config: LlamaConfig
    bank: BankConfig | None
    gates: GateConfig | None
    tokenizer: Any  # transformers' PreTrainedTokenizerBase, whose package is imported where it is used
    graph: nnx.GraphDef
    weights: Params
    mesh: Mesh | None = None

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The bank's adapters in its order; empty without a bank."""
        return self.bank.names if self.bank else ()

    @property
    def dtype(self) -> str:
        """Of base, adapters and activations: float32, bfloat16 or float16."""
        return str(self.weights["embed"].dtype)

    @functools.cached_property
    def _adapted(self) -> np.ndarray | None:
        return adapted_places(self.weights)

    def bind(self, router: Any, batch: int, prompts: Sequence[Sequence[int]] | None = None) -> BoundRouter | None:
        """A caller's `router=` made ready for a batch; adapters with an invocation need the prompts' token ids."""
        if isinstance(router, str) and router == "gates if loaded":
            router = Gates(self.gates.top_k, self.gates.temperature) if self.gates else None
        return watch(bind(router, self.adapter_names, batch, self.gates is not None), self.bank, prompts)

    def request_text(self, prompt: Prompt | Sequence[int]) -> str:
        """What a retrieval reads: the text itself, what the user said in messages, or the text of token ids."""
        return self._request_text(read_prompt(prompt, "prompt"))

    def _request_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        if is_messages(prompt):
            return "\n".join(m["content"] for m in prompt if m["role"] == "user")
        return self._decode(prompt)

    def logits(self, token_ids: Any, router: Any = "gates if loaded") -> jax.Array:
        """Next-token logits at every position.

        Args:
            token_ids: int [B, T], or a list of B token lists of any lengths.
            router: `Gates`, `Fixed`, None (bare base), a list of them (one a row); by default the gates if loaded.

        Returns:
            float32 [B, T, V], T the longest row; what stands behind a shorter row's end means nothing.
        """
        rows = read_token_ids(token_ids)
        check_prompts(rows, self.config, 0)
        router, _ = look_up(router, len(rows), lambda: [self._decode(row) for row in rows])
        tokens, lengths, bound = pad_batch(rows, self.bind(router, len(rows), rows), self.mesh)
        with use_mesh(self.mesh):
            batch = place_rows((tokens, lengths), self.mesh)
            logits = _logits(self.graph, self.weights, *batch, bound)
        return logits[: len(rows), : int(lengths.max())]

    def encode(self, prompt: Prompt) -> list[int]:
        """Text -> token ids as the tokenizer does by itself; a list of messages goes through the chat template."""
        return self._encode(read_prompt(prompt, "prompt"), "prompt")

    def _encode(self, prompt: Any, where: str) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not is_messages(prompt):
            return prompt
        rendered = render_chat(self.tokenizer, prompt, where, add_generation_prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens left out."""
        (row,) = read_token_ids([token_ids])
        check_token_ids(row, self.config)
        return self._decode(row)

    def _decode(self, token_ids: Any) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        router: Any = "gates if loaded",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """Answers a batch of prompts (text, messages, or token ids); greedy at temperature 0.

        Args:
            router: `Gates`, `Fixed`, `Retrieval`, `GatesWithin`, None (bare base), a list of them (one a prompt); by
                default the gates if loaded, else None, whatever bank there is.
            stop: texts that end a response, or one text.

        Raises:
            InputError: empty prompt, prompt beyond the context, messages that the chat template refuses, text that
                UTF-8 cannot hold, unknown adapter, bad sampling values.
        """
        # without stop strings nothing needs the host before the end: one loop on the device
        chunk = 16 if stop else max_new_tokens
        sampling = Sampling(temperature, top_k, top_p, seed)
        completions: list[Completion] = []
        for piece in self._run(prompts, router, max_new_tokens, sampling, stop, chunk):
            if isinstance(piece, list):
                completions = piece
        return completions

    def stream(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        router: Any = "gates if loaded",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chunk: int = 8,
    ) -> Iterator[Delta | list[Completion]]:
        """As `generate`, in pieces: `Delta`s as text becomes certain, every `chunk` tokens, then the completions."""
        return self._run(prompts, router, max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop, chunk)

    def _run(self, prompts, router, max_new_tokens, sampling, stop, chunk) -> Iterator[Delta | list[Completion]]:
        """Checks the call, reads the prompts, and gives the pieces as they come."""
        stop = (stop,) if isinstance(stop, str) else stop
        with Arguments() as given:
            given.whole("max_new_tokens", max_new_tokens)
            given.whole("chunk", chunk)
            given.texts("stop", stop)
        asked, ids, problems = read_prompts(prompts), [], []
        for i, prompt in enumerate(asked):
            try:
                ids.append(self._encode(prompt, f"prompt {i}"))
            except InputError as e:
                problems += e.problems
        if problems:
            raise InputError(problems)
        check_prompts(ids, self.config, max_new_tokens)
        router, retrieved = look_up(router, len(ids), lambda: list(map(self._request_text, asked)))
        bound = self.bind(router, len(ids), ids)
        batch = Generator(self.graph, self.weights, self.config, ids, bound, sampling, max_new_tokens, self.mesh)
        return self._pieces(batch, ids, stop, chunk, retrieved)

    def _pieces(
        self, batch: Generator, ids: list[list[int]], stop: Sequence[str], chunk: int, retrieved: list[Found]
    ) -> Iterator[Delta | list[Completion]]:
        streams = [TextStream(self._decode, stop) for _ in ids]
        seen = [0] * len(ids)
        running = True
        while running:
            running = batch.advance(chunk)
            for i, tokens in enumerate(batch.tokens()):
                text = streams[i].push(tokens[seen[i] :])
                seen[i] = len(tokens)
                if text:
                    yield Delta(i, text)
            stopped = [i for i, s in enumerate(streams) if s.stopped]
            if stopped and running:
                batch.stop(stopped)
                running = not bool(np.all(batch.done))
        for i, s in enumerate(streams):
            if text := s.finish():
                yield Delta(i, text)
        yield self._complete(batch, ids, streams, retrieved)

    def _complete(
        self, batch: Generator, ids: list[list[int]], streams: list[TextStream], retrieved: list[Found]
    ) -> list[Completion]:
        reasons: list[FinishReason] = [
            "stop" if s.stopped else "end" if len(s.tokens) < batch.max_new_tokens else "length" for s in streams
        ]
        # a response that met its end token had its last token read; any other's last was never fed back
        lengths = [len(s.tokens) for s in streams]
        fed = [n if r == "end" else n - 1 for n, r in zip(lengths, reasons, strict=True)]
        routing = batch.routing(fed, lengths)
        out = []
        for i, (prompt, s) in enumerate(zip(ids, streams, strict=True)):
            trace = None
            if routing is not None:
                shown = tuple(self.tokenizer.decode([t]) for t in prompt + s.tokens)
                found = *routing[i], retrieved[i], self._adapted
                trace = RoutingTrace(self.adapter_names, PROJECTIONS, shown, len(prompt), *found)
            out.append(Completion(s.text, s.tokens, reasons[i], len(prompt), trace))
        return out


@jit(static_argnames=("graph",))
def _logits(
    graph: nnx.GraphDef, weights: Params, tokens: jax.Array, lengths: jax.Array, router: BoundRouter | None
) -> jax.Array:
    model = nnx.merge(graph, weights)
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(columns < lengths[:, None], columns, EMPTY)
    return model.logits(model(tokens, positions, router).hidden, router)


def load(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    mesh: Any = None,
    dtype: str | None = None,
) -> Meteora:
    """Loads BASE, and on top of it BANK and GATES, made by `meteora import` and `meteora train gates`.

    Args:
        mesh: of `sharding.make_mesh`: weights are split over its devices, and batches too; None is one device.
        dtype: of base, adapters and activations; by default float32 on a CPU, bfloat16 on an accelerator; the model's
            `dtype` says which. Gates stay float32.

    Raises:
        InputError: a folder is missing, damaged, or made for another base or bank.
    """
    with Arguments() as given:
        given.path("base", base)
        given.path("bank", bank, none=True)
        given.path("gates", gates, none=True)
        if mesh is not None and not isinstance(mesh, Mesh):
            given.refuse("mesh", "one of sharding.make_mesh, or None", mesh)
        if dtype is not None:
            given.choice("dtype", dtype, DTYPES)
    if gates is not None and bank is None:
        raise InputError(f"{gates}: gates: expected a bank beside them, found none")
    kind = jnp.dtype(default_dtype(dtype))
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind, read_origin(base)) if bank is not None else None
    gate_config, columns = load_gates(gates, config, loaded.names) if gates is not None and loaded else (None, None)
    form = gate_config.form if gate_config else None
    graph, state = assemble(config, weights, loaded, columns, kind, mesh, form)
    if platform() == "gpu" and mesh is None and kind.itemsize == 2:
        graph, state = pack(graph, state, release=True)
    return Meteora(config, loaded.config if loaded else None, gate_config, load_tokenizer(base), graph, state, mesh)
