"""What a GPU runs in 16 bit: gates and shrinks in one matrix, sums in the model's dtype, cuDNN, XLA's options."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import answer
from extent import parameters
from flax import nnx

import meteora_jax as mj
from meteora_jax import execution
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, LlamaConfig
from meteora_jax.engine.step import observe_routing, run_steps
from meteora_jax.execution import ExecutionConfig, Jit, platform
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.model import llama
from meteora_jax.model.layout import pack, with_execution
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.routing.gates import GateParam
from meteora_jax.sharding import make_mesh, use_mesh
from pallas_kernels.paged_attention import EMPTY, StepTokens

ROWS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 90)), [200]]
NAMES = ("apple", "birch", "cedar", "daisy")


def prepared(model: mj.Meteora, width: int = 512) -> mj.Meteora:
    """With packed weights; width: of banks whose A's are in them."""
    graph = with_execution(model.graph, model.weights, ExecutionConfig(dense_width=width))
    graph, weights = pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def run(model: mj.Meteora, router: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, and every token's indices and weights, of the longest of ROWS."""
    logits, indices, weights = map(np.asarray, observed(model.graph, model.weights, model.bind(router, 1)))
    return logits, indices, weights


@functools.partial(jax.jit, static_argnums=0)
def observed(graph: Any, weights: Any, router: Any) -> tuple[Any, Any, Any]:
    tokens = jnp.asarray([ROWS[2]])
    module = nnx.merge(graph, weights)
    out = module(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], router, observe=observe_routing)
    return module.logits(out.hidden, None), *out.observed


@pytest.mark.parametrize("width", [512, 1], ids=["gates and shrinks", "gates alone"])
@pytest.mark.parametrize(
    "router",
    parameters([mj.Gates(2), mj.Gates(1), mj.Gates(3, 4.0)], [mj.Gates(3, 4.0)], "fewer adapters, no temperature"),
)
def test_packed_weights_route_and_compute_as_gates_and_adapters_do(world, router, width):
    model, packed = world["model"], prepared(world["model"], width)
    held = nnx.merge(packed.graph, packed.weights).layers.qkv
    rows = held.kernel[...][:, sum(held.splits) :].reshape(-1, 3, 256, held.kernel.shape[-1])
    assert held.packed_rows == 3 * 256
    assert bool(jnp.any(rows[:, :, 32:] != 0)) == (width > 1)
    wanted, found = run(model, router), run(packed, router)
    assert np.abs(found[0] - wanted[0]).max() <= 1e-4 * np.abs(wanted[0]).max()
    assert np.array_equal(found[1], wanted[1])
    assert np.allclose(found[2], wanted[2], atol=1e-4)


@pytest.mark.parametrize("width", [512, 1], ids=["gates and shrinks", "gates alone"])
@pytest.mark.parametrize(
    "router",
    parameters(
        [mj.Gates(2), mj.Fixed("cedar"), mj.Gates(1, within=("apple", "birch")), None],
        [mj.Gates(2)],
        "test_packed_weights_serve_other_routers has them in one row",
    ),
)
def test_packed_weights_are_the_same_model(world, router, width):
    model, packed = world["model"], prepared(world["model"], width)
    held = nnx.merge(packed.graph, packed.weights).layers.down
    assert held.kernel.shape[1] == held.splits[0] + held.packed_rows == held.splits[0] + 256
    for rows in (ROWS, ROWS[:1]):  # more tokens than one product serves, and fewer
        wanted, found = (m.logits(rows, router) for m in (model, packed))
        for a, b, row in zip(wanted, found, rows, strict=True):
            assert np.abs(b[: len(row)] - a[: len(row)]).max() <= 1e-4 * np.abs(a[: len(row)]).max()


@pytest.mark.exhaustive("generation of the matrix whose logits are compared above")
def test_generation_with_packed_weights_tells_the_same_story(world):
    model = world["model"]
    routers = [mj.Gates(2), mj.Gates(1), mj.Gates(3), None]
    wanted = model.generate(ROWS, routers, max_new_tokens=12)
    for a, b in zip(prepared(model).generate(ROWS, routers, max_new_tokens=12), wanted, strict=True):
        assert (a.token_ids, a.text) == (b.token_ids, b.text)
        assert (a.routing is None) == (b.routing is None)
        if a.routing is not None:  # the base's answer has none
            assert np.array_equal(a.routing.indices, b.routing.indices)
            assert np.allclose(a.routing.weights, b.routing.weights, atol=1e-4)


