"""Memory by way of which adapters go to the device: nothing of another adapter's in it, nor too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from adapter_banks import random_bank

from meteora_jax.bank import AdapterBank
from meteora_jax.engine import staging
from meteora_jax.engine.slot_weights import SlotWeights
from meteora_jax.engine.staging import Layout

NAMES = tuple(f"adapter{i}" for i in range(6))
LEAVES = {
    ("layers", "o", "lora_a"): ((2, 1, 1, 3, 5), np.dtype(np.float16)),
    ("layers", "o", "lora_b"): ((2, 1, 3, 7), np.dtype(np.float16)),
    ("layers", "o", "lora_scale"): ((2, 1, 1), np.dtype(np.float32)),
}


class Late:
    """A device's array of memory that it reads in its own time."""

    def __init__(self, memory: np.ndarray):
        self.read, self.value = threading.Thread(target=self._copy, args=(memory,)), memory[:0]
        self.read.start()

    def _copy(self, memory: np.ndarray) -> None:
        time.sleep(0.05)
        self.value = memory.copy()

    def block_until_ready(self) -> Late:
        self.read.join()
        return self


def put_late(arrays: Mapping[str, np.ndarray], where: Any) -> dict[str, Late]:
    return {name: Late(z) for name, z in arrays.items()}


def test_memory_is_filled_again_once_the_device_has_read_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staging, "put", put_late)
    monkeypatch.setattr(Layout, "shared", lambda _: False)  # as on an accelerator, whose memory is its own
    buffers, sent = Layout(LEAVES).buffers(), []
    for number in range(3):
        for view in buffers.views.values():
            view.fill(number)
        sent.append(buffers.send())
    for number, staged in enumerate(sent):
        for array in staged.values():
            assert (array.block_until_ready().value[:2] == number).all()


def test_what_was_sent_is_not_the_memory_itself():
    """A CPU's arrays are, where it lies well: it is another's then."""
    layout = Layout(LEAVES)
    for buffers in [layout.buffers() for _ in range(8)]:
        for view in buffers.views.values():
            view.fill(1)
        staged = buffers.send()
        for view in buffers.views.values():
            view.fill(2)
        for part in layout.parts.values():
            assert (np.asarray(part.of(staged[part.buffer])) == 1).all()


def test_one_transfer_a_type_whose_parts_do_not_overlap():
    layout = Layout(LEAVES)
    buffers = layout.buffers()
    for number, view in enumerate(buffers.views.values()):
        view.fill(number)
    staged = buffers.send()
    assert set(staged) == {"float16", "float32"}
    for number, (path, part) in enumerate(layout.parts.items()):
        value = np.asarray(part.of(staged[part.buffer]))
        assert (value.shape, value.dtype) == LEAVES[path]
        assert (value == number).all()


def test_nothing_is_left_of_the_adapter_before(world: dict[str, Any]):
    """Of large and small ones, and of one that has no part in some projections, by several threads at once."""
    model = world["model"]
    whole = random_bank(model.config, NAMES, 1, rank=8)
    slots, made = SlotWeights(model.graph, model.weights, model.config, None, router=False), []
    rank = model.bank.ranks["q_proj"]
    for i in range(len(NAMES)):
        part = slice(i, i + 1)
        own = min(rank, max(1, i))
        kept = [p for p in whole.a if i % 2 == 0 or p not in ("k_proj", "up_proj")]
        a, b = ({p: z[p][:, part, :own] for p in kept} for z in (whole.a, whole.b))
        scale = {p: whole.scale[p][:, part] for p in kept}
        info = whole.config.adapters[part]
        config = type(whole.config)(info, dict.fromkeys(kept, own), whole.config.num_layers, whole.config.base_shapes)
        made.append(AdapterBank(a, b, scale, config))
    alone = [SlotWeights(model.graph, model.weights, model.config, None, router=False).stage(one, {}) for one in made]
    order = np.random.default_rng(0).integers(0, len(made), 40)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda i: slots.stage(made[i], {}), order))
    for i, staged in zip(order, found, strict=True):
        for path, part in slots.layout.parts.items():
            values = [np.asarray(part.of(one[0][part.buffer])) for one in (staged, alone[i])]
            np.testing.assert_array_equal(*values, err_msg=str(path))
    path, part = next((path, part) for path, part in slots.layout.parts.items() if path[-1] == "lora_b")
    assert len({np.asarray(part.of(z[0][part.buffer])).tobytes() for z in alone}) == len(made), path
