"""The bare model equals transformers, variant by variant, and a padded batch equals its prompts one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import tiny_llama

import converters
import meteora_jax as mj
from meteora_jax.config import LlamaConfig
from meteora_jax.model.llama import Llama

ROWS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 90))]
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
VARIANTS = {
    "llama2": dict(num_key_value_heads=4),
    "llama3_gqa": dict(rope_theta=500000.0),
    "one_kv_head": dict(num_key_value_heads=1),
    "smollm2_tied": dict(tie_word_embeddings=True, rope_theta=100000.0),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "wide_heads": dict(head_dim=20),
    "llama31_rope": dict(rope_parameters=LLAMA3_SCALING),
    "llama32_tied_rope": dict(rope_parameters={**LLAMA3_SCALING, "factor": 32.0}, tie_word_embeddings=True),
    "linear_rope": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "dynamic_rope": dict(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=24
    ),
    "everything": dict(
        attention_bias=True, mlp_bias=True, head_dim=6, num_key_value_heads=1, tie_word_embeddings=True,
        rope_parameters=LLAMA3_SCALING, rms_norm_eps=1e-3,
    ),
}  # fmt: skip


def hf_logits(model: torch.nn.Module, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].float().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, variant):
    hf, folder = tiny_llama(tmp_path, **VARIANTS[variant])
    converters.import_base(folder, tmp_path / "base")
    model = mj.load(tmp_path / "base", dtype="float32")
    ours = np.asarray(model.logits(ROWS))
    for row, logits in zip(ROWS, ours, strict=True):
        assert np.abs(logits[: len(row)] - hf_logits(hf, row)).max() <= 1e-4
    for row, done in zip(ROWS, model.generate(ROWS, max_new_tokens=24), strict=True):
        want = hf.generate(torch.tensor([row]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        want = [t for t in want[0, len(row) :].tolist() if t not in model.config.eos_token_ids]
        assert done.token_ids == want


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_stays_within_its_rounding(tmp_path, dtype, torch_dtype):
    hf, folder = tiny_llama(tmp_path)
    converters.import_base(folder, tmp_path / "base")
    ours = np.asarray(mj.load(tmp_path / "base", dtype=dtype).logits(ROWS))
    half = hf.to(torch_dtype)
    exact = [hf_logits(hf.float(), row) for row in ROWS]
    for row, logits, want in zip(ROWS, ours, exact, strict=True):
        theirs = np.abs(hf_logits(half.to(torch_dtype), row) - want).mean()
        assert logits.dtype == np.float32
        assert np.abs(logits[: len(row)] - want).mean() <= 2 * theirs + 1e-3


def test_a_row_does_not_see_its_batch(world):
    """Bit for bit whatever the other rows hold; alone, in another shape, to the rounding of another matmul."""
    model = world["model"]
    together = np.asarray(model.logits(ROWS))
    for i, row in enumerate(ROWS):
        others = [row if j == i else [(t * 7 + 3) % 320 for t in r] for j, r in enumerate(ROWS)]
        assert np.array_equal(np.asarray(model.logits(others))[i, : len(row)], together[i, : len(row)])
        alone = np.asarray(model.logits([row]))[0]
        assert np.abs(together[i, : len(row)] - alone).max() <= 2e-4


def test_compiled_program_does_not_grow_with_depth():
    """Stacked layers: a program of 80 layers is as long as one of 8."""

    def lines(layers: int) -> int:
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=layers, num_heads=2, num_kv_heads=1,
            head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_position_embeddings=64,
            tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_ids=(),
        )  # fmt: skip
        graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        run = jax.jit(lambda state, t, p: nnx.merge(graph, state)(t, p).hidden)
        return len(run.lower(state, ids, ids).as_text().splitlines())

    assert lines(80) == lines(8)


def test_segments_do_not_see_each_other(world):
    """Two sequences packed into one row give what each gives alone."""
    model = world["model"]
    llama = nnx.merge(model.graph, model.weights)
    first, second = ROWS[0], ROWS[1]
    tokens = jnp.asarray([first + second], jnp.int32)
    positions = jnp.asarray([[*range(len(first)), *range(len(second))]], jnp.int32)
    segments = jnp.asarray([[0] * len(first) + [1] * len(second)], jnp.int32)
    whole = nnx.jit(lambda llama: llama.logits(llama(tokens, positions, segments=segments).hidden, None))
    packed = np.asarray(whole(llama))[0]
    alone = [np.asarray(model.logits([r], router=None))[0] for r in (first, second)]
    assert np.abs(packed - np.concatenate(alone)).max() <= 2e-5
