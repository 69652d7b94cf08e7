"""What the gate term of a token router is made of, token by token."""

import jax.numpy as jnp
import numpy as np
from gate_gradients import previous_tasks, segment_indices

from meteora_jax.training.gate_loss import previous_task, segment_index
from meteora_jax.training.sequences import NO_TASK


def test_the_previous_segment_s_task_and_the_segment_s_index():
    blocks = [[3, 3, 0, 0, 5, 3, 0, 0, 5], [2, 2, 2], [0, 1, 0, 1], [4, 2, 2, 4, 2, 2]]
    rng = np.random.default_rng(2)
    tasks, segments = np.full((6, 60), NO_TASK), np.zeros((6, 60), int)
    for b in range(6):
        row, parts = [], []
        for s in range(4):
            own = list(blocks[rng.integers(4)])
            own = [NO_TASK, NO_TASK, *own, NO_TASK, *blocks[rng.integers(4)]] if rng.random() < 0.5 else own
            row, parts = row + own, parts + [s + 1] * len(own)
        tasks[b, : len(row)], segments[b, : len(row)] = row[:60], parts[:60]
    found = previous_task(jnp.asarray(tasks), jnp.asarray(segments), 9)
    assert np.array_equal(np.asarray(found)[tasks != NO_TASK], previous_tasks(tasks, segments, 9)[tasks != NO_TASK])
    which = np.asarray(segment_index(jnp.asarray(tasks), jnp.asarray(segments), 3))
    assert np.array_equal(which[tasks != NO_TASK], segment_indices(tasks, segments, 3)[tasks != NO_TASK])
    row, one = jnp.asarray([blocks[0]]), jnp.ones((1, 9), int)
    assert np.asarray(previous_task(row, one, 9))[0].tolist() == [9, 9, 3, 3, 0, 9, 3, 3, 0]
    assert np.asarray(segment_index(row, one, 16))[0].tolist() == [0, 0, 1, 1, 2, 0, 1, 1, 2]
