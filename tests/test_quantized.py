"""A base in 8 or 4 bits: what is written, what it computes, and who refuses it."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from extent import parameters
from flax import nnx
from meshes import mesh_of
from safetensors.numpy import load_file, save_file
from tiny import assert_refused, edit_json, tiny_llama, tiny_peft

import meteora_jax as mj
from converters import export_base, export_gates, export_merged, import_adapters, import_base, quantize_base
from converters.quantize import open_matrix
from meteora_jax.cli import main
from meteora_jax.config import PROJECTIONS, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.gates import save_gates

SHAPE = dict(hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ROWS = [[5, 6, 7, 8, 9, 300, 17], [7, 7, 40, 41, 319, 5, 0]]
NAMES = ("one", "two")
OPTIONS = {"int8": ("--head", "--embedding"), "fp8": (), "int4": ("--head",)}
NAME_OF = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its three quantised forms, a bank and gates."""
    folder = tmp_path_factory.mktemp("quantized")
    hf = tiny_llama(folder, **SHAPE)[1]
    import_base(hf, folder / "base")
    peft = {name: tiny_peft(folder, hf, name, seed=i + 1) for i, name in enumerate(NAMES)}
    import_adapters(folder / "bank", folder / "base", peft)
    config, rng = hf_config.from_hf(read_json(folder / "base" / "config.json")), np.random.default_rng(0)
    gates = {p: 0.2 * rng.standard_normal((2, config.projection_shape(p)[0], 2)) for p in PROJECTIONS}
    save_gates(folder / "gates", GateConfig(NAMES, 2, 1.0), {p: g.astype(np.float32) for p, g in gates.items()})
    for kind, options in OPTIONS.items():
        base, dest = str(folder / "base"), str(folder / kind)
        main(["quantize", base, dest, "--weights", kind, *options, "--json", str(folder / f"{kind}.json")])
    return folder


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """The matrices of a BASE in float64, by path."""
    tensors, found = load_file(folder / "weights.safetensors"), {}
    for path, value in tensors.items():
        if path.endswith(("_scale", "_zero")):
            continue
        scale = tensors.get(f"{path}_scale")
        if f"{path}_zero" in tensors and scale is not None:
            q = np.empty((value.shape[0], 2 * value.shape[1], value.shape[2]))
            q[:, ::2], q[:, 1::2] = value % 16, value // 16
            size = q.shape[1] // scale.shape[1]
            zero = np.repeat(tensors[f"{path}_zero"].astype(np.float64), size, 1)
            value = np.repeat(scale.astype(np.float64), size, 1) * (q - zero)
        elif scale is not None:
            value = value.view(ml_dtypes.float8_e4m3fn) if value.dtype == np.uint8 else value
            value = value.astype(np.float64)
            value = value * (scale[:, None] if path == "embed.embedding" else scale[..., None, :])
        found[path] = np.asarray(value, np.float64)
    return found


