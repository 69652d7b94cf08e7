"""Hugging Face folders that are quantised already, written by the formats' descriptions, and what is read of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft

from converters import import_adapters, import_base, open_base, plan_base
from meteora_jax.cli.inspect import describe

SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
MODULES = [
    f"model.layers.{i}.{block}.{p}_proj"
    for i in range(2)
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for p in names
]
Tensors = dict[str, torch.Tensor]


def words(parts: np.ndarray, bits: int) -> torch.Tensor:
    """Parts along the last axis into int32, lowest first."""
    per = 32 // bits
    grouped = parts.reshape(*parts.shape[:-1], -1, per).astype(np.int64)
    joined = sum(grouped[..., i] << (bits * i) for i in range(per))
    return torch.from_numpy(joined.astype(np.uint32).view(np.int32))


def fp8(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """Blocks of 40 rows and 32 columns; the last ones are smaller."""
    values = rng.uniform(-400, 400, (o, i)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1e-4, 1e-3, (-(-o // 40), -(-i // 32))).astype(np.float32)
    stored = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    whole = np.kron(scale, np.ones((40, 32)))[:o, :i]
    return {"weight": stored, "weight_scale_inv": torch.from_numpy(scale)}, values.astype(np.float64) * whole


def int8(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    values, scale = rng.integers(-127, 128, (o, i)), rng.uniform(1e-4, 1e-3, (o, 1)).astype(np.float32)
    tensors = {"weight": torch.from_numpy(values.astype(np.int8)), "weight_scale": torch.from_numpy(scale)}
    return {**tensors, "input_scale": torch.ones(1)}, values * scale.astype(np.float64)


def packed(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """Groups of 16 columns."""
    values, scale = rng.integers(-8, 8, (o, i)), rng.uniform(1e-3, 1e-2, (o, i // 16)).astype(np.float32)
    tensors = {"weight_packed": words(values + 8, 4), "weight_scale": torch.from_numpy(scale)}
    return {**tensors, "weight_shape": torch.tensor([o, i])}, values * np.repeat(scale.astype(np.float64), 16, 1)


def gptq(bits: int, offset: int) -> Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]:
    """Groups of 16 inputs in no order."""

    def write(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
        q, groups = rng.integers(0, 2**bits, (i, o)), rng.permutation(np.arange(i) // 16)
        zero, scale = rng.integers(0, 2**bits, (i // 16, o)), rng.uniform(1e-3, 1e-2, (i // 16, o)).astype(np.float16)
        tensors = {
            "qweight": words(q.T, bits).T.contiguous(), "qzeros": words(zero, bits),
            "scales": torch.from_numpy(scale), "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }  # fmt: skip
        meant = (zero + offset) % 2**bits  # AutoGPTQ masks what it read and added one to
        return tensors, (scale[groups].astype(np.float64) * (q - meant[groups])).T

    return write


def awq_words(parts: np.ndarray) -> torch.Tensor:
    """[n, O] into int32 [n, O / 8], as AutoAWQ's `WQLinear_GEMM` packs them: column 8 w + order[i] at the bits 4 i."""
    packed = np.zeros((len(parts), parts.shape[1] // 8), np.int64)
    for word in range(packed.shape[1]):
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed[:, word] |= parts[:, 8 * word + column].astype(np.int64) << 4 * i
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def awq(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """Groups of 16 inputs."""
    q, zero = rng.integers(0, 16, (i, o)), rng.integers(0, 16, (i // 16, o))
    scale = rng.uniform(1e-3, 1e-2, (i // 16, o)).astype(np.float16)
    tensors = {"qweight": awq_words(q), "qzeros": awq_words(zero), "scales": torch.from_numpy(scale)}
    return tensors, (np.repeat(scale.astype(np.float64), 16, 0) * (q - np.repeat(zero, 16, 0))).T


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [40, 32]}, fp8, "FP8"),
    "int8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, int8, "INT8"),
    "packed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed, "INT4"),
    "gptq-4": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, 1), "INT4"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq, "INT4"),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, 0), "INT8"),
}