@pytest.mark.parametrize("router", [mj.Fixed("cedar"), mj.Gates(1, within=("apple", "birch")), [mj.Gates(1)], None])
def test_packed_weights_serve_other_routers(world, router):
    wanted, found = (m.logits([ROWS[0]], router) for m in (world["model"], prepared(world["model"])))
    assert np.allclose(np.asarray(found), np.asarray(wanted), atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_is_as_near_to_float32_as_its_rounding(world, packed):
    """With every adapter chosen: a choice that rounding turns is no small error."""
    model = mj.load(world["base"], world["bank"], world["gates"], dtype="bfloat16")
    model = prepared(model) if packed else model
    exact, found = run(world["model"], mj.Gates(4, 20.0))[0], run(model, mj.Gates(4, 20.0))[0]
    assert np.linalg.norm(found - exact) <= 0.05 * np.linalg.norm(exact)


def test_options_reach_the_compiler_on_a_gpu_alone(monkeypatch):
    double = Jit(lambda x: x * 2, gpu_options={"xla_no_such_option": True})
    assert double(3) == 6
    assert double._cache_size() == 1
    monkeypatch.setattr(execution, "platform", lambda: "gpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        double(3)
    assert jax.eval_shape(double, jnp.arange(3)).shape == (3,)  # JAX refuses options below the top


def test_the_platform_is_that_of_the_mesh():
    assert platform() == jax.default_backend()
    with use_mesh(make_mesh(devices=jax.devices("cpu")[:1])):
        assert platform() == "cpu"


def test_two_executions_are_two_programs():
    model = small("float32", layers=1)
    one, other = (with_execution(model.graph, model.weights, ExecutionConfig(dense_width=w)) for w in (1, 2))
    assert one != other
    assert hash(one) == hash(with_execution(other, model.weights, ExecutionConfig(dense_width=1)))


# ---- on a GPU, where neither transformers nor a tokenizer need be installed


@functools.cache  # nothing changes a model in its place
def small(
    dtype: str, form: TokenRouterForm | None = None, layers: int = 3, null: bool = False, smaller: bool = False,
    **of_bank: Any,
) -> mj.Meteora:  # fmt: skip
    """A random model with four adapters and gates, with `null` of a null choice too; its weights do not depend on the
    dtype but for their rounding. of_bank: more of `BankConfig`."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=64, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_position_embeddings=256,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    if smaller:
        config = dataclasses.replace(config, hidden_size=64, intermediate_size=64, num_heads=2, head_dim=32)
    infos = tuple(AdapterInfo(name, 8, PROJECTIONS, "", "", {}) for name in NAMES)
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    bank = BankConfig(infos, dict.fromkeys(PROJECTIONS, 8), config.num_layers, shapes, **of_bank)
    made = nnx.eval_shape(lambda: gated_llama(config, bank, form, jnp.dtype(dtype), nnx.Rngs(0), null=null))
    graph, shapes = nnx.split(made)
    rng = np.random.default_rng(1)  # JAX's own draws are a program that takes longer to compile than the model's

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    weights = jax.tree.map(draw, shapes)
    return mj.Meteora(config, bank, GateConfig(NAMES, 2, 1.0, form, null), None, graph, weights)


def prompt_hidden(model: mj.Meteora, router: Any = None) -> np.ndarray:
    """Hidden states of a ragged batch of prompts, zero at padding."""
    tokens, lengths = np.zeros((4, 64), np.int32), np.array([len(r) for r in ROWS])
    for row, prompt in zip(tokens, ROWS, strict=True):
        row[: len(prompt)] = prompt
    real = (np.arange(64)[None] < lengths[:, None]).reshape(-1)
    none = np.full((4,), EMPTY)
    positions = jnp.asarray(np.concatenate([none, np.where(real, np.tile(np.arange(64), 4), EMPTY)]), jnp.int32)
    tables, runs = np.arange(16).reshape(4, 4), np.repeat(np.arange(4), 4)
    step = StepTokens(positions, *(jnp.asarray(z, jnp.int32) for z in (tables, runs, lengths)))
    bound = model.bind(router, 4)

    def hidden_states(weights: Any) -> jax.Array:
        module = nnx.merge(model.graph, weights)
        at = step.rows()
        each = jax.tree.map(lambda z: z[at], bound)
        flat = jnp.concatenate([jnp.zeros((4,), jnp.int32), jnp.asarray(tokens.reshape(-1))])
        cache = module.new_cache(16, 16)
        return module(flat[:, None], positions[:, None], each, cache=cache, step=step).hidden[4:, 0]

    return np.asarray(Jit(hidden_states)(model.weights), np.float64) * real[:, None]


def run_as(model: mj.Meteora, execution: ExecutionConfig) -> mj.Meteora:
    return dataclasses.replace(model, graph=with_execution(model.graph, model.weights, execution))


def here() -> ExecutionConfig:
    """What bfloat16 is run by on this device."""
    return ExecutionConfig.here("bfloat16")


def compare_prompts(router: Any) -> None:
    """The fused attention and packed weights against neither, both in bfloat16."""
    fused = prompt_hidden(run_as(prepared(small("bfloat16")), here()), router)
    plain = prompt_hidden(run_as(small("bfloat16"), ExecutionConfig()), router)
    assert np.isfinite(fused).all()
    assert np.linalg.norm(fused - plain) <= 0.05 * np.linalg.norm(plain)


def decode_twice(rows: int) -> None:
    """Two runs of one batch: nothing compiled for the second, and the same tokens and routing."""
    model = run_as(small("bfloat16"), here())
    graph, weights = pack(model.graph, model.weights)
    model = dataclasses.replace(model, graph=graph, weights=weights)
    runs, compiled = [], []
    for _ in range(2):
        tokens, routing, _ = answer(model, ROWS[:rows], mj.Gates(2), 12)
        runs.append((tokens, routing))
        compiled.append(run_steps._cache_size())
    assert compiled[0] == compiled[1]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] is not None
    for (indices, weights), (again, _) in zip(runs[0][1], runs[1][1], strict=True):
        assert np.array_equal(indices, again)
        assert np.isfinite(weights).all()
        assert (indices[:-1] >= 0).all()


def packed_gradient(dtype: str, fused: Any = None) -> tuple[float, np.ndarray]:
    """A loss over two sequences in a row with padding behind, and its gradient by the embedding."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 300, (2, 64)), jnp.int32)
    segments = jnp.asarray([[1] * 30 + [2] * 20 + [0] * 14, [1] * 64], jnp.int32)
    positions = np.array([[*range(30), *range(20), *[EMPTY] * 14], [*range(64)]], np.int32)
    real = jnp.asarray(positions != EMPTY)
    model = small(dtype)
    if fused is not None:
        model = run_as(model, dataclasses.replace(here(), fused_attention=fused))
    router = model.bind(mj.Gates(4, 20.0), 2)  # every adapter: no choice for rounding to turn

    def loss(weights: Any) -> jax.Array:
        module = nnx.merge(model.graph, weights)
        hidden = module(tokens, jnp.asarray(positions), router, segments=segments, remat=True).hidden
        return jnp.sum(jnp.where(real[:, :, None], jnp.sin(hidden.astype(jnp.float32)), 0.0))

    value, grads = Jit(jax.value_and_grad(loss))(model.weights)
    (embed,) = (leaf[...] for path, leaf in nnx.to_flat_state(grads) if path == ("embed",))
    return float(value), np.asarray(embed, np.float64)


def compare_packed(fused: Any = None) -> None:
    (_, wanted), (value, found) = packed_gradient("float32"), packed_gradient("bfloat16", fused)
    assert np.isfinite(value)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - wanted) <= 0.1 * np.linalg.norm(wanted)


def packed_attention(fused: Any, dtype: Any) -> list[np.ndarray]:
    """Attention to two packed rows with padding behind, and its gradients by q, k and v; padding weighs nothing."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.standard_normal((2, 64, n, 64)), jnp.bfloat16) for n in (4, 2, 2, 4))
    segments = jnp.asarray([[1] * 30 + [2] * 20 + [0] * 14, [1] * 64], jnp.int32)
    real = segments > 0
    place = jnp.arange(64, dtype=jnp.int32)
    mask = (segments[:, None, :] == segments[:, :, None]) & (place[None, :] <= place[:, None])[None]
    mask &= real[:, None, :]
    if fused is not None:
        mask |= ~real[:, :, None]  # as the model does
    dy = jnp.where(real[:, :, None, None], dy, 0).reshape(2, 64, -1).astype(dtype)
    call = Jit(lambda q, k, v, dy: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(
        lambda q, k, v: llama.attend(q, k, v, mask[:, None], fused) * real[:, :, None].astype(dtype), q, k, v
    )))  # fmt: skip
    return [np.asarray(z, np.float64) for z in call(*(z.astype(dtype) for z in (q, k, v)), dy)]


def compare_packed_attention() -> None:
    """cuDNN's gradients are as near to float32's as XLA's in the same 16 bits, up to a factor of two."""
    exact = packed_attention(None, jnp.float32)
    plain, fused = packed_attention(None, jnp.bfloat16), packed_attention("packed", jnp.bfloat16)
    for name, want, other, found in zip(("y", "dq", "dk", "dv"), exact, plain, fused, strict=True):
        assert np.isfinite(found).all(), name
        error, usual = (np.linalg.norm(z - want) / np.linalg.norm(want) for z in (found, other))
        assert error <= 2 * usual + 1e-3, f"{name}: {error:.1e}, by XLA {usual:.1e}"


# The same three on any device: here they keep the GPU's tests alive, and prove bfloat16's own gradients.
@pytest.mark.exhaustive("a bfloat16 program twice; float32 is compared above")
def test_prompts_with_packed_weights():
    compare_prompts(mj.Gates(4, 20.0))


@pytest.mark.exhaustive("one program once more")
def test_decoding_with_packed_weights_compiles_once():
    decode_twice(2)


@pytest.mark.exhaustive("a training step in bfloat16 more")
def test_packed_training_in_bfloat16():
    compare_packed()


@pytest.mark.gpu
@pytest.mark.parametrize("router", [None, mj.Gates(4, 20.0), mj.Fixed("cedar")])
def test_prompts_by_cudnn_equal_prompts_by_xla(router):
    compare_prompts(router)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 1])