def exact_logits(folder: Path) -> np.ndarray:
    """Of ROWS by transformers in float64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM  # not above: the process with devices needs neither

    raw, weights = read_json(folder / "config.json"), dequantized(folder)
    names = {key: raw[key] for key in (*SHAPE, "vocab_size", "rms_norm_eps", "rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**names, tie_word_embeddings=False, attn_implementation="eager")).double()
    state = {
        "model.embed_tokens.weight": weights["embed.embedding"], "model.norm.weight": weights["norm.scale"],
        "lm_head.weight": weights["lm_head.kernel"].T,
    }  # fmt: skip
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        state[f"{layer}.input_layernorm.weight"] = weights["layers.attention_norm.scale"][i]
        state[f"{layer}.post_attention_layernorm.weight"] = weights["layers.mlp_norm.scale"][i]
        for p in PROJECTIONS:
            block = NAME_OF.get(p[0] if len(p) == 6 else "", "mlp")
            state[f"{layer}.{block}.{p}.weight"] = weights[f"layers.{p}.kernel"][i].T
    model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()})
    with torch.no_grad():
        return model.eval()(torch.tensor(ROWS)).logits.numpy()


@pytest.mark.parametrize("kind", OPTIONS)
def test_logits_are_those_of_the_matrices_that_it_stands_for(folder: Path, kind: str):
    model = mj.load(folder / kind, dtype="float32")
    assert np.abs(np.stack(model.logits(ROWS, router=None)) - exact_logits(folder / kind)).max() < 1e-4


@pytest.mark.parametrize("kind", OPTIONS)
def test_weights_stay_packed_on_the_device(folder: Path, kind: str):
    model = mj.load(folder / kind, folder / "bank", folder / "gates", dtype="bfloat16")
    assert model.dtype == "bfloat16"
    held = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(model.weights)}
    kernels = {path: x for path, x in held.items() if path[-1] == "kernel"}
    assert {str(x.dtype) for x in kernels.values()} == {{"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}[kind]}
    matrices = 2 * sum(i * o for i, o in (model.config.projection_shape(p) for p in PROJECTIONS))
    assert sum(x.nbytes for x in kernels.values()) == matrices / (2 if kind == "int4" else 1)
    base = [x for path, x in held.items() if not path[-1].startswith("lora") and path[-1] != "gate"]
    assert sum(x.nbytes for x in base) == model.config.weight_bytes(2)
    report = read_json(folder / f"{kind}.json")
    assert report["bytes"] == (folder / kind / "weights.safetensors").stat().st_size < report["bytes_before"]
    assert (
        read_json(folder / kind / "config.json")["meteora"]["origin"]
        == (read_json(folder / "base" / "config.json")["meteora"]["origin"])
    )


@pytest.fixture(scope="module")
def written_out(folder: Path) -> Path:
    """BASE folders in float32 of the matrices that the int8 and int4 ones stand for, by way of an export."""
    for kind in ("int8", "int4"):
        export_base(folder / kind, folder / f"{kind}-hf", dequantize=True)
        import_base(folder / f"{kind}-hf", folder / f"{kind}-float")
    return folder


def test_an_export_writes_the_matrices_out(written_out: Path):
    for kind in ("int8", "int4"):
        exact, found = dequantized(written_out / kind), load_file(written_out / f"{kind}-float" / "weights.safetensors")
        assert exact.keys() == found.keys()
        for path, value in exact.items():
            assert np.allclose(found[path], value, rtol=1e-6, atol=0), path


@pytest.mark.parametrize("kind", parameters(["int8", "int4"], ["int8"], "a mesh decodes with int4"))
def test_tokens_and_gate_gradients_are_those_of_the_matrices_written_out(written_out: Path, kind: str):
    """Prompts of several routers by the engine, and the gates' gradients, which go through every product."""
    routers = [mj.Gates(2), mj.Fixed("two")]
    said, slopes = [], []
    for base in (kind, f"{kind}-float"):
        model = mj.load(written_out / base, written_out / "bank", written_out / "gates", dtype="float32")
        said.append([c.token_ids for c in model.generate(ROWS, routers, 8)])
        slopes.append(gate_gradients(model))
    assert said[0] == said[1]
    for (path, mine), (_, other) in zip(*map(nnx.to_flat_state, slopes), strict=True):
        assert jnp.abs(other[...]).max() > 0, path
        assert jnp.abs(mine[...] - other[...]).max() <= 1e-4 * jnp.abs(other[...]).max(), path


def gate_gradients(model: Any) -> Any:
    """Of the next tokens' likelihood."""
    from meteora_jax.routing.gates import BoundGates, GateParam
    from pallas_kernels.topk_gating import TopK

    graph, gates, rest = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    tokens = jnp.asarray(ROWS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    router = BoundGates(TopK(jnp.full(2, 2, jnp.int32), jnp.ones(2, jnp.float32), 2), 2)

    def loss(gates: Any) -> jax.Array:
        llama = nnx.merge(graph, gates, rest)
        logits = llama.logits(llama(tokens, positions, router).hidden, router)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2)
        return -jnp.mean(chosen)

    return jax.jit(jax.grad(loss))(gates)


