"""Quantised bases made of Hugging Face folders that are quantised already: what is taken over, and what is not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_converters_quantized import CASES, MODULES, Tensors, quantized_folder, words
from tiny import assert_refused, edit_safetensors

import meteora_jax as mj
from converters import import_base
from converters.own_folders import read_base
from converters.quantize import open_matrix


def gptq_in_order(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """Groups of 32 inputs in their order; stored zeros lack 1, so that some are 16."""
    q, zero = rng.integers(0, 16, (i, o)), rng.integers(0, 16, (i // 32, o))
    scale = rng.uniform(1e-3, 1e-2, (i // 32, o)).astype(np.float16)
    tensors = {
        "qweight": words(q.T, 4).T.contiguous(), "qzeros": words(zero, 4), "scales": torch.from_numpy(scale),
        "g_idx": torch.arange(i, dtype=torch.int32) // 32,
    }  # fmt: skip
    return tensors, (np.repeat(scale.astype(np.float64), 32, 0) * (q - np.repeat((zero + 1) % 16, 32, 0))).T


def fp8_rows(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """A scale a row, in bfloat16."""
    values = rng.uniform(-400, 400, (o, i)).astype(ml_dtypes.float8_e4m3fn)
    scale = torch.from_numpy(rng.uniform(1e-4, 1e-3, (o, 1)).astype(np.float32)).bfloat16()
    stored = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, values.astype(np.float64) * scale.double().numpy()


def fp8_tensor(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """One scale, of no dimension."""
    tensors, scale = fp8_rows(rng, o, i)[0], torch.tensor(0.5)
    return {**tensors, "weight_scale": scale}, tensors["weight"].double().numpy() * 0.5


def int4_tensor(rng: np.random.Generator, o: int, i: int) -> tuple[Tensors, np.ndarray]:
    """One scale for all."""
    values = rng.integers(-8, 8, (o, i))
    return {"weight_packed": words(values + 8, 4), "weight_scale": torch.tensor([0.25])}, values * 0.25


OWN = {
    "int4-tensor": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, int4_tensor, "INT4"),
    "gptq-in-order": ({"quant_method": "gptq", "bits": 4, "desc_act": False}, gptq_in_order, "INT4"),
    "fp8-rows": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, fp8_rows, "FP8"),
    "fp8-tensor": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, fp8_tensor, "FP8"),
}
FORMATS = {
    "gptq-in-order": "int4", "awq": "int4", "packed": "int4", "int8": "int8", "fp8-rows": "fp8", "fp8-tensor": "fp8",
    "int4-tensor": "int4",
}  # fmt: skip
GROUPS = {"gptq-in-order": 32, "awq": 16, "packed": 16, "int4-tensor": 32}  # inputs are 64 and 96


@pytest.mark.parametrize("case", FORMATS)
def test_what_the_format_allows_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    """Each matrix stands for the source's numbers exactly, but for float32's products; all but one head stay packed."""
    monkeypatch.setattr("test_converters_quantized.CASES", {**CASES, **OWN})
    hf, exact = quantized_folder(tmp_path, case)
    remarks: list[str] = []
    import_base(hf, tmp_path / "base", on_remark=remarks.append, weights=FORMATS[case])
    assert remarks[-1].endswith(": 14 of 14 matrices taken over bit for bit")
    opened = read_base(tmp_path / "base", quantized=True)
    assert opened[0].quantization is not None
    assert opened[0].quantization.group_size == GROUPS.get(case)
    for module, matrix in exact.items():
        layer, name = int(module.split(".")[2]), module.split(".")[-1]
        found = open_matrix(*opened, f"layers.{name}.kernel", layer).read()
        np.testing.assert_allclose(found, matrix.T, rtol=1e-6, atol=0)


def test_a_taken_base_answers_as_the_written_out_one(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "awq")
    import_base(hf, tmp_path / "whole")
    import_base(hf, tmp_path / "packed", weights="int4")
    one, other = (mj.load(tmp_path / name, dtype="float32").logits([[5, 6, 7]]) for name in ("whole", "packed"))
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-4)


def test_what_is_rounded_anew_is_said(tmp_path: Path):
    """Groups in no order, 8 bits with zeros, blocks, a matrix that was left in floating point, another format."""
    for case, weights in (("gptq-4", "int4"), ("gptq-8", "int8"), ("fp8", "fp8"), ("int8", "fp8")):
        hf, exact = quantized_folder(tmp_path / case, case)
        remarks: list[str] = []
        import_base(hf, tmp_path / case / "base", on_remark=remarks.append, weights=weights)
        assert ": 0 of 14 matrices taken over bit for bit; rounded anew: layers." in remarks[-1]
        assert remarks[-1].count("_proj.kernel (2)") == 7
    hf, _ = quantized_folder(tmp_path / "mixed", "int8")
    plain = torch.from_numpy(np.random.default_rng(0).standard_normal(exact[MODULES[1]].shape).astype(np.float32))

    def leave(tensors: Tensors) -> None:
        del tensors[f"{MODULES[1]}.weight_scale"], tensors[f"{MODULES[1]}.input_scale"]
        tensors[f"{MODULES[1]}.weight"] = plain

    edit_safetensors(hf / "model.safetensors", leave)
    import_base(hf, tmp_path / "mixed" / "base", on_remark=remarks.append, weights="int8")
    said = "13 of 14 matrices taken over bit for bit; rounded anew: layers.k_proj.kernel (1)"
    assert remarks[-1].endswith(said)
    opened = read_base(tmp_path / "mixed" / "base", quantized=True)
    found = open_matrix(*opened, "layers.k_proj.kernel", 0).read()
    assert 0 < np.abs(found - plain.numpy().T).max() < np.abs(plain.numpy()).max() / 127


def test_scales_that_are_not_finite_are_refused(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "int8")
    key = f"{MODULES[2]}.weight_scale"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: t[key] * float("nan")}))
    dest = tmp_path / "none"
    assert_refused(
        lambda: import_base(hf, dest, weights="int8"), dest, f"{MODULES[2]}.weight: expected finite scales and values"
    )


SCRIPT = """
import os, signal, sys
from converters import import_base, rules

rules.SAVE_BYTES = 1
def stop(key, done, total):
    return done == total // 2 and os.kill(os.getpid(), signal.SIGKILL)

import_base(sys.argv[1], sys.argv[2], weights="int4", progress=stop)
"""


def test_killed_it_goes_on_and_knows_what_it_rounded(tmp_path: Path):
    hf, _ = quantized_folder(tmp_path, "gptq-4")
    lines: list[str] = []
    import_base(hf, tmp_path / "whole", weights="int4", on_remark=lines.append)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(hf), str(tmp_path / "base")]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    told: list[int] = []
    import_base(
        hf,
        tmp_path / "base",
        weights="int4",
        on_remark=lines.append,
        progress=lambda key, done, total: told.append(done),
    )
    assert told[0] > 5
    assert lines[1] == lines[3]
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "base" / "config.json").read_text())["meteora"]["quantization"]["weights"] == "int4"
    assert load_file(tmp_path / "base" / "weights.safetensors")["layers.q_proj.kernel"].dtype == np.uint8
