"""Sentence encoders in Flax NNX: the BERT family and T5's encoder, pooled as their folders say."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meteora_jax.config import InputError, read_json
from meteora_jax.retriever.config import EncoderConfig
from meteora_jax.sharding import make_mesh, place_rows, rows_multiple
from meteora_jax.text import load_tokenizer

WEIGHTS = "weights.safetensors"
BATCH = 32
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # padded lengths: few compiled shapes, little padding


class EncoderParam(nnx.Param):
    """A weight of the encoder."""


class Embedding(nnx.Module):
    """A table of rows."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.embedding = EncoderParam(nnx.initializers.normal(0.02)(rngs.params(), (rows, width), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class Linear(nnx.Module):
    """x W + b; kernel [I, O]."""

    def __init__(self, i: int, o: int, bias: bool, rngs: nnx.Rngs):
        self.kernel = EncoderParam(nnx.initializers.normal(0.02)(rngs.params(), (i, o), jnp.float32))
        self.bias = EncoderParam(jnp.zeros((o,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...].reshape(*[1] * (x.ndim - 1), -1)


class Norm(nnx.Module):
    """Layer norm with bias (BERT), or RMS norm without (T5)."""

    def __init__(self, config: EncoderConfig):
        self.scale = EncoderParam(jnp.ones((config.hidden_size,), jnp.float32))
        self.bias = EncoderParam(jnp.zeros((config.hidden_size,), jnp.float32)) if config.family == "bert" else None
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...][None, None, :]
        return x if self.bias is None else x + self.bias[...][None, None, :]


class Block(nnx.Module):
    """Attention and MLP, each with its residual."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        d, f, inner = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        bias = config.family == "bert"
        self.query, self.key, self.value = (Linear(d, inner, bias, rngs) for _ in range(3))
        self.output = Linear(inner, d, bias, rngs)
        self.up, self.down = Linear(d, f, bias, rngs), Linear(f, d, bias, rngs)
        self.gate = Linear(d, f, bias, rngs) if config.gated else None
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [B, T, D]; bias float32 [B, N or 1, T, T] is added to the attention scores."""
        if self.config.family == "bert":
            x = self.attention_norm(x + self.attend(x, bias))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attend(self.attention_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        def heads(y):
            return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if self.config.family == "bert":  # T5 leaves the scores unscaled
            q = q * self.config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) + bias, axis=-1)
        return self.output(jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(*x.shape[:2], -1))

    def mlp(self, x: jax.Array) -> jax.Array:
        act = {
            "gelu": functools.partial(jax.nn.gelu, approximate=False),
            "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
            "relu": jax.nn.relu,
        }[self.config.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def distance_buckets(length: int, buckets: int, most: int) -> np.ndarray:
    """int32 [T, T]: the bucket of key minus query position; half of them exact, half logarithmic (T5, section 2.1)."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    logarithmic = exact + (np.log(far / exact) / np.log(most / exact) * (half - exact)).astype(np.int32)
    near = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(logarithmic, half - 1))
    return (near + np.where(distance > 0, half, 0)).astype(np.int32)


class SentenceEncoder(nnx.Module):
    """Tokens -> one vector a text."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        d = config.hidden_size
        self.words = Embedding(config.vocab_size, d, rngs)
        self.positions = Embedding(config.max_positions, d, rngs) if config.max_positions else None
        self.types = Embedding(config.type_vocab_size, d, rngs) if config.type_vocab_size else None
        distances = config.relative_buckets
        self.distances = Embedding(distances, config.num_heads, rngs) if distances else None

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.layers = stack(rngs)
        self.norm = Norm(config)  # of the embeddings (bert) or of the last layer (t5)
        self.projection = Linear(d, config.projection, False, rngs) if config.projection else None

    def __call__(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], pooled: Bool[Array, "B T"]
    ) -> Float[Array, "B E"]:
        """Vectors float32 of int32 tokens padded on the right; mask is false on padding, pooled where a mean skips."""
        with jax.default_matmul_precision("highest"):
            return self._pool(self._hidden(tokens, mask), pooled)

    def _hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        config, length = self.config, tokens.shape[1]
        x = self.words(tokens)
        if self.positions is not None:
            x = x + self.positions(jnp.arange(length) + config.position_offset)[None]
        if self.types is not None:
            x = x + self.types(jnp.zeros((1, 1), jnp.int32))
        bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        if self.distances is not None:
            buckets = distance_buckets(length, config.relative_buckets, config.relative_max_distance)
            bias = bias + jnp.moveaxis(self.distances(jnp.asarray(buckets)), -1, 0)[None]
        if config.family == "bert":
            x = self.norm(x)
        graph, weights = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x, bias), None), x, weights)
        return x if config.family == "bert" else self.norm(x)

    def _pool(self, x: jax.Array, pooled: jax.Array) -> jax.Array:
        if self.config.pooling == "cls":
            y = x[:, 0]
        else:
            kept = pooled[..., None].astype(jnp.float32)
            y = jnp.sum(x * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)
        if self.projection is not None:
            y = self.projection(y)
        if self.config.normalize:
            y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return y