def test_several_devices(folder: Path):
    one, mesh = (
        mj.load(folder / "int4", folder / "bank", folder / "gates", mesh=mesh, dtype="float32")
        for mesh in (None, mesh_of(1, 2, 2))
    )
    logits = [np.stack(model.logits(ROWS, mj.Gates(2))) for model in (one, mesh)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4
    said = [[c.token_ids for c in model.generate(ROWS, mj.Gates(2), 6)] for model in (one, mesh)]
    assert said[0] == said[1]
    leaves = {".".join(map(str, path[1:])): leaf[...] for path, leaf in nnx.to_flat_state(mesh.weights)}
    parts = {name: list(x.sharding.shard_shape(x.shape)) for name, x in leaves.items() if "kernel" in name}
    # of [L, I / 2, O] and [L, groups, O]: columns by tensor, inputs by fsdp; of o and down the other way round
    assert parts["qkv.kernel"] == [2, 64, 256]
    assert parts["qkv.kernel_scale"] == parts["qkv.kernel_zero"] == [2, 1, 256]
    assert parts["o.kernel_scale"] == [2, 1, 128]
    assert parts["down.kernel"] == [2, 24, 128]
    assert parts["down.kernel_scale"] == [2, 3, 128]  # three groups on two devices stay whole


def test_adapters_of_the_original_are_taken(folder: Path, tmp_path: Path):
    """DoRA's norms are of the matrices that the base stands for; the record says that both are one model."""
    dora = tiny_peft(tmp_path, folder / "hf", "dora", use_dora=True)
    import_adapters(tmp_path / "bank", folder / "int4", {"dora": dora})
    kernel = dequantized(folder / "int4")["layers.down_proj.kernel"][1]
    tensors = load_file(tmp_path / "bank" / "weights.safetensors")
    a, b, scale = (tensors[f"down_proj.{part}"][1, 0].astype(np.float64) for part in ("a", "b", "scale"))
    norm = np.linalg.norm(kernel + scale * a.T @ b, axis=0)
    assert np.allclose(tensors["down_proj.dora"][1, 0], tensors["down_proj.magnitude"][1, 0] / norm - 1, atol=1e-5)
    mj.load(folder / "int4", tmp_path / "bank")  # refuses a bank of another base


def test_any_rows_of_a_matrix(folder: Path):
    from converters.own_folders import read_base

    for kind in ("int8", "fp8", "int4"):
        opened, exact = read_base(folder / kind, quantized=True), dequantized(folder / kind)
        for path, start, stop in (("layers.q_proj.kernel", 3, 131), ("layers.down_proj.kernel", 31, 96)):
            found = open_matrix(*opened, path, 1)
            assert found.shape == exact[path][1].shape
            assert np.allclose(found.rows(start, stop), exact[path][1][start:stop], rtol=1e-6, atol=0)


def test_inspect_and_the_reason_against_triton(folder: Path, capsys: pytest.CaptureFixture[str]):
    from meteora_jax.execution import ExecutionConfig
    from meteora_jax.model.decoding import refusal

    main(["inspect", str(folder / "int4"), "--json", str(folder / "said.json")])
    about = read_json(folder / "said.json")["about"]
    assert about["quantization"] == "int4 in groups of 128, head int8"
    main(["inspect", str(folder / "base"), "--json", str(folder / "said.json")])
    assert read_json(folder / "said.json")["about"]["parameters"] == about["parameters"]
    model = mj.load(folder / "int4", folder / "bank")
    execution = ExecutionConfig.of("gpu", jnp.bfloat16)
    layers = nnx.merge(model.graph, model.weights).layers
    assert "a quantised base that does not lie in words" in str(refusal(layers, model.config, None, 1, execution))
    capsys.readouterr()


def test_what_is_refused(folder: Path, tmp_path: Path):
    dest, base = tmp_path / "new", folder / "int4"
    again = "meteora.quantization: expected a base whose weights are not quantised"
    assert_refused(
        lambda: quantize_base(base, dest, "int8"), dest, str(base), again, "found int4 in groups of 128, head int8"
    )
    assert_refused(lambda: export_base(base, dest), dest, again, "--dequantize")
    assert_refused(lambda: export_merged(base, folder / "bank", "one", dest), dest, again, "--dequantize")
    assert_refused(lambda: export_gates(base, folder / "bank", folder / "gates", dest), dest, again)
    assert_refused(lambda: quantize_base(folder / "base", dest, "int3"), dest, "weights: expected int8, fp8, int4")
    assert_refused(
        lambda: quantize_base(folder / "hf", dest, "int8"),
        dest,
        "expected a BASE folder, found a Hugging Face model",
        "meteora import base",
    )
    other = tmp_path / "other"
    shutil.copytree(folder / "base", other)
    edit_json(other / "config.json", meteora={"format": "meteora-base-9"})
    assert_refused(lambda: quantize_base(other, dest, "int8"), dest, "format: expected 'meteora-base-1'", "base-9")
    known = {"weights": "int4", "group_size": 128, "head": False, "embedding": False}
    for wrong in ({"weights": "int2"}, {"weights": ["int4"]}, {"group_size": 5}, {"group_size": None}, {"head": 1}):
        edit_json(other / "config.json", meteora={"quantization": {**known, **wrong}})
        expected = "meteora.quantization: expected weights (int8, fp8, int4)"
        assert_refused(lambda: mj.load(other), dest, expected, str(next(iter(wrong.values()))))


def test_weights_that_cannot_be_quantised(folder: Path, tmp_path: Path):
    narrow = import_tiny(tmp_path, "narrow", intermediate_size=88)
    expected = "down_proj: expected inputs in multiples of 16 for int4, found 88"
    assert_refused(lambda: quantize_base(narrow, tmp_path / "new", "int4"), tmp_path / "new", expected)
    quantize_base(narrow, tmp_path / "fits", "fp8")
    tied = import_tiny(tmp_path, "tied", tie_word_embeddings=True)
    expected = "head: expected a head of its own, found it tied to the embedding"
    assert_refused(lambda: quantize_base(tied, tmp_path / "new", "int8", head=True), tmp_path / "new", expected)
    quantize_base(tied, tmp_path / "both", "int8", embedding=True)
    model, plain = mj.load(tmp_path / "both", dtype="float32"), mj.load(tied, dtype="float32")
    mine, exact = (np.stack(m.logits(ROWS, router=None)) for m in (model, plain))
    assert 0 < np.abs(mine - exact).max() < 0.02 * np.abs(exact).max()
    damaged = load_file(tied / "weights.safetensors")
    damaged["layers.o_proj.kernel"][1, 3, 5] = np.inf
    save_file(damaged, tied / "weights.safetensors")
    expected = "layers.o_proj.kernel: expected finite values"
    assert_refused(lambda: quantize_base(tied, tmp_path / "new", "int4"), tmp_path / "new", expected)


def test_floats_in_the_place_of_quantised_values_are_refused(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "int8", tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "weights.safetensors")
    tensors["layers.o_proj.kernel"] = tensors["layers.o_proj.kernel"].astype(np.float32)
    save_file(tensors, tmp_path / "int8" / "weights.safetensors")
    expected = "layers.o_proj.kernel: expected type I8, found F32"
    assert_refused(lambda: mj.load(tmp_path / "int8"), tmp_path / "none", expected)
    assert_refused(lambda: main_inspect(tmp_path / "int8"), tmp_path / "none", expected)


def main_inspect(path: Path) -> None:
    from meteora_jax.cli.inspect import describe

    describe(path)


def import_tiny(tmp_path: Path, name: str, **overrides: Any) -> Path:
    import_base(tiny_llama(tmp_path, folder=f"{name}-hf", **overrides)[1], tmp_path / name)
    return tmp_path / name


def test_a_plan_shows_the_memory():
    import dataclasses

    from meteora_jax.planning import abstract_model, shape_of
    from meteora_jax.quantization import Quantization

    config = dataclasses.replace(shape_of("llama3-70b"), num_layers=8)
    held = {}
    for kind in (None, "int8", "int4"):
        own = dataclasses.replace(config, quantization=None if kind is None else Quantization.of(kind))
        state = nnx.to_flat_state(nnx.split(abstract_model(own, 4, 8)[0])[1])
        held[kind] = sum(x.size * x.dtype.itemsize for _, x in state)
    matrices = 8 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert held[None] - held["int8"] == pytest.approx(matrices, rel=1e-3)  # of 2 bytes a weight 1 remains,
    assert held[None] - held["int4"] == pytest.approx(matrices * (1.5 - 5 / 128), rel=1e-3)  # or half of one
