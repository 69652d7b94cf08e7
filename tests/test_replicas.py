"""Engines on a mesh's data axis say together what one says. Run as a script it is the process with two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from test_gated_model import small
from test_sharding import devices

import meteora_jax as mj

PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], [200], [3, 4], [40, 41, 42, 43]]
ROUTERS = [mj.Gates(2), None, mj.Fixed("cedar"), mj.Gates(1), mj.Fixed({"apple": 0.5, "birch": 0.5})]


def main(dest: str) -> None:
    import dataclasses

    from kernels_on_mesh import on_mesh

    from meteora_jax.engine.replicas import Replicas
    from meteora_jax.execution import ExecutionConfig
    from meteora_jax.sharding import make_mesh

    model = small("float32", layers=1, smaller=True)
    model = on_mesh(model, make_mesh(2, 1, 1), ExecutionConfig(), pack=False)
    model = dataclasses.replace(model, tokenizer=Words())
    said = [c.token_ids for c in model.generate(PROMPTS, ROUTERS, 6)]
    engine = model._engines.holding([])
    assert isinstance(engine, Replicas)
    shares = [one.counters.new_tokens for one in engine.engines]
    where = [sorted(d.id for d in one._state.token.devices()) for one in engine.engines]
    again = [c.token_ids for c in model.generate(PROMPTS, ROUTERS, 6)]
    Path(dest).write_text(json.dumps({"said": said, "again": again, "shares": shares, "where": where}))


class Words:
    """A tokenizer whose text is the numbers."""

    def decode(self, token_ids, **_) -> str:
        return " ".join(map(str, token_ids))


def test_each_device_serves_its_share_of_the_requests(tmp_path: Path):
    import dataclasses

    model = dataclasses.replace(small("float32", layers=1, smaller=True), tokenizer=Words())
    expected = [c.token_ids for c in model.generate(PROMPTS, ROUTERS, 6)]
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "found.json")], env=devices(2), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["said"] == found["again"] == expected
    assert found["where"] == [[0], [1]]
    assert sorted(found["shares"]) == [12, 18]


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)

    main(sys.argv[1])
