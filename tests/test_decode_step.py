"""Decoding steps by Triton: interpreted against float64 NumPy, their launches counted, who is served; on a GPU, run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import answer
from extent import examples
from flax import nnx
from test_gated_model import ROWS, small

import meteora_jax as mj
from meteora_jax import execution
from meteora_jax.config import PROJECTIONS
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model import decoding, layout
from meteora_jax.routing import Routing
from meteora_jax.routing.mixed import Mixed
from meteora_jax.routing.retrieval import Composed
from meteora_jax.routing.token_router import choose
from pallas_kernels.decode_step import triton_gpu
from pallas_kernels.decode_step.operands import Choice, Group, StepState
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.paged_attention import triton_gpu as paged_gpu

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_numerics_by_triton_s_interpreter():
    result = subprocess.run(
        [sys.executable, str(HERE / "decode_step_on_cpu.py"), str(examples(9, 18))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.splitlines() == [
        "whole model", f"groups: {examples(9, 18)} cases", "rankings: 12 cases", "many rows: 8 cases"
    ]  # fmt: skip


@functools.cache
def plain_model(dtype: str = "bfloat16") -> mj.Meteora:
    return small(dtype)


STEPS = ExecutionConfig(step=StepLimits())


@functools.cache
def packed_model(
    dtype: str = "bfloat16", form: TokenRouterForm | None = None, execution: ExecutionConfig = STEPS
) -> mj.Meteora:
    """Gates and A's behind the kernels' rows; another `execution` is another program."""
    model = small(dtype, form)
    graph = layout.with_execution(model.graph, model.weights, execution)
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def has_cuda_compiler() -> bool:
    parts = ("jax_cuda13_plugin", "jax_plugins", "jax_plugins.xla_cuda13")
    return all(importlib.util.find_spec(part) is not None for part in parts)  # a package before what is in it


@pytest.mark.skipif(not has_cuda_compiler(), reason="the extra gpu is not installed")
def test_xla_for_an_h200_copies_nothing_and_adds_few_launches():
    result = subprocess.run(
        [sys.executable, str(HERE / "gpu_compile.py")], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "adapted, 1 rows: 6 launches a layer" in result.stdout
    assert "adapted, token router, 8 rows: 6 launches a layer" in result.stdout
    assert ("two GPUs: a decoding step compiles" in result.stdout) == (jax.__version_info__ >= (0, 11))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches that give zeros and are written down."""
    launches: list[str] = []

    def launch(module: str, kernel: str, *arrays: Any, out: Any, **rest: Any) -> Any:
        launches.append(kernel)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)

    monkeypatch.setattr(triton_gpu, "launch", launch)
    monkeypatch.setattr(paged_gpu, "launch", launch)
    return launches


ROUTER = TokenRouterForm(width=32, depth=2)
LAYER = ["qkv_epilogue_kernel", "decode_kernel"]
LAYER += ["residual_epilogue_kernel", "silu_epilogue_kernel", "residual_epilogue_kernel"]
TRACES = 1  # of a decoding step
NUMBERS = itertools.count(2)


def recorded_steps(gather: int = StepLimits.gather, width: int = 512, more: int = 0) -> ExecutionConfig:
    """One that nobody had before: a program must be traced for its launches to be seen. Without `more` rows it does not
    serve steps that read a prompt, of 64 tokens and more."""
    return ExecutionConfig(step=StepLimits(rows=more + next(NUMBERS), gather=gather), dense_width=width)


@pytest.mark.parametrize("form", [None, ROUTER], ids=["gates", "token router"])
@pytest.mark.parametrize("router", [None, mj.Gates(2), mj.Fixed("cedar")])
def test_launches_of_a_layer_are_the_bare_model_s(monkeypatch, router, form):
    launches = recorded(monkeypatch)
    model = packed_model(form=form, execution=recorded_steps())
    answer(model, ROWS[:2], router, 2)
    assert launches == LAYER * (TRACES * model.config.num_layers)


@pytest.mark.parametrize("router", [None, mj.Gates(2)])
def test_a_step_that_reads_a_prompt_has_the_same_launches(monkeypatch, router):
    launches = recorded(monkeypatch)
    model = packed_model(execution=recorded_steps(more=400))
    answer(model, ROWS[:2], router, 1)
    own = [*LAYER[:1], "runs_kernel", *LAYER[1:]]
    if router is not None:  # 66 tokens, twice as many choices, four adapters
        own = [launch for kernel in own for launch in ("weigh_kernel", kernel)[-1 - ("epilogue" in kernel) :]]
    assert launches == own * model.config.num_layers


