"""Dry runs and `inspect`: every tensor's way before anything is written, the same that the import then takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_converters_meteora import NAMES, write_original
from tiny import edit_safetensors, hf_weights, tiny_llama, tiny_peft

from converters import import_adapters, import_base, plan_base
from meteora_jax.cli import main
from meteora_jax.io import hf_config

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def test_a_base_is_planned_as_it_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, folder = tiny_llama(tmp_path, dtype=torch.float16, tie_word_embeddings=True)
    edit_safetensors(
        folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    report, dest = tmp_path / "report.json", tmp_path / "base"
    main(["import", "base", str(folder), str(dest), "--dry-run", "--dtype", "bfloat16", "--json", str(report)])
    assert not dest.exists()
    assert "lm_head.weight F16 (320, 48) -> dropped: implied" in capsys.readouterr().out
    plan = json.loads(report.read_text())
    import_base(folder, dest, dtype="bfloat16")
    written, state = load_file(dest / "weights.safetensors"), load_file(folder / "model.safetensors")
    assert {row["key"] for row in plan["tensors"]} == state.keys()
    for row in plan["tensors"]:
        if row["to"] is None:
            continue
        path, _, layer = row["to"].rstrip("]").partition("[")
        found = written[path][int(layer)] if layer else written[path]
        source = state[row["key"]]
        assert [*source.shape] == row["shape"]
        assert source.dtype == TYPES[row["dtype"]]
        assert found.dtype == TYPES[row["stored"]]
        assert torch.equal(found, (source.T if "transposed" in row["how"] else source).bfloat16())
    assert {r["to"].partition("[")[0] for r in plan["tensors"] if r["to"]} == hf_weights(model).keys()


def test_adapters_are_planned_as_they_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = tiny_llama(tmp_path)
    base, dest, report = tmp_path / "base", tmp_path / "bank", tmp_path / "report.json"
    import_base(folder, base)
    peft = {
        "a": tiny_peft(tmp_path, folder, "a", r=2),
        "b": tiny_peft(tmp_path, folder, "b", use_dora=True, modules_to_save=["lm_head"]),
    }
    words = [str(dest), *(f"{name}={path}" for name, path in peft.items()), "--base", str(base)]
    main(["import", "adapters", *words, "--dry-run", "--json", str(report)])
    assert not dest.exists()
    assert "dropped: must equal the base's" in capsys.readouterr().out
    plan = json.loads(report.read_text())["tensors"]
    import_adapters(dest, base, peft)
    written = load_file(dest / "weights.safetensors")
    for name, path in peft.items():
        state = load_file(path / "adapter_model.safetensors")
        assert {row["key"] for row in plan[name]} == state.keys()
        for row in plan[name]:
            if row["to"] is None:
                continue
            place, _, index = row["to"].rstrip("]").partition("[")
            layer, adapter = map(int, index.split(", "))
            source = state[row["key"]]
            source = source.T if "transposed" in row["how"] else source
            found = written[place][layer, adapter]
            assert torch.equal(found[: len(source)], source)
            assert not found[len(source) :].any()


def test_a_dry_run_refuses_what_the_import_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = tiny_llama(tmp_path)
    edit_safetensors(folder / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(SystemExit) as status:
        main(["import", "base", str(folder), str(tmp_path / "base"), "--dry-run"])
    assert status.value.code == 1
    assert "model.norm.weight: expected shape (48,), found no such tensor" in capsys.readouterr().err


def test_inspect_reads_what_could_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = tiny_llama(tmp_path)
    adapter = tiny_peft(tmp_path, folder, "adapter", use_rslora=True)
    report = tmp_path / "report.json"
    for path, kind, count in ((folder, "source of a base", 30), (adapter, "PEFT adapter", 42)):
        main(["inspect", str(path), "--tensors", "--json", str(report)])
        found = json.loads(report.read_text())
        assert found["kind"] == kind
        assert len(found["tensors"]) == count
        assert all(row["key"] in capsys.readouterr().out for row in found["tensors"][:1])


def test_the_plan_of_a_large_base_reads_no_weights(tmp_path: Path):
    """11 GB of weights that are not there (a sparse file): planned from the header."""
    raw: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = hf_config.from_hf(raw)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 4096), "model.norm.weight": (4096,), "lm_head.weight": (128256, 4096),
    }  # fmt: skip
    for i in range(8):
        for p in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{p}.weight"] = config.projection_shape(p)[::-1]
        for p in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"model.layers.{i}.mlp.{p}.weight"] = config.projection_shape(p)[::-1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (4096,)
    header, end = {}, 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * 4
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # sparse: takes no room on the disk
    _, rows = plan_base(tmp_path, "bfloat16")
    assert len(rows) == len(shapes)
    assert {row.stored for row in rows} == {"BF16"}
    assert end > 10**10


def test_gates_are_planned_as_they_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, _, folder = write_original(tmp_path, torch.bfloat16)
    base, bank, dest, report = (tmp_path / name for name in ("base", "bank", "gates", "report.json"))
    words = ["import", "gates", str(folder), str(dest), "--bank", str(bank), "--base", str(base)]
    words += ["--alpha", "6", "--names", *NAMES]

    def plan() -> dict[str, Any]:
        main([*words, "--dry-run", "--json", str(report)])
        return {row["key"]: row for row in json.loads(report.read_text())["tensors"]}

    rows = plan()
    assert not any(path.exists() for path in (base, bank, dest))
    assert "mlp.up_proj.moe_gate.weight BF16 (4, 48) -> gates up_proj[0] F32, transposed" in capsys.readouterr().out
    state = load_file(folder / "model.safetensors")
    assert rows.keys() == state.keys()
    main(words)
    written = {path.name: load_file(path / "weights.safetensors") for path in (base, bank, dest)}
    for key, row in rows.items():
        kind, _, place = row["to"].partition(" ")
        path, _, layer = place.rstrip("]").partition("[")
        found = written[kind][path][int(layer)] if layer else written[kind][path]
        source = state[key]
        assert found.dtype == TYPES[row["stored"]]
        assert [*source.shape] == row["shape"]
        source = source.T if "transposed" in row["how"] else source
        assert torch.equal(found, source.reshape(found.shape).to(found.dtype))

    again = plan()  # bank and base are there now, and compared
    kinds = {"lora_A.weight": str(bank), "lora_B.weight": str(bank), "moe_gate.weight": None}
    for key, row in again.items():
        where = next((value for part, value in kinds.items() if key.endswith(part)), str(base))
        assert (row["to"] is None and where in row["how"]) if where else row["to"].startswith("gates ")
    words[words.index("--bank") + 1] = str(tmp_path / "none")
    words[words.index("--alpha") : words.index("--names")] = []
    with pytest.raises(SystemExit) as status:
        plan()
    assert status.value.code == 1
    assert "none: expected a bank, or alpha to make one from the checkpoint, found neither" in capsys.readouterr().err
