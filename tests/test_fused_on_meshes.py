"""cuDNN's attention, by a stand-in, on meshes equals XLA's on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from meteora_jax.model import llama
from meteora_jax.sharding import use_mesh

B, T, H = 8, 24, 16


def call(mesh: Any, fused: Any, heads: tuple[int, int]) -> list[np.ndarray]:
    """y and the gradients by q, k and v."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (heads[0], *heads[1:] * 2, heads[0])
    )
    segments = jnp.asarray(rng.integers(1, 3, (B, T)).cumsum(1) // 9)
    place = jnp.arange(T)
    mask = (place[None, :] <= place[:, None])[None]
    mask = mask & (segments[:, None, :] == segments[:, :, None])
    mask = jnp.broadcast_to(mask, (B, T, T))[:, None]

    def whole(q: Any, k: Any, v: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda q, k, v: llama.attend(q, k, v, mask, fused), q, k, v)
        return (y, *pull(dy.reshape(y.shape)))

    with use_mesh(mesh):
        return [np.asarray(z) for z in jax.jit(whole)(q, k, v, dy)]


@pytest.mark.exhaustive("eight programs on meshes; test_gated_model has the stand-in on one device")
def test_fused_attention_on_meshes(monkeypatch):
    attention, shapes = jax.nn.dot_product_attention, []

    def stand_in(q: Any, *rest: Any, implementation: str, **more: Any) -> Any:
        assert implementation == "cudnn"
        shapes.append(q.shape)
        return attention(q, *rest, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's own formula is not strict
        for heads in ((4, 2), (3, 1)):
            wanted = call(None, None, heads)
            for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (2, 1, 4)):
                shapes.clear()
                found = call(mesh_of(*sizes), "packed", heads)
                for want, got in zip(wanted, found, strict=True):
                    np.testing.assert_allclose(got, want, atol=2e-6)
                # each device has its own rows, and its own heads where the mesh divides those of the keys
                tensor = sizes[2] if heads[1] % sizes[2] == 0 else 1
                assert set(shapes) == {(B // (sizes[0] * sizes[1]), T, heads[0] // tensor, H)}, (sizes, shapes)
