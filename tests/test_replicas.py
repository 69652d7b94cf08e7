"""Engines on a mesh's data axis say together what one says."""

from __future__ import annotations

import dataclasses

from kernels_on_mesh import on_mesh
from meshes import mesh_of
from test_gated_model import small

import meteora_jax as mj
from meteora_jax.engine.replicas import Replicas
from meteora_jax.engine.step import run_steps
from meteora_jax.execution import ExecutionConfig

PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], [200], [3, 4], [40, 41, 42, 43]]
ROUTERS = [mj.Gates(2), None, mj.Fixed("cedar"), mj.Gates(1), mj.Fixed({"apple": 0.5, "birch": 0.5})]


class Words:
    """A tokenizer whose text is the numbers."""

    def decode(self, token_ids, **_) -> str:
        return " ".join(map(str, token_ids))


def test_each_device_serves_its_share_of_the_requests():
    model = dataclasses.replace(small("float32", layers=1, smaller=True), tokenizer=Words())
    expected = [c.token_ids for c in model.generate(PROMPTS, ROUTERS, 6)]
    shared = on_mesh(model, mesh_of(2, 1, 1), ExecutionConfig(), pack=False)
    assert [c.token_ids for c in shared.generate(PROMPTS, ROUTERS, 6)] == expected
    engine = shared._engines.holding([])
    assert isinstance(engine, Replicas)
    assert sorted(one.counters.new_tokens for one in engine.engines) == [12, 18]
    assert [sorted(d.id for d in one._state.token.devices()) for one in engine.engines] == [[0], [1]]
    assert [c.token_ids for c in shared.generate(PROMPTS, ROUTERS, 6)] == expected
    mj.warm_up(shared, [4], [4], 6, "base", routing=False, progress=None)
    programs = run_steps._cache_size()
    shared.generate([[7] * 4] * 4, "base", 6, routing=False)
    assert run_steps._cache_size() == programs
