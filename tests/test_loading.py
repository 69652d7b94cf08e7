"""Bases go from disk to their devices part by part: nothing is read twice, and no more than one part is in memory."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_sharding import devices
from tiny import tiny_llama

from converters import import_base
from meteora_jax.io.base import load_base
from meteora_jax.io.tensors import StoredArray, open_tensors

PARTS = """
import sys
import jax
import numpy as np
from flax import nnx
from meteora_jax.io import base, model_state, tensors
from meteora_jax.sharding import make_mesh

read, largest = [], []
whole = tensors.StoredArray.__getitem__

def spy(self, part):
    out = whole(self, part)
    read.append(out.size)
    largest.append(out.nbytes)
    return out

tensors.StoredArray.__getitem__ = spy
config, weights = base.load_base(sys.argv[1], np.float32)
assert not read
mesh = make_mesh(*map(int, sys.argv[2].split("x")))
_, state = model_state.assemble(config, weights, None, None, np.float32, mesh)
leaves = [leaf[...] for _, leaf in nnx.to_flat_state(state)]
total = sum(leaf.size for leaf in leaves)
held = {(i, str(s.index)): s.data.size for i, leaf in enumerate(leaves) for s in leaf.addressable_shards}
print(sum(read), sum(held.values()), total, max(largest), max(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.parametrize("mesh", ["1x4x1", "1x1x4", "1x2x2"])
def test_every_part_is_read_for_its_own_devices(tmp_path: Path, mesh: str):
    _, hf = tiny_llama(tmp_path, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    import_base(hf, tmp_path / "base")
    environment = {**devices(4), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PARTS, str(tmp_path / "base"), mesh]
    out = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout
    read, held, total, largest_part, largest_leaf = map(int, out.split())
    assert held == total  # every value lies on some device
    # What a device shares with others is read once for each of them: norms, and what a mesh axis does not split.
    assert read <= (1.05 if mesh.endswith("1") or mesh.startswith("1x1") else 2.05) * total
    assert largest_part <= largest_leaf / (4 if "4" in mesh else 2)


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