def test_a_gpu_decodes_and_compiles_once(rows):
    decode_twice(rows)


def test_packed_attention_with_a_stand_in_for_cudnn(monkeypatch):
    """The mask that cuDNN is given, and the comparison itself; a mask that forgets segments is found."""
    attention = jax.nn.dot_product_attention

    def stand_in(*given, implementation, **more):
        assert implementation == "cudnn"
        return attention(*given, implementation="xla", **more)

    with jax.numpy_dtype_promotion("standard"):  # JAX's own formula is not strict
        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
        compare_packed_attention()
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *z, mask, **more: stand_in(*z, mask=None, **more))
        with pytest.raises(AssertionError, match="y: "):
            compare_packed_attention()


@pytest.mark.gpu
def test_packed_attention_by_cudnn_has_the_gradients_of_xla():
    compare_packed_attention()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [(), ("packed",)])
def test_packed_training_on_a_gpu(fused):
    compare_packed(fused)


def products(jaxpr: Any) -> int:
    """Matrix products of a program, a loop's counted once."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values())) if hasattr(p, "eqns")]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(products, inner))


def test_dots_recomputes_attention_alone():
    """Two products: scores and values."""
    model = small("float32")
    graph, gates, rest = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    tokens, router = jnp.zeros((1, 8), jnp.int32), model.bind(mj.Gates(2), 1)

    def count(remat: Any) -> int:
        def loss(gates: Any) -> jax.Array:
            module = nnx.merge(graph, gates, rest)
            return jnp.sum(module(tokens, tokens, router, segments=tokens, remat=remat).hidden)

        return products(jax.make_jaxpr(jax.grad(loss))(gates).jaxpr)

    assert count("dots") == count(False) + 2 < count(True)
