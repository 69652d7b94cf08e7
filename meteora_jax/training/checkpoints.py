"""Checkpoints of a run: trained parameters, optimiser, step and the data's position, by Orbax.

Nothing else decides how a run goes on: a step draws no random numbers, and the data's order follows from the seed
and the position.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from meteora_jax.config import InputError
from meteora_jax.io.files import train_alone, writing
from meteora_jax.training.data import Layout

POSITION_BYTES = 1 << 14  # room for one shard's position when hosts exchange them


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's state after `step`, and where its data were. refused: checkpoints that were damaged, newest first."""

    step: int
    state: Any
    position: dict[int, str]
    refused: tuple[str, ...]


def fingerprint(x: jax.Array) -> jax.Array:
    """uint32 []: a sum over the bits of a 4-byte array and their places, the same however the array is split."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    place = jnp.ones(x.shape, jnp.uint32)
    for axis, prime in zip(range(x.ndim), (2654435761, 2246822519, 3266489917, 668265263, 374761393), strict=False):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(prime)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _prints(leaves: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.stack([fingerprint(leaves[k]) for k in sorted(leaves)])


class Checkpoints:
    """The checkpoints in one folder: written in the background, complete or not there, the newest `keep` kept.

    Args:
        identity: what a run must have in common with the checkpoints that it goes on from.
        later: keys of it that came after the first checkpoints: those that lack them are this run's, too.
        orders: of the groups whose columns the run's mesh holds in another order than the projections' own
            (`io.model_state.column_orders`); what is saved is in their own, so that another mesh can read it.

    Raises:
        InputError: another process has the folder, such as a run that SIGTERM has not ended yet.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int,
        identity: Mapping[str, Any],
        orders: Mapping[str, np.ndarray] | None = None,
        later: Collection[str] = (),
    ):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self.folder, self._identity, self._orders = Path(folder).absolute(), dict(identity), dict(orders or {})
        self._later, self._fingerprints = frozenset(later), jax.jit(_prints)
        self._args = ocp.args
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = train_alone(self.folder.parent) if jax.process_index() == 0 else None
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "run"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def clear(self) -> None:
        """Removes every checkpoint."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def layout(self) -> Layout | None:
        """The layout of the newest readable checkpoint's run: one that goes on keeps it."""
        for step in self._newest_first():
            try:
                return Layout(**self._run(step)["layout"])
            except Exception:  # whatever is wrong with it, `restore` says so by name
                continue
        return None

    def save(self, step: int, state: Any, layout: Layout, position: Mapping[int, str]) -> None:
        """Writes the state after `step` in the background; the device arrays may be donated once this returns."""
        leaves = self._reordered(_named(state), np.argsort)
        run = {
            "identity": self._identity, "layout": dataclasses.asdict(layout), "leaves": sorted(leaves),
            "position": {str(k): v for k, v in _gathered(position, layout.shards).items()},
        }  # fmt: skip
        arrays = {**_numbered(leaves), "fingerprints": self._fingerprints(leaves)}
        args = self._args.Composite(state=self._args.StandardSave(arrays), run=self._args.JsonSave(run))
        with writing(self.folder):
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns once everything is on disk. Raises InputError if it could not be written."""
        with writing(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._lock:
                self._lock.close()

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole, its arrays lying as those of `like` do; None if there is none at all.

        Damaged ones are set aside under another name and the one before is taken.

        Raises:
            InputError: the checkpoints are of another run, or every one is damaged.
        """
        refused: list[str] = []
        for step in self._newest_first():
            try:
                run = self._run(step)
            except Exception as e:  # a damaged file fails in as many ways as there are bytes
                refused.append(self._set_aside(step, e))
                continue
            self._check(step, run["identity"])
            try:
                state = self._state(step, run, like)
            except Exception as e:
                refused.append(self._set_aside(step, e))
                continue
            return Restored(step, state, {int(k): v for k, v in run["position"].items()}, tuple(refused))
        if refused:
            raise InputError([f"{r}: expected a whole checkpoint" for r in refused])
        return None

    def _newest_first(self) -> list[int]:
        return sorted(self._manager.all_steps(read=True), reverse=True)

    def _run(self, step: int) -> dict[str, Any]:
        run = self._manager.restore(step, args=self._args.Composite(run=self._args.JsonRestore()))["run"]
        missing = {"identity", "layout", "leaves", "position"} - run.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        return run

    def _check(self, step: int, found: Mapping[str, Any]) -> None:
        keys = found.keys() | (self._identity.keys() - self._later)
        differing = [k for k in sorted(keys) if found.get(k) != self._identity.get(k)]
        if differing:
            where = self.folder / str(step)
            shown = [f"{k}: expected {self._identity.get(k)!r} (this run's), found {found.get(k)!r}" for k in differing]
            raise InputError([f"{where}: {s}" for s in shown] + ["--no-resume starts over, --run names another folder"])

    def _state(self, step: int, run: Mapping[str, Any], like: Any) -> Any:
        leaves = _named(like)
        if run["leaves"] != sorted(leaves):
            raise ValueError("its arrays are not this run's")
        abstract = _numbered(
            {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in leaves.items()}
        )
        where = next(iter(leaves.values())).sharding
        whole = where if isinstance(where, SingleDeviceSharding) else _replicated(where)
        prints = jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=whole)
        args = self._args.Composite(state=self._args.StandardRestore({**abstract, "fingerprints": prints}))
        arrays = self._manager.restore(step, args=args)["state"]
        expected = np.asarray(arrays.pop("fingerprints"))
        names = sorted(leaves)
        restored = {name: arrays[str(i)] for i, name in enumerate(names)}
        found = np.asarray(self._fingerprints(restored))
        wrong = [name for name, a, b in zip(names, expected, found, strict=True) if a != b]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was saved")
        restored = self._reordered(restored, np.asarray)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[k] for k in _keys(like)])

    def _reordered(self, leaves: Mapping[str, jax.Array], to: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        """The arrays, B's columns and their moments' (the only trained ones that a group shares) taken in an order."""
        found = dict(leaves)
        for group, order in self._orders.items():
            for key in (k for k in found if f"['{group}']['lora_b']" in k):
                take = jax.jit(lambda x, order: x[..., order], out_shardings=found[key].sharding)
                found[key] = take(found[key], to(order))
        return found

    def _set_aside(self, step: int, error: Exception) -> str:
        """Renames a damaged checkpoint, so that its step can be saved again; says what was wrong."""
        source = self.folder / str(step)
        if jax.process_index() == 0:
            target = self.folder / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(source, target)
        self._manager.reload()
        return f"{source}: damaged ({' '.join(str(error).split())[:200] or type(error).__name__})"


def _keys(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _named(tree: Any) -> dict[str, jax.Array]:
    return dict(zip(_keys(tree), jax.tree.leaves(tree), strict=True))


def _numbered(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """By number, as a path is no name for a file."""
    return {str(i): leaves[k] for i, k in enumerate(sorted(leaves))}


def _replicated(where: Any) -> Any:
    from meteora_jax.sharding import replicated

    return replicated(where.mesh)


def _gathered(position: Mapping[int, str], shards: int) -> dict[int, str]:
    """Every shard's position, of this host and the others."""
    if jax.process_count() == 1:
        return dict(position)
    from jax.experimental import multihost_utils

    texts = np.zeros((shards, POSITION_BYTES), np.uint8)
    for shard, text in position.items():
        raw = text.encode()
        assert len(raw) <= POSITION_BYTES, "a stream's position is a few numbers"
        texts[shard, : len(raw)] = np.frombuffer(raw, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(texts)).max(axis=0)
    return {shard: bytes(row[row > 0]).decode() for shard, row in enumerate(every)}


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a question, to be asked after every step: did SIGTERM come (on several hosts: to any of them)?

    On one host the first SIGTERM only sets a mark. On several, jax's coordination service tells them all and they
    agree on a step.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: asked.is_set()  # only a program's main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
