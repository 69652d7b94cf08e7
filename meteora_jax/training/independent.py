"""Gates whose columns are trained apart: each from its own adapter's task and a background that all columns share.

A column is Fisher's linear discriminant between the inputs x of the task's tokens and those of texts that the bare base
wrote by itself, both read twice, by the bare base and with that adapter at work: so what it finds is the task, and not
the traces of the adapter, which every token has once it acts. The logit is how far x lies from the plane half-way
between the two means, in standard deviations:

    S = (S_task + S_background) / 2,   R = D^-1/2 S D^-1/2 + ridge,   D = diag(S)
    v = D^-1/2 R^-1 D^-1/2 (m_task - m_background),   d = sqrt((m_task - m_background) v),   w = v / d
    z = x w - (m_task + m_background) w / 2

(Fisher 1936; m and S: means and covariances, for each layer and input). The projections of a group read the same x, so
they share a gate. Nothing of another adapter enters a column, so the columns of several runs with one background stand
side by side as if trained together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.adapters import GROUP_SIDES, AdapterBank, BaseParam
from meteora_jax.checkpoint import BACKGROUND, assemble, digest, load_background, load_bank, load_base, save_gates
from meteora_jax.compiler import Jit
from meteora_jax.config import GROUPS, PROJECTIONS, InputError, LlamaConfig
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, GateForm
from meteora_jax.generation import Generator, Sampling
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.memory import FormedGate
from meteora_jax.sharding import constrain, fetch, place_rows, place_whole, rows_multiple, use_mesh
from meteora_jax.text import load_tokenizer
from meteora_jax.training.adapter import fresh_adapter
from meteora_jax.training.data import Batch, Batches, Mixture, Tokenized, collate, own_shards, plan

FORM = GateForm(shared=True, bias=True)  # of independent gates
RIDGE = 0.1  # added to correlations; chosen on train examples (docs/results.md)
SHORTEST = 8  # tokens of a background text that counts

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndependentTraining:
    """How independent columns are made.

    batches: of each task at most; one pass over its examples, if that is less. texts, length: of the background, in
    texts and tokens. The rest as in `Training`.
    """

    batch_size: int
    batches: int = 1000
    samples_per_task: int | None = None
    max_length: int = 4096
    texts: int = 256
    length: int = 128
    top_k: int = 2
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        low = {"batch_size": 1, "batches": 1, "max_length": 2, "texts": 1, "length": SHORTEST, "top_k": 1}
        wrong = {k: n for k, n in low.items() if getattr(self, k) < n}
        if wrong:
            raise InputError([f"{k}: expected at least {n}, found {getattr(self, k)}" for k, n in wrong.items()])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Of a group's inputs over tokens: count float32 [], and about a point for each layer the first float32
    {group: [L, I]} and second {group: [L, I, I]}, as sums."""

    count: Any
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Routes as `router`; in the place of logits an observer finds the group's input less the column that stands in the
    place of its gate, float32 [B, T, I]."""

    router: Any
    per_request = True

    def route(self, x: jax.Array, gate: FormedGate) -> Routing:
        about = gate.weight[:, 0, 0]
        routing = self.router.route(x, None)
        return dataclasses.replace(routing, logits=x.astype(jnp.float32) - about[None, None])


def add_moments(
    graph: Any, weights: Any, total: Moments, batch: Batch, router: BoundRouter, second: bool
) -> Moments:  # fmt: skip
    """total + a batch's; second: whether the second moments are wanted."""
    model = nnx.merge(graph, weights)
    read = batch.segments > 0

    def observe(routings: tuple[Routing, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
        first, seconds = [], []
        for group, routing in zip(GROUPS, routings, strict=True):
            x = jnp.where(read[:, :, None], routing.logits, 0.0)
            side = GROUP_SIDES[group][0]
            first.append(constrain(jnp.sum(x, axis=(0, 1)), side))
            if second:
                x = x.reshape(-1, x.shape[-1])
                product = jnp.einsum("mi,mj->ij", x, x, precision="highest")
                seconds.append(constrain(product, side, None))
        return first, seconds

    out = model(batch.tokens, batch.positions, Inputs(router), segments=batch.segments, observe=observe)
    first = dict(zip(GROUPS, out.observed[0], strict=True))
    seconds = dict(zip(GROUPS, out.observed[1], strict=True)) if second else {}
    count = jnp.sum(read).astype(jnp.float32)
    return jax.tree.map(jnp.add, total, Moments(count, first, seconds))


def discriminant(
    about: jax.Array, own: tuple[jax.Array, jax.Array, jax.Array], background: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer's column: (w [I], the distance of the two means [], the point half-way between them [I]), float32.

    about: [I], the point that the moments are taken about; own, background: count [], first [I] and second [I, I].
    """
    means, covariances = [], []
    for count, first, second in (own, background):
        mean = first / count
        means.append(mean)
        covariances.append(constrain(second, None, None) / count - mean[:, None] * mean[None, :])
    apart = means[0] - means[1]
    s = 0.5 * (covariances[0] + covariances[1])
    variance = jnp.diagonal(s)
    spread = jnp.sqrt(jnp.maximum(variance, 1e-10 * jnp.mean(variance) + 1e-30))  # an input that never varies
    correlation = s / (spread[:, None] * spread[None, :]) + RIDGE * jnp.eye(len(spread), dtype=s.dtype)
    factor = jax.scipy.linalg.cho_factor(correlation, lower=True)
    v = jax.scipy.linalg.cho_solve(factor, apart / spread) / spread
    distance = jnp.sqrt(jnp.maximum(jnp.sum(apart * v), 1e-30))
    return v / distance, distance, 0.5 * (means[0] + means[1]) + about


def columns_of(about: Any, own: Moments, background: Moments, dtype: Any) -> tuple[Any, Any, Any]:
    """Every layer's column of every group: weights {group: [L, I]}, biases and distances {group: [L]}.

    dtype: the weights are rounded as the model will read them, and then the bias set, so that rounding moves no mean.
    """
    weights, biases, distances = {}, {}, {}
    for group in GROUPS:
        moments = [(m.first[group], m.second[group]) for m in (own, background)]

        def one(layer: Any) -> Any:
            point, (first, second), (first_0, second_0) = layer
            return discriminant(point, (own.count, first, second), (background.count, first_0, second_0))

        w, distances[group], middle = jax.lax.map(one, (about[group], *moments))
        weights[group] = w.astype(dtype).astype(jnp.float32)
        biases[group] = -jnp.sum(weights[group] * middle, axis=-1)
    return weights, biases, distances


class Columns:
    """Moments and columns on one base; every pass has a model whose bank is the one adapter that it is about."""

    def __init__(self, config: LlamaConfig, weights: Any, dtype: Any, mesh: Mesh | None):
        self.config, self.dtype, self.mesh = config, dtype, mesh
        self._weights = weights
        self._add = {
            second: Jit(functools.partial(add_moments, second=second), static_argnums=0, donate_argnums=2)
            for second in (False, True)
        }
        self._solve = Jit(functools.partial(columns_of, dtype=dtype))
        self.about = {
            g: np.zeros((config.num_layers, config.projection_shape(ps[0])[0]), np.float32) for g, ps in GROUPS.items()
        }
        self.background: Any = None
        # the bare base as a bank of one adapter, which no router chooses: the same whatever bank is trained for
        self._bare = fresh_adapter(config, "bare", 1, 1.0, PROJECTIONS, 0)

    def model(self, bank: AdapterBank | None) -> tuple[Any, Any]:
        """The base with a bank and `about` in the place of its gates."""
        gates = {g: about[:, :, None] for g, about in self.about.items()} if bank is not None else None
        graph, state = assemble(self.config, self._weights, bank, gates, self.dtype, self.mesh, GateForm(shared=True))
        leaves = nnx.to_flat_state(state)  # the base's arrays stay where they are; the next model shares them
        self._weights = {tuple(map(str, path)): leaf[...] for path, leaf in leaves if isinstance(leaf, BaseParam)}
        return graph, state

    def moments(
        self, bank: AdapterBank | None, batches: Iterable[Batch], rows: int, *, total: Moments | None = None,
        second: bool = True,
    ) -> Moments:  # fmt: skip
        """total + those of all batches' tokens, with the bank's only adapter at work; None: the bare base."""
        graph, weights = self.model(self._bare if bank is None else bank)
        names = (self._bare if bank is None else bank).names
        acting = Fixed({names[0]: 0.0 if bank is None else 1.0})
        router = place_rows(jax.tree.map(np.asarray, acting.bind([acting] * rows, names)), self.mesh)
        with use_mesh(self.mesh):
            for batch in batches:
                placed = place_rows(batch, self.mesh)
                if total is None:
                    total = self._zeros(second)
                total = self._add[second](graph, weights, total, placed, router)
        assert total is not None, "there is always a batch"
        return total

    def _zeros(self, second: bool) -> Moments:
        """On a mesh as the sums of a batch will lie."""
        layers, sides = self.config.num_layers, {g: GROUP_SIDES[g][0] for g in GROUPS}
        widths = {g: self.config.projection_shape(ps[0])[0] for g, ps in GROUPS.items()}

        def zeros() -> Moments:
            first = {g: constrain(jnp.zeros((layers, n), jnp.float32), None, sides[g]) for g, n in widths.items()}
            full = {g: jnp.zeros((layers, n, n), jnp.float32) for g, n in widths.items()} if second else {}
            return Moments(
                jnp.zeros((), jnp.float32), first, {g: constrain(x, None, sides[g], None) for g, x in full.items()}
            )

        return jax.jit(zeros)()

    def read_background(self, batches: Sequence[Batch], rows: int) -> None:
        """Takes the background's moments about its own means; all later moments are about them too."""
        first = self.moments(None, batches, rows, second=False)
        self.about = {g: fetch(x) / np.float32(fetch(first.count)) for g, x in first.first.items()}
        self.background = self.moments(None, batches, rows)

    def column(self, own: Moments, background: Moments) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
        """{group: weights [L, I]}, {group: biases [L]}, and the mean distance from the background in deviations."""
        about = place_whole(self.about, self.mesh)
        with use_mesh(self.mesh):
            weights, biases, distances = self._solve(about, own, background)
        return (
            {g: fetch(x) for g, x in weights.items()},
            {g: fetch(x) for g, x in biases.items()},
            float(np.mean(np.concatenate([fetch(x) for x in distances.values()]))),
        )


def only_adapter(bank: AdapterBank, name: str) -> AdapterBank:
    """The bank with one of its adapters, at its own projections, in its own ranks: the same in any bank."""
    at = bank.names.index(name)
    info, ranks = bank.config.adapters[at], {}
    for p in bank.config.ranks:
        rows = np.any(bank.a[p][:, at] != 0, axis=(0, 2)) | np.any(bank.b[p][:, at] != 0, axis=(0, 2))
        if p in info.targets and rows.any():
            ranks[p] = int(np.flatnonzero(rows)[-1]) + 1  # smaller ranks are padded with zeros
    cut = lambda held: {p: x[:, at : at + 1] for p, x in held.items() if p in info.targets and np.any(x[:, at])}  # noqa: E731
    slim = lambda held: {p: held[p][:, at : at + 1, :rank] for p, rank in ranks.items()}  # noqa: E731
    dora, bias = cut(bank.dora), cut(bank.bias)
    config = dataclasses.replace(
        bank.config, adapters=(info,), ranks=ranks, dora=tuple(dora), lora_bias=tuple(bias)
    )  # fmt: skip
    scale = {p: bank.scale[p][:, at : at + 1] for p in ranks}
    return dataclasses.replace(bank, config=config, a=slim(bank.a), b=slim(bank.b), scale=scale, dora=dora, bias=bias)


def write_background(columns: Columns, settings: IndependentTraining) -> list[list[int]]:
    """Texts that the bare base writes from its first token alone, by a fixed seed."""
    config = columns.config
    first = config.bos_token_id if config.bos_token_id is not None else (config.eos_token_ids or (None,))[0]
    if first is None:
        raise InputError("bos_token_id: expected a token that texts begin with, found none in the base's config.json")
    length = min(settings.length, config.max_position_embeddings) - 1
    graph, weights = columns.model(None)
    texts: list[list[int]] = []
    for start in range(0, settings.texts, 64):
        prompts = [[first]] * min(64, settings.texts - start)
        sampling = Sampling(1.0, seed=settings.seed + start)
        batch = Generator(graph, weights, config, prompts, None, sampling, length, columns.mesh)
        batch.advance(length)
        texts += [[first, *map(int, tokens)] for tokens in batch.tokens()]
    return texts


def padded(texts: Sequence[Sequence[int]], rows: int) -> list[Batch]:
    """Texts in batches of `rows` rows, all of one shape."""
    none = np.zeros(0, np.int32)
    parts = [np.asarray(t, np.int32) for t in texts if len(t) >= SHORTEST]
    if not parts:
        raise InputError(f"background: expected texts of at least {SHORTEST} tokens, found none")
    width = max(map(len, parts))
    parts += [none] * (-len(parts) % rows)
    whole = [Tokenized(t, np.zeros(len(t), bool), np.zeros(len(t), np.int32)) for t in parts]
    return [collate(whole[i : i + rows], width) for i in range(0, len(whole), rows)]


def train_independent_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: IndependentTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    background: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains each column of a bank's gates on its own task alone and writes GATES/ to `dest`.

    Args:
        tasks: {adapter name: training examples}, one for every adapter of the bank.
        background: GATES of an earlier run, whose background is taken; else the base writes one. It is stored beside
            the gates. Columns can be joined if their background is the same.
        progress: called with (adapter, its number, how many) before each.

    Returns:
        {"columns": {adapter: {"batches", "tokens", "distance"}}, "background": its SHA-256}; tokens: of the task;
        distance: of its mean from the background's in standard deviations, averaged over layers and groups.
    """
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind)
    if settings.top_k > len(loaded.names):
        raise InputError(f"top_k: expected at most {len(loaded.names)} (the bank's), found {settings.top_k}")
    if loaded.config.invoked or loaded.config.at_ends:
        found = ", ".join(loaded.config.invoked or loaded.config.at_ends)
        raise InputError(f"{bank}: expected adapters that act on every token in the layers alone, found {found}")
    if not config.eos_token_ids:
        raise InputError(f"{base}: eos_token_id: expected an end token, found none")
    length, tokenizer = min(settings.max_length, config.max_position_embeddings), load_tokenizer(base)
    mixtures = {
        name: Mixture(
            {name: tasks.get(name, ())}, {name: 0}, tokenizer, config.eos_token_ids[0], max_length=length,
            prompt_loss=True, samples_per_task=settings.samples_per_task, seed=settings.seed,
        )
        for name in loaded.names
    }  # fmt: skip
    chosen = {name: mixture.chosen() for name, mixture in mixtures.items()}
    columns = Columns(config, weights, kind, mesh)
    texts = load_background(background) if background is not None else write_background(columns, settings)
    if max(map(max, texts)) >= config.vocab_size:
        raise InputError(f"{background}: {BACKGROUND}: expected tokens of this base, found {max(map(max, texts))}")
    rows = math.ceil(settings.batch_size / rows_multiple(mesh)) * rows_multiple(mesh)
    read = padded(texts, rows)
    columns.read_background(read, rows)
    found, gates, report = [], {}, {}
    for number, name in enumerate(loaded.names):
        if progress is not None:
            progress(name, number, len(loaded.names))
        layout = plan(
            mixtures[name], chosen[name], settings.batch_size, packing=True, multiple=rows_multiple(mesh),
            shards=jax.process_count(),
        )  # fmt: skip
        stream = Batches(mixtures[name], chosen[name], layout, own_shards(layout, mesh))
        count = min(settings.batches, math.ceil(len(chosen[name][name]) / settings.batch_size))
        batches = list(itertools.islice(stream, count))
        alone = only_adapter(loaded, name)
        own = columns.moments(alone, batches, layout.rows, total=columns.moments(None, batches, layout.rows))
        other = columns.moments(alone, read, rows, total=jax.tree.map(jnp.copy, columns.background))
        found.append(columns.column(own, other))
        tokens, distance = int(fetch(own.count)) // 2, found[-1][2]
        if not np.isfinite(distance):
            raise InputError(f"{name}: expected finite activations, found a column of {distance}")
        report[name] = {"batches": count, "tokens": tokens, "distance": round(distance, 3)}
    for group in GROUPS:
        gates[group] = np.stack([w[group] for w, _, _ in found], axis=-1)
        gates[f"{group}.bias"] = np.stack([b[group] for _, b, _ in found], axis=-1)
    mark = digest(texts)
    if jax.process_index() == 0:
        described = GateConfig(loaded.names, settings.top_k, settings.temperature, FORM, mark)
        save_gates(Path(dest), described, gates, texts)
    return {"columns": report, "background": mark}