@pytest.mark.parametrize("gather", [0, 1])
@pytest.mark.exhaustive("sizes of tiles are in test_tiles_cover_the_columns")
def test_an_epilogue_gathers_exactly_where_its_tiles_are_single_rows(monkeypatch, gather):
    constants: list[dict[str, Any]] = []

    def launch(module: str, kernel: str, *arrays: Any, out: Any, **rest: Any) -> Any:
        constants.extend([rest] if "epilogue" in kernel else [])
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)

    monkeypatch.setattr(triton_gpu, "launch", launch)
    monkeypatch.setattr(paged_gpu, "launch", launch)
    model = packed_model(execution=recorded_steps(gather=gather))
    answer(model, ROWS[:2], mj.Gates(2), 2)
    assert {(given["ADAPTERS"].gather, given["BM"]) for given in constants} == {(bool(gather), 1 if gather else 16)}


@pytest.mark.parametrize("fused", [False, True])
def test_a_launch_more_weighs_what_is_not_gathered(monkeypatch, fused):
    """Many rows, or rows whose adapters' matrices are averaged."""
    launches = recorded(monkeypatch)
    model = packed_model(execution=recorded_steps(gather=4 if fused else 0))
    answer(model, ROWS[:2], Composed((("cedar", 0.5), ("apple", 0.5)), fused), 2)
    assert [name for name in launches if name != "weigh_kernel"] == LAYER * (TRACES * model.config.num_layers)
    assert launches.count("weigh_kernel") == 4 * TRACES * model.config.num_layers


def test_a_wide_bank_takes_another_launch_in_each_group(monkeypatch):
    launches = recorded(monkeypatch)
    model = packed_model(execution=recorded_steps(width=8))
    answer(model, ROWS[:1], mj.Gates(2), 2)
    assert [name for name in launches if name != "shrink_kernel"] == LAYER * (TRACES * model.config.num_layers)
    assert launches.count("shrink_kernel") == 4 * TRACES * model.config.num_layers


@pytest.mark.parametrize(
    ("change", "router", "reason"),
    [
        ({}, None, None),
        ({}, mj.Gates(2), None),
        ({}, mj.Fixed({"cedar": 0.5, "apple": 0.5}), None),
        ({}, mj.Gates(1, within=("apple", "birch")), None),
        ({}, [mj.Gates(1), mj.Fixed("cedar")], None),
        ({}, [mj.Gates(1), Composed((("cedar", 1.0),), True)], None),
        ({"sliding_window": 8}, None, "sliding window"),
        ({"head_dim": 96}, None, "heads"),
        ({"head_dim": 512}, None, "heads"),
    ],
)
def test_who_is_served(change, router, reason):
    model = packed_model()
    module = nnx.merge(model.graph, model.weights)
    config = dataclasses.replace(model.config, **change)
    found = decoding.refusal(module.layers, config, model.bind(router, 2), 2, STEPS)
    assert found == reason or (reason is not None and reason in found)


@pytest.mark.parametrize(
    "routers",
    [[mj.Gates(2), mj.Gates(1)], [mj.Gates(2), mj.Fixed("cedar")], [mj.Gates(2, within=("cedar", "birch")), None]],
    ids=["gates", "mixed", "within"],
)
def test_what_a_token_router_chose_is_served(routers):
    """A wide one too, since XLA computes it, and what is refused of gates at the projections: mixed batches, sets."""
    model = packed_model(form=TokenRouterForm(width=256, depth=2))
    module = nnx.merge(model.graph, model.weights)
    x, logits = jnp.zeros((2, 1, 128)), jnp.zeros((2, 1, 4))
    chosen = choose(model.bind(routers, 2), x, logits)
    assert isinstance(chosen, Routing)
    assert decoding.refusal(module.layers, model.config, chosen, 2, STEPS) is None
    fused = dataclasses.replace(chosen, fused=jnp.asarray([False, True]))
    assert decoding.refusal(module.layers, model.config, fused, 2, STEPS) is None
    wide = dataclasses.replace(STEPS, dense_width=8)
    mixed = packed_model().bind([mj.Gates(1), Composed((("cedar", 1.0),), True)], 2)
    for router in (fused, mixed):
        assert decoding.refusal(module.layers, model.config, router, 2, wide) == "fusion in a wide bank"