@functools.partial(jax.jit, static_argnames=("graph",))
def _encode(
    graph: nnx.GraphDef[SentenceEncoder], weights: PyTree, tokens: jax.Array, mask: jax.Array, pooled: jax.Array
) -> jax.Array:
    return nnx.merge(graph, weights)(tokens, mask, pooled)


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """An encoder with its tokenizer, as an index uses it. `TextEncoder.load("runs/encoder")`."""

    config: EncoderConfig
    tokenizer: Any  # of transformers, which is slow to import
    graph: nnx.GraphDef[SentenceEncoder]
    weights: PyTree
    tokenizer_folder: Path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TextEncoder:
        """Reads ENCODER/, written by `meteora import encoder`; refuses what is missing, unknown or of another shape."""
        folder = Path(folder)
        config = EncoderConfig.from_json(read_json(folder / "encoder.json"), str(folder / "encoder.json"))
        graph, state = nnx.split(nnx.eval_shape(lambda: SentenceEncoder(config, rngs=nnx.Rngs(0))))
        tensors = _read_tensors(folder / WEIGHTS, config.weight_shapes())
        leaves = nnx.to_flat_state(state)
        filled = [(path, leaf.replace(jnp.asarray(tensors[".".join(map(str, path))]))) for path, leaf in leaves]
        return cls(config, load_tokenizer(folder), graph, nnx.from_flat_state(filled), folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ENCODER/ with the weights as they are now."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flat = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(self.weights)}
        save_file(flat, folder / WEIGHTS)
        (folder / "encoder.json").write_text(json.dumps(self.config.to_json(), indent=1) + "\n", encoding="utf-8")
        for path in self.tokenizer_folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, "encoder.json"):
                shutil.copyfile(path, folder / path.name)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_length`."""
        return self.tokenizer(self._normal(texts), truncation=True, max_length=self.config.max_length)["input_ids"]

    def cut(self, texts: Sequence[str], instruction: str = "") -> list[int]:
        """Which of N texts behind an instruction are longer than `max_length` tokens, so that their ends are not
        read."""
        if not texts:
            return []
        whole = self.tokenizer(self._normal([instruction + text for text in texts]), verbose=False)["input_ids"]
        return [i for i, ids in enumerate(whole) if len(ids) > self.config.max_length]

    def _normal(self, texts: Sequence[str]) -> list[str]:
        return [text.strip().lower() if self.config.lower_case else text.strip() for text in texts]

    def skipped(self, instruction: str) -> int:
        """How many of a text's first tokens the pooling leaves out: those of an instruction, if the encoder says so."""
        if self.config.pool_instruction or not instruction:
            return 0
        instruction = instruction.lower() if self.config.lower_case else instruction
        ids = self.tokenizer(instruction)["input_ids"]  # not stripped: its last space is no part of the text
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """float32 [N, D] of N texts behind an instruction: sorted by length, in batches of one padded length, over all
        devices of this host."""
        if isinstance(texts, str):
            raise InputError("texts: expected a list of texts, found a single text")
        if not texts:
            return np.zeros((0, self.config.width), np.float32)
        ids = self.tokenize([instruction + text for text in texts])
        skip = self.skipped(instruction)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        mesh = make_mesh(devices=jax.local_devices())
        batch = -(-BATCH // rows_multiple(mesh)) * rows_multiple(mesh)
        vectors = np.zeros((len(ids), self.config.width), np.float32)
        pending: list[tuple[list[int], jax.Array]] = []
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            placed = place_rows(pad([ids[i] for i in chosen], batch, self.config, skip), mesh)
            pending.append((chosen, _encode(self.graph, self.weights, *placed)))
        for chosen, result in pending:
            vectors[chosen] = np.asarray(result)[: len(chosen)]
        return vectors


def pad(
    rows: Sequence[Sequence[int]], batch: int, config: EncoderConfig, skip: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token lists -> int32 [batch, T], and bool [batch, T] which of them are none of the padding and which are pooled
    (the first `skip` are not), T the bucket of the longest; missing rows are empty."""
    longest = max(len(row) for row in rows)
    length = next((n for n in LENGTHS if n >= longest), longest)
    length = min(length, max(config.max_length, longest))
    tokens = np.full((batch, length), config.pad_token_id, np.int32)
    mask = np.zeros((batch, length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    pooled = mask.copy()
    pooled[:, :skip] = False
    return tokens, mask, pooled


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: expected a complete safetensors file, found none ({e})") from None
    problems = [f"{path}: {key}: expected no such tensor, found one" for key in sorted(tensors.keys() - shapes)]
    for key, shape in shapes.items():
        found = tensors[key].shape if key in tensors else "no such tensor"
        if found != shape:
            problems.append(f"{path}: {key}: expected shape {shape}, found {found}")
    if problems:
        raise InputError(problems)
    return {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