def quantized_folder(tmp_path: Path, case: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of that kind, and the matrices [O, I] that its modules stand for."""
    hf, (settings, write, _) = tiny_llama(tmp_path, **SHAPE)[1], CASES[case]
    rng, exact = np.random.default_rng(3), {}

    def edit(tensors: Tensors) -> None:
        for module in MODULES:
            parts, exact[module] = write(rng, *tensors.pop(f"{module}.weight").shape)
            tensors.update({f"{module}.{name}": value for name, value in parts.items()})

    edit_safetensors(hf / "model.safetensors", edit)
    edit_json(hf / "config.json", quantization_config=settings)
    return hf, exact


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_read_as_what_they_stand_for(tmp_path: Path, case: str):
    hf, exact = quantized_folder(tmp_path, case)
    remarks: list[str] = []
    import_base(hf, tmp_path / "base", on_remark=remarks.append)
    found = load_file(tmp_path / "base" / "weights.safetensors")
    for module, matrix in exact.items():
        layer, name = int(module.split(".")[2]), module.split(".")[-1]
        assert np.allclose(found[f"layers.{name}.kernel"][layer], matrix.T, rtol=1e-6, atol=0), module
    assert "are read as what they stand for" in remarks[0]
    assert ("adapters of the unquantised model do not fit this base" in remarks[-1]) == (case == "awq")
    assert ("no recipe.yaml says how" in remarks[-1]) == (case in ("int8", "packed"))
    said = describe(hf)["about"]
    weights = sum(matrix.size for matrix in exact.values())
    size = weights // 2 if CASES[case][2] == "INT4" else weights
    assert said["stored as"][CASES[case][2]] == f"{len(MODULES)} tensors, {size:,} bytes"


@pytest.mark.parametrize("case", CASES)
def test_some_rows_are_those_of_the_whole(tmp_path: Path, case: str):
    """A large matrix is read piece by piece."""
    hf, exact = quantized_folder(tmp_path, case)
    by_key = {tensor.key.rpartition(".")[0]: tensor for tensor in open_base(hf).tensors}
    for module, matrix in exact.items():
        tensor = by_key[module]
        whole = matrix.T if tensor.key.endswith("qweight") else matrix
        for start, stop in ((0, 1), (9, 30), (len(whole) - 17, len(whole))):
            assert np.allclose(tensor.rows(start, stop), whole[start:stop], rtol=1e-6, atol=0), module


def test_what_does_not_fit_is_refused(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "gptq-4")
    first = MODULES[0]

    def refused(*parts: str) -> None:
        assert_refused(lambda: plan_base(hf), tmp_path / "none", *parts)

    edit_safetensors(hf / "model.safetensors", lambda t: t.update({f"{first}.g_idx": t[f"{first}.g_idx"] + 1}))
    refused(f"{first}.g_idx: expected groups 0 to 3, found 1 to 4")
    edit_safetensors(hf / "model.safetensors", lambda t: t.pop(f"{first}.g_idx"))
    refused(f"{first}.qweight: expected {first}.g_idx beside it, found none")
    edit_json(hf / "config.json", quantization_config={"quant_method": "gptq", "bits": 3})
    refused("quantization_config.bits: expected 4 or 8, found 3")
    edit_json(hf / "config.json", quantization_config={"quant_method": "hqq", "bits": 4})
    refused("quantization_config.quant_method: expected none, fp8, compressed-tensors, gptq, awq, found 'hqq'")
    edit_json(hf / "config.json", quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"})
    refused("quantization_config.version: expected 'gemm', found 'gemv'")
    edit_json(hf / "config.json", quantization_config={"quant_method": "awq", "bits": 8})
    refused("quantization_config.bits: expected 4, found 8")
    edit_json(hf / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128]})
    refused("weight_block_size: expected two sizes, found [128]")


def test_scales_of_another_shape_are_refused(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "fp8")
    key = f"{MODULES[4]}.weight_scale_inv"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: t[key][:1]}))
    assert_refused(lambda: plan_base(hf), tmp_path / "none", f"{key}: expected shape (3, 2), found (1, 2)")


@pytest.mark.parametrize(
    ("case", "recipe", "way"),
    [
        ("awq", None, "AWQ"),
        ("packed", "AWQModifier: {ignore: [lm_head]}", "AWQ"),
        ("int8", "SmoothQuantModifier: {smoothing_strength: 0.8}\n GPTQModifier: {}", "SmoothQuant"),
        ("int8", "GPTQModifier: {ignore: [lm_head]}", None),
        ("int8", None, None),
    ],
)
def test_who_folds_scales_into_norms_is_a_model_of_its_own(
    tmp_path: Path, case: str, recipe: str | None, way: str | None
):
    """Who names the unquantised model is refused then, who names the folded one is taken."""
    hf, _ = quantized_folder(tmp_path, case)
    if recipe is not None:
        (hf / "recipe.yaml").write_text(f"default_stage:\n  default_modifiers:\n    {recipe}\n")
    folder = tiny_peft(tmp_path, tiny_llama(tmp_path / "plain", **SHAPE)[1], "one")
    named = hf.rename(tmp_path / "Tiny-1M-Chat")
    import_base(named, tmp_path / "base")
    for name, taken in ((f"someone/Tiny-1M-Chat-{way}", way is not None), ("someone/Tiny-1M-Chat", way is None)):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=name)
        if taken:
            import_adapters(tmp_path / "bank", tmp_path / "base", {"one": folder})
        elif way is not None:
            dest, said = tmp_path / "none", f"expected Tiny-1M-Chat-{way} (this base), found {name}"
            assert_refused(lambda to=dest: import_adapters(to, tmp_path / "base", {"one": folder}), dest, said)


@pytest.mark.parametrize("case", ["gptq-4", "awq"])
def test_modules_left_in_floating_point_are_read_as_they_lie(tmp_path: Path, case: str):
    """Square ones too, whose shape does not tell how they lie; and AutoGPTQ's biases that are zero mean none."""
    hf, exact = quantized_folder(tmp_path, case)
    plain = torch.randn((64, 64), generator=torch.Generator().manual_seed(1))
    first, other = MODULES[0], MODULES[1]
    assert first.endswith("layers.0.self_attn.q_proj")

    def edit(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{first}.{part}", None)
        tensors[f"{first}.weight"] = plain
        tensors[f"{other}.bias"] = torch.zeros(exact[other].shape[0], dtype=torch.float16)

    edit_safetensors(hf / "model.safetensors", edit)
    import_base(hf, tmp_path / "base")
    found = load_file(tmp_path / "base" / "weights.safetensors")["layers.q_proj.kernel"]
    assert np.array_equal(found[0], plain.numpy().T)
    again = next(m for m in MODULES if m.endswith("layers.1.self_attn.q_proj"))
    assert np.allclose(found[1], exact[again].T, rtol=1e-6, atol=0)
    edit_safetensors(hf / "model.safetensors", lambda t: t[f"{other}.bias"].add_(1))
    assert_refused(lambda: plan_base(hf), tmp_path / "none", f"{other}.bias: expected no such tensor")


@pytest.mark.parametrize(
    ("case", "part", "change", "said"),
    [
        ("gptq-4", "scales", lambda t: t[0, 0], "expected F32 or F16 or BF16 of 2 axes, found F16 ()"),
        ("gptq-4", "qzeros", lambda t: t.to(torch.float16), "expected I32 of 2 axes, found F16"),
        ("gptq-4", "g_idx", lambda t: t.to(torch.float32), "expected I32 or I64 of 1 axes, found F32"),
        ("awq", "qzeros", lambda t: t.to(torch.float32), "expected I32 of 2 axes, found F32"),
        ("fp8", "weight_scale_inv", lambda t: t.to(torch.int32), "expected F32 or F16 or BF16, found I32"),
    ],
)
def test_parts_of_other_types_are_refused(tmp_path: Path, case: str, part: str, change: Any, said: str):
    hf, _ = quantized_folder(tmp_path, case)
    key = f"{MODULES[4]}.{part}"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: change(t[key]).clone()}))
    assert_refused(lambda: plan_base(hf), tmp_path / "none", f"{key}: {said}")


def test_awq_parts_of_another_shape_are_refused(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "awq")
    key = f"{MODULES[4]}.qzeros"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: t[key][:, :1]}))
    assert_refused(lambda: plan_base(hf), tmp_path / "none", f"{key}: expected shape (4, 12), found (4, 1)")