@pytest.mark.parametrize(
    "change", [{"dora": PROJECTIONS}, {"lora_bias": PROJECTIONS[6:]}, {}], ids=["dora", "bias", "none"]
)
@pytest.mark.parametrize("wide", [True, False])
def test_dora_and_biases_of_adapters_are_left_to_xla(change, wide):
    """In a wide bank, whose A's are not packed, too: the kernels would compute the rest without them."""
    model = small("float32", layers=1, smaller=True, **change)
    graph = layout.with_execution(
        model.graph, model.weights, dataclasses.replace(STEPS, dense_width=8 if wide else 512)
    )
    layers = nnx.merge(*layout.pack(graph, model.weights)).layers
    how = dataclasses.replace(STEPS, dense_width=8 if wide else 512)
    found = decoding.refusal(layers, model.config, model.bind(mj.Fixed("cedar"), 2), 2, how)
    assert found == ("DoRA or biases of adapters" if change else None)
    assert decoding.refusal(layers, model.config, None, 2, how) is None


def test_fusion_of_adapters_in_several_slots_is_left_to_xla():
    """Alone, and in a batch with gates; where such adapters are only chosen or mixed it is served."""
    model = packed_model()
    layers = nnx.merge(model.graph, model.weights).layers
    where = np.asarray([[0, 1], [2, -1]], np.int32)
    fused = Routing(np.zeros((2, 1, 1, 2), np.int32) + np.arange(2), np.full((2, 1, 1, 2), 0.5, np.float32))
    mixture = fused.moved(where, 4, None)
    fused = dataclasses.replace(fused, fused=np.asarray([True, False])).moved(where, 4, None)
    assert np.asarray(fused.indices)[0, 0, 0].tolist() == [0, 1, 2, -1]
    gates = mj.Gates(1).bind([mj.Gates(1)] * 2, ("apple", "birch")).moved(where, 4, None)
    kinds = jnp.asarray([0, 1], jnp.int32)
    for router, expected in (
        (mixture, None), (gates, None), (fused, "several places"), (Mixed(kinds, (fused, gates)), "several places"),
    ):  # fmt: skip
        found = decoding.refusal(layers, model.config, jax.tree.map(jnp.asarray, router), 2, STEPS)
        assert found == expected or (expected is not None and expected in str(found))


def test_a_model_whose_gates_are_elsewhere_is_refused():
    model = plain_model()
    module = nnx.merge(model.graph, model.weights)
    assert "behind" in str(decoding.refusal(module.layers, model.config, model.bind(mj.Gates(2), 1), 1, STEPS))


def test_more_rows_than_a_step_has_are_refused():
    model = packed_model()
    layers, four = nnx.merge(model.graph, model.weights).layers, ExecutionConfig(step=StepLimits(rows=4))
    assert decoding.refusal(layers, model.config, None, 4, four) is None
    assert "rows" in str(decoding.refusal(layers, model.config, None, 5, four))
    assert "no steps" in str(decoding.refusal(layers, model.config, None, 1, ExecutionConfig()))


def test_what_runs_follows_platform_dtype_and_mesh(monkeypatch):
    of = ExecutionConfig.of
    assert of("cpu", "float32") == ExecutionConfig()
    assert of("tpu", "bfloat16") == ExecutionConfig("tpu", ragged=True)
    gpu = of("gpu", "bfloat16")
    assert gpu == ExecutionConfig(
        "gpu", StepLimits(512, 8, 2048), ("packed",), triton=True, epilogue_tokens=128, fp8_tokens=512
    )
    assert of("gpu", "float32") == dataclasses.replace(gpu, fused_attention=(), fp8_tokens=None)
    assert of("gpu", "bfloat16", triton=False) == dataclasses.replace(
        gpu, step=None, triton=False, epilogue_tokens=None
    )
    many = jax.sharding.AbstractMesh((2,), ("fsdp",))
    assert of("gpu", "bfloat16", many) == dataclasses.replace(gpu, step=None, epilogue_tokens=None, fp8_tokens=None)
    monkeypatch.setattr(execution, "platform", lambda: "tpu")
    assert ExecutionConfig.here("bfloat16") == ExecutionConfig("tpu", ragged=True)


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 512])
@pytest.mark.parametrize("gather", [None, False, True])
@pytest.mark.parametrize(
    ("total", "epilogue", "head"),
    [(6144, "qkv", 128), (4096, "residual", 128), (28672, "silu", 128), (960, "qkv", 64), (576, "residual", 64)],
)
def test_tiles_cover_the_columns(rows, gather, total, epilogue, head):
    size = triton_gpu.tiles(rows, total, epilogue, head, gather)
    assert total % (2 * size["BH"]) == 0
    assert epilogue != "qkv" or head // 2 % size["BH"] == 0
    assert gather is not False or size["BM"] == min(64, max(16, rows))
    assert not gather or size["BM"] == 1


