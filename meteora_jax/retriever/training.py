"""Contrastive training of a sentence encoder on profiles (LoraRetriever, arXiv 2402.09997, section 3.2).

Two inputs of one adapter belong together; every other adapter's input in the batch, over all devices, is a negative.
Part of the adapters is trained on, so that the rest can show how well adapters are found that training never saw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from meteora_jax.config import InputError, read_json
from meteora_jax.io.files import train_alone, write_json, writing
from meteora_jax.retriever.encoder import SentenceEncoder, TextEncoder, pad
from meteora_jax.retriever.index import check_profile
from meteora_jax.retriever.settings import RetrieverTraining
from meteora_jax.retriever.wording import Wording
from meteora_jax.sharding import finite, make_mesh, place_rows


def chosen_adapters(names: Sequence[str], share: float, seed: int) -> tuple[str, ...]:
    """The adapters that are trained on: the share, rounded, of the sorted names after a shuffle by the seed."""
    ordered = sorted(names)
    picked = np.random.default_rng(seed).permutation(len(ordered))[: round(share * len(ordered))]
    return tuple(ordered[i] for i in sorted(picked))


def contrastive_loss(
    anchors: Float[Array, "B E"],
    candidates: Float[Array, "M E"],
    adapters: jax.Array,
    candidate_adapters: jax.Array,
    temperature: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy) of B pairs: candidate i < B is anchor i's positive, all others its negatives.

    adapters int32 [B] and candidate_adapters int32 [M] say whose input each is.

    mean_i -log( exp(c_ii / t) / (exp(c_ii / t) + sum_j exp(c_ij / t)) ), c the cosine, j over the candidates of other
    adapters: a second input of the anchor's own adapter is no negative, and counts for nothing.
    """

    def length(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    scores = jnp.einsum("be,me->bm", length(anchors), length(candidates), precision="highest") / temperature
    own = jnp.arange(anchors.shape[0])[:, None] == jnp.arange(candidates.shape[0])[None, :]
    counted = own | (adapters[:, None] != candidate_adapters[None, :])
    scores = jnp.where(counted, scores, -jnp.inf)
    positive = jnp.sum(jnp.where(own, scores, 0.0), axis=1)
    loss = jnp.mean(jax.nn.logsumexp(scores, axis=1) - positive)
    return loss, jnp.mean((positive >= jnp.max(scores, axis=1)).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("graph", "tx", "pairs"), donate_argnames=("weights", "state"))
def train_step(
    graph: nnx.GraphDef[SentenceEncoder],
    weights: PyTree,
    state: PyTree,
    texts: tuple[jax.Array, jax.Array, jax.Array],
    adapters: jax.Array,
    temperature: jax.Array,
    *,
    tx: optax.GradientTransformation,
    pairs: int,
) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
    """One update: (weights, optimiser state, loss, accuracy).

    Every anchor is compared with the candidates of all devices, over which the rows may be sharded.

    Args:
        graph, weights: the encoder, split.
        state: the optimiser's.
        texts: what `pad` gives for `pairs` anchors, then their positives, then hard negatives.
        adapters: int32 [rows of texts], whose input each is.
        temperature: float32 scalar, of the softmax over cosines.
        tx: the optimiser.
        pairs: how many anchors there are.
    """

    def loss(weights: PyTree) -> tuple[jax.Array, jax.Array]:
        vectors = nnx.merge(graph, weights)(*texts)
        return contrastive_loss(vectors[:pairs], vectors[pairs:], adapters[:pairs], adapters[pairs:], temperature)

    (value, accuracy), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the rest of the program says
        updates, state = tx.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state, value, accuracy


class PairSampler:
    """The batches of a run; step t's batch depends on the seed, t and the last search for hard negatives only."""

    def __init__(self, profiles: Mapping[str, Sequence[str]], settings: RetrieverTraining):
        self._settings = settings
        self._inputs = [tuple(inputs) for inputs in profiles.values()]
        self._bare = []
        for inputs in self._inputs:
            wording = Wording(inputs, least=2)
            self._bare.append([wording.remove(text) or text for text in inputs])
        self._places = [(a, i) for a, inputs in enumerate(self._inputs) for i in range(len(inputs))]
        self._near: list[list[tuple[int, int]]] | None = None

    @property
    def texts(self) -> list[str]:
        """All inputs, in the order that `search` expects their vectors."""
        return [self._inputs[a][i] for a, i in self._places]

    def search(self, vectors: np.ndarray, most: int = 10) -> None:
        """Finds the inputs of other adapters that are nearest to each input; vectors float32 [N, E]."""
        rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        owner = np.asarray([a for a, _ in self._places])
        scores = np.where(owner[:, None] == owner[None, :], -np.inf, rows @ rows.T)
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        self._near = [[self._places[j] for j in row] for row in nearest]

    def batch(self, step: int) -> tuple[list[str], np.ndarray]:
        """(texts, adapters int32): anchors, then positives, then hard negatives."""
        rng = np.random.default_rng((self._settings.seed, step))
        count, size = len(self._inputs), self._settings.batch_size
        chosen = np.concatenate([rng.permutation(count) for _ in range(-(-size // count))])[:size]
        anchors, positives, hard = [], [], []
        for a in chosen:
            first, second = rng.choice(len(self._inputs[a]), 2, replace=False)
            anchors.append((int(a), int(first)))
            positives.append((int(a), int(second)))
            if self._near is not None and self._settings.hard_negatives:
                near = self._near[self._places.index(anchors[-1])]
                hard += [near[j] for j in rng.choice(len(near), self._settings.hard_negatives)]
        places = anchors + positives + hard
        bare = rng.random(len(places)) < self._settings.bare
        texts = [(self._bare if cut else self._inputs)[a][i] for (a, i), cut in zip(places, bare, strict=True)]
        return [self._settings.instruction + t for t in texts], np.asarray([a for a, _ in places], np.int32)


def train_retriever(
    encoder: TextEncoder,
    profiles: Mapping[str, Sequence[str]],
    dest: str | os.PathLike[str],
    settings: RetrieverTraining,
    checkpoints: str | os.PathLike[str],
    progress: Callable[[int, dict[str, Any]], None] | None = None,
    begun: Callable[[dict[str, int]], None] | None = None,
    *,
    resume: bool = True,
) -> dict[str, Any]:
    """Trains an encoder on part of the profiles and writes it to ENCODER folder `dest`, with training.json.

    Args:
        profiles: {adapter: its inputs}; the settings' share of the adapters is trained on.
        checkpoints: Orbax folder; a run that was cut off goes on from its last checkpoint.
        progress: called after each step with its record.
        begun: called before the first with {adapter: inputs longer than max_length, whose ends are not read}.
        resume: False removes the checkpoints and starts over.

    Returns:
        What training.json holds: "trained" (the adapters trained on), "cut" (what `begun` is given), "settings", and
        "steps" (loss and accuracy of each).

    Raises:
        InputError: bad profiles, an adapter with one input, checkpoints of another run (its settings, texts or
            encoder differ), a folder where another process trains, a loss that is not finite.
    """
    trained = chosen_adapters(list(profiles), settings.share, settings.seed)
    problems = [p for name, inputs in profiles.items() for p in check_profile(name, inputs)]
    problems += [f"profile {n!r}: expected two inputs to train on, found one" for n in trained if len(profiles[n]) < 2]
    if len(trained) < 2:
        problems.append(f"share: expected at least two adapters to train on, found {len(trained)} of {len(profiles)}")
    if problems:
        raise InputError(problems)
    sampler = PairSampler({name: profiles[name] for name in trained}, settings)
    short = dataclasses.replace(
        encoder,
        config=dataclasses.replace(encoder.config, max_length=min(settings.max_length, encoder.config.max_length)),
    )
    cut = {n: len(short.cut(profiles[n], settings.instruction)) for n in trained}
    cut = {name: count for name, count in cut.items() if count}
    if begun:
        begun(cut)
    warmup = min(round(settings.steps * settings.warmup), settings.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, settings.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    weights = jax.tree.map(jnp.copy, encoder.weights)  # a step donates its weights
    state = tx.init(weights)
    inputs = [settings.instruction + text for text in sampler.texts]
    about = {
        **dataclasses.asdict(settings), "adapters": list(trained), "profiles": _digest(inputs),
        "tokens": _digest(short.tokenize(inputs)), "encoder": _encoder_digest(encoder),
    }  # fmt: skip
    with closing(Checkpoints(checkpoints, about, resume=resume)) as keeper:
        start, records, (weights, state), vectors = keeper.restore((weights, state))
        if vectors is not None:
            sampler.search(vectors)
        mesh, skip, temperature = make_mesh(), short.skipped(settings.instruction), jnp.float32(settings.temperature)
        started = time.perf_counter()
        for step in range(start, settings.steps):
            if settings.hard_negatives and step % settings.refresh == 0:
                vectors = dataclasses.replace(short, weights=weights).encode(sampler.texts, settings.instruction)
                sampler.search(vectors)
            texts, adapters = sampler.batch(step)
            rows = pad(short.tokenize(texts), len(texts), short.config, skip)
            placed = place_rows((rows, adapters), mesh)  # over all devices if they divide the batch
            weights, state, loss, accuracy = train_step(
                encoder.graph, weights, state, *placed, temperature, tx=tx, pairs=settings.batch_size
            )
            record = {"step": step + 1, "loss": round(float(loss), 5), "accuracy": round(float(accuracy), 4)}
            record["seconds"] = round(time.perf_counter() - started, 2)
            if not np.isfinite(record["loss"]):
                raise InputError(f"step {step + 1}: expected a finite loss, found {record['loss']}")
            records.append(record)
            if progress:
                progress(step + 1, record)
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                if not finite(weights):  # the loss is that of the weights before the step
                    raise InputError(f"step {step + 1}: expected finite weights, found others: nothing is saved")
                keeper.save(step + 1, (weights, state), records, vectors)
    report = {"trained": list(trained), "cut": cut, "settings": dataclasses.asdict(settings), "steps": records}
    dataclasses.replace(encoder, weights=weights).save(dest)
    (Path(dest) / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _encoder_digest(encoder: TextEncoder) -> str:
    """SHA-256 of an encoder's weights and of its configuration."""
    digest = hashlib.sha256(json.dumps(encoder.config.to_json()).encode())
    for path, leaf in nnx.to_flat_state(encoder.weights):
        digest.update(repr(path).encode())
        digest.update(np.ascontiguousarray(leaf[...]).tobytes())
    return digest.hexdigest()[:16]


class Checkpoints:
    """Orbax checkpoints of a run, and run.json in the same folder, which says which run they belong to.

    Args:
        about: what a run must have in common with the checkpoints that it goes on from.
        resume: False removes them.

    Raises:
        InputError: another process trains here, or the checkpoints are another run's.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any], *, resume: bool = True):
        import orbax.checkpoint as ocp

        folder = Path(folder).absolute()
        self._lock = train_alone(folder)
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(folder / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=2))
        about = json.loads(json.dumps(about))
        try:
            if not resume:
                for step in self._manager.all_steps():
                    self._manager.delete(step)
            elif self._manager.all_steps():
                _check(folder / "run.json", about)
            write_json(folder / "run.json", about)
        except BaseException:
            self.close()
            raise

    def restore(self, tree: PyTree) -> tuple[int, list[dict[str, Any]], PyTree, np.ndarray | None]:
        """(steps done, their records, the tree, vectors of the last search) of the newest checkpoint, if any."""
        step = self._manager.latest_step()
        if step is None:
            return 0, [], tree, None
        leaves, structure = jax.tree.flatten(tree)
        args = self._ocp.args.Composite(leaves=self._ocp.args.StandardRestore(leaves), log=self._ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except Exception as e:  # a damaged file fails in as many ways as there are bytes
            why = next(iter(str(e).splitlines()), type(e).__name__)
            where = self._manager.directory / str(step)
            raise InputError(
                f"{where}: expected a whole checkpoint, found a damaged one ({why:.200}); without it the one before is "
                "taken, --no-resume starts over"
            ) from None
        log = found["log"]
        vectors = np.asarray(log["vectors"], np.float32) if log["vectors"] else None
        return step, log["records"], jax.tree.unflatten(structure, found["leaves"]), vectors

    def save(self, step: int, tree: PyTree, records: Sequence[Mapping[str, Any]], vectors: np.ndarray | None) -> None:
        log = {"records": list(records), "vectors": [] if vectors is None else vectors.tolist()}
        args = self._ocp.args.Composite(
            leaves=self._ocp.args.StandardSave(jax.tree.leaves(tree)), log=self._ocp.args.JsonSave(log)
        )
        with writing(self._manager.directory):
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()  # the next step donates the arrays

    def close(self) -> None:
        self._manager.close()
        self._lock.close()


def _check(file: Path, about: Mapping[str, Any]) -> None:
    """Refuses checkpoints whose run.json is of another run, or is none."""
    advice = "--no-resume starts over, --checkpoints names another folder"
    try:
        found = read_json(file)
    except InputError as e:
        raise InputError([*e.problems, advice]) from None
    if not isinstance(found, dict):
        raise InputError([f"{file}: expected what its checkpoints are of, found {found!r:.60}", advice])
    differing = [k for k in sorted(found.keys() | about.keys()) if found.get(k) != about.get(k)]
    if differing:
        shown = [f"{k}: expected {about.get(k)!r:.200} (this run's), found {found.get(k)!r:.200}" for k in differing]
        raise InputError([f"{file}: {s}" for s in shown] + [advice])


def write_curves(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Loss and accuracy by step as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib: expected it for the curves, found none (extra 'eval')") from None
    steps = [r["step"] for r in report["steps"]]
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(steps, [r[key] for r in report["steps"]], linewidth=0.8)
        axes.set(xlabel="step", title=key)
    figure.savefig(path, dpi=130)
