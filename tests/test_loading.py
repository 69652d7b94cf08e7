"""Bases go from disk to their devices part by part: nothing is read twice, and no more than one part is in memory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from safetensors.numpy import save_file
from tiny import tiny_llama

import meteora_jax as mj
from converters import import_base
from meteora_jax.io.base import load_base
from meteora_jax.io.model_state import assemble
from meteora_jax.io.tensors import StoredArray, open_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    _, hf = tiny_llama(folder, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    import_base(hf, folder / "base")
    return folder / "base"


@pytest.mark.parametrize("axes", [(1, 4, 1), (1, 1, 4), (1, 2, 2)])
def test_every_part_is_read_for_its_own_devices(base: Path, axes: tuple[int, int, int], monkeypatch):
    whole, read = StoredArray.__getitem__, []

    def spy(self: StoredArray, part: Any) -> np.ndarray:
        read.append(whole(self, part))
        return read[-1]

    monkeypatch.setattr(StoredArray, "__getitem__", spy)
    config, weights = load_base(base, jnp.float32)
    assert not read
    _, state = assemble(config, weights, None, None, jnp.float32, mesh_of(*axes))
    leaves = [leaf[...] for _, leaf in nnx.to_flat_state(state)]
    total = sum(leaf.size for leaf in leaves)
    held = {(i, str(s.index)): s.data.size for i, leaf in enumerate(leaves) for s in leaf.addressable_shards}
    assert sum(held.values()) == total  # every value lies on some device
    # What a device shares with others is read once for each of them: norms, and what a mesh axis does not split.
    assert sum(part.size for part in read) <= (2.05 if axes == (1, 2, 2) else 1.05) * total
    largest_part, largest_leaf = (max(x.nbytes for x in arrays) for arrays in (read, leaves))
    assert largest_part <= largest_leaf / (2 if axes == (1, 2, 2) else 4)


def test_any_part_of_joined_columns(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal((3, 5, n)).astype(np.float32) for key, n in (("a", 4), ("b", 1), ("c", 6))}
    save_file(tensors, tmp_path / "w.safetensors")
    file = open_tensors(tmp_path / "w.safetensors", {key: t.shape for key, t in tensors.items()})
    stored = StoredArray(file, ("a", "b", "c"), jnp.bfloat16)
    want = np.concatenate(list(tensors.values()), axis=2).astype(jnp.bfloat16)
    assert stored.shape == want.shape
    assert np.array_equal(np.asarray(stored), want)
    assert np.asarray(stored, np.float32).dtype == np.float32
    for count in (1, 11, 12, 60, 165, 1000):
        assert np.array_equal(stored.first(count), want.reshape(-1)[:count])
    for _ in range(100):
        part = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in want.shape)
        assert np.array_equal(stored[part], want[part])


def test_nothing_is_read_before_it_is_placed(tmp_path: Path):
    _, hf = tiny_llama(tmp_path)
    import_base(hf, tmp_path / "base")
    config, weights = load_base(tmp_path / "base", jnp.float32)
    assert sum(int(np.prod(w.shape)) for w in weights.values()) == sum(
        int(np.prod(shape)) for shape in config.weight_shapes().values()
    )
    assert all(isinstance(w, StoredArray) for w in weights.values())


def test_to_fill_a_model_compiles_nothing(tmp_path: Path):
    _, hf = tiny_llama(tmp_path, hidden_size=56, intermediate_size=72)  # shapes that no other test has
    import_base(hf, tmp_path / "base")
    compiled: list[str] = []

    def heard(event: str, _seconds: float, **what: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(what["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        mj.load(tmp_path / "base", dtype="bfloat16")
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert not compiled