@pytest.mark.parametrize(
    ("epilogue", "total", "few", "many"),
    [("qkv", 6144, 32, (32, 64, 64)), ("silu", 28672, 32, (128, 128, 128)), ("residual", 4096, 16, (16, 32, 64))],
)
def test_tiles_of_chosen_rows_widen_with_the_rows(epilogue, total, few, many):
    """Of a Llama-3-8B; every program's columns are its own whatever the width."""

    def width(rows: int) -> int:
        return triton_gpu.tiles(rows, total, epilogue, 128, True)["BH"]

    assert width(1) == width(4) == few
    assert (width(16), width(32), width(64)) == many
    ranks = [triton_gpu.tiles(32, total, epilogue, 128, True, rank)["BH"] for rank in (8, 16, 64)]
    assert ranks == [many[1], min(many[1], 64), min(many[1], few)]  # one warp's
    for rows in (16, 32, 64):
        widest = min(triton_gpu.WIDEST, 64 if epilogue == "qkv" else total // 2)
        assert rows * total <= 2 * width(rows) * StepLimits.programs or width(rows) == widest


def test_no_tile_is_an_error_that_names_the_columns():
    with pytest.raises(NotImplementedError, match="columns of silu in blocks of 16, found 200"):
        triton_gpu.tiles(1, 200, "silu", 0, False)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("router", "form"),
    [
        (None, None),
        (mj.Gates(2), None),
        (mj.Fixed({"cedar": 0.7, "apple": 0.4}), None),
        (mj.Gates(2), ROUTER),
    ],
    ids=["bare", "gates", "fixed", "token router"],
)
def test_generation_on_a_gpu(dtype, router, form):
    """Float32: the tokens and routing of XLA. bfloat16: finite, and the same twice over."""

    def run(execution: ExecutionConfig) -> Any:
        model = packed_model(dtype, form, execution)
        return answer(model, ROWS, router, 12)

    gpu = ExecutionConfig.of("gpu", dtype)
    wanted, found = run(dataclasses.replace(gpu, step=None) if dtype == "float32" else gpu), run(gpu)
    assert found[0] == wanted[0]
    traced: list[Any] = wanted[1] or []
    for (i, w), (j, v) in zip(found[1] or [], traced, strict=True):
        np.testing.assert_array_equal(i, j)
        np.testing.assert_allclose(w, v, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 9, 18, 27])
def test_groups_on_a_gpu(monkeypatch, first):
    """The interpreter's cases, compiled: against float64, epilogues, routings and forms mixed."""
    import decode_step_on_cpu as cases

    launches: list[str] = []
    launch = triton_gpu.launch

    def record(module: str, kernel: str, *arrays: Any, **rest: Any) -> Any:
        launches.append(kernel)
        return launch(module, kernel, *arrays, **rest)

    monkeypatch.setattr(triton_gpu, "launch", record)
    with jax.default_matmul_precision("highest"):  # as the model computes float32; tensor cores alone are 1e-4 off
        for seed in range(first, first + 9):
            cases.one_case(seed, launches)
        for rows, seed in cases.MANY[first % 18 // 9 :: 2]:
            cases.one_case(seed, launches, rows)


def test_many_choices_are_not_written_out():
    """A program of one row's choices is written out for each: of twenty the compiler would take ten times as long."""
    b = jnp.zeros((2, 28, 4, 96), jnp.bfloat16)
    group = Group(
        jnp.zeros((2, 96 + 3 * 128, 32), jnp.bfloat16), None, b, jnp.zeros((2, 3, 28)), (32, 32, 32), 1e-5, 128, 28, 0
    )
    state = StepState(jnp.zeros((2, 1, 2, 32)), jnp.zeros((1,), jnp.int32), jnp.zeros((1,)), 1)

    def gathers(choices: int, rows: int = 8) -> bool:
        own = jnp.zeros((rows, choices), jnp.int32), jnp.zeros((rows, choices))
        layout = triton_gpu.adapter_layout(group, rows, state, Choice(choices, None, None, *own), StepLimits())
        assert layout is not None
        return layout.gather

    assert [gathers(n) for n in (1, 2, triton_gpu.WRITTEN_OUT, 9, 20)] == [True, True, True, False, False]
    assert not gathers(2, rows=256)
