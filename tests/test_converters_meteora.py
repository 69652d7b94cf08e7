"""The original MeteoRA's checkpoints: logits equal a plain transcription of its layer; both ways, bit for bit."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft, tiny_tokenizer
from transformers import LlamaForCausalLM

import meteora_jax as mj
from converters import export_gates, import_adapters, import_base, import_gates, plan_base
from meteora_jax.cli import main
from meteora_jax.config import PROJECTIONS

ROW = [5, 6, 7, 8, 9, 300, 17]
COUNT, RANK, ALPHA = 4, 3, 6.0
NAMES = ("kiwi", "lime", "mango", "nut")
PREFIX = "base_model.model."


def module_of(layer: int, p: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}"


def write_original(tmp_path: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[Any, Path, Path]:
    """(torch base, its Hugging Face folder, a checkpoint with random adapters and gates)."""
    model, hf = tiny_llama(tmp_path, dtype=dtype, **sizes)
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    tensors = {}
    for key, value in model.state_dict().items():
        projection = key.split(".")[-2] in PROJECTIONS
        tensors[PREFIX + (key.replace("_proj.", "_proj.base_layer.") if projection else key)] = value.clone()
    for layer in range(model.config.num_hidden_layers):
        for p in PROJECTIONS:
            name = module_of(layer, p)
            linear: Any = model.get_submodule(name)
            outputs, inputs = linear.weight.shape
            tensors[f"{PREFIX}{name}.lora_A.weight"] = draw(COUNT * RANK, inputs)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = draw(outputs, COUNT * RANK)
            tensors[f"{PREFIX}{name}.moe_gate.weight"] = draw(COUNT, inputs) * 5
    if model.config.tie_word_embeddings:
        tensors.pop(f"{PREFIX}lm_head.weight")
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(hf / "config.json", folder / "config.json")
    return model, hf, folder


class MeteoraLinear(torch.nn.Module):
    """The paper's layer for one projection: the top-k adapters of each token, weighted by a softmax over them."""

    def __init__(self, base: torch.nn.Module, tensors: dict[str, torch.Tensor], name: str, top_k: int, tau: float):
        super().__init__()
        self.base, self.top_k, self.tau = base, top_k, tau
        self.a, self.b, self.gate = (tensors[f"{PREFIX}{name}.{k}.weight"] for k in ("lora_A", "lora_B", "moe_gate"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, chosen = torch.nn.functional.linear(x, self.gate).topk(self.top_k)
        weights = (values / self.tau).softmax(-1)
        each = [x @ self.a[k * RANK : (k + 1) * RANK].T @ self.b[:, k * RANK : (k + 1) * RANK].T for k in range(COUNT)]
        outputs = torch.stack(each, 2)  # [B, T, A, O]
        taken = torch.gather(outputs, 2, chosen[..., None].expand(*chosen.shape, outputs.shape[-1]))
        return self.base(x) + ALPHA / RANK * (weights[..., None] * taken).sum(2)


def original_logits(hf: Path, folder: Path, top_k: int, tau: float) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()
    model = model.double()  # the transcription is exact; what is left is the rounding of the code under test
    tensors = {key: tensor.double() for key, tensor in load_file(folder / "model.safetensors").items()}
    for layer in range(model.config.num_hidden_layers):
        for p in PROJECTIONS:
            name = module_of(layer, p)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, p, MeteoraLinear(getattr(parent, p), tensors, name, top_k, tau))
    with torch.no_grad():
        return model(torch.tensor([ROW])).logits[0].numpy()


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_logits_equal_and_the_checkpoint_returns(tmp_path: Path, sizes: dict[str, Any]):
    _, hf, folder = write_original(tmp_path, **sizes)
    base, bank, gates = (tmp_path / name for name in ("base", "bank", "gates"))
    import_base(hf, base)
    import_gates(folder, gates, bank, base=base, alpha=ALPHA, names=NAMES)
    model = mj.load(base, bank, gates, dtype="float32")
    assert model.adapter_names == NAMES
    for top_k, tau in ((2, 1.0), (1, 1.0), (3, 20.0)):
        ours = np.asarray(model.logits([ROW], router=mj.Gates(top_k=top_k, temperature=tau)))[0]
        assert np.abs(ours - original_logits(hf, folder, top_k, tau)).max() <= 1e-4
    told = export_gates(base, bank, gates, tmp_path / "out")
    assert told == {"names": list(NAMES), "rank": RANK, "alpha": ALPHA}
    again, before = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_half_precision_returns_and_gates_stay_float32(tmp_path: Path):
    _, hf, folder = write_original(tmp_path, torch.bfloat16)
    base, bank, gates = (tmp_path / name for name in ("base", "bank", "gates"))
    import_base(hf, base)
    import_gates(folder, gates, bank, alpha=ALPHA, names=NAMES)
    export_gates(base, bank, gates, tmp_path / "out")
    again, before = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    for key, tensor in before.items():
        assert again[key].dtype == (torch.float32 if "moe_gate" in key else torch.bfloat16)
        assert torch.equal(again[key].float(), tensor.float()), key


def test_a_bank_in_another_order_is_recognised_by_its_values(tmp_path: Path):
    _, hf, folder = write_original(tmp_path)
    base, bank, gates = (tmp_path / name for name in ("base", "bank", "gates"))
    import_base(hf, base)
    import_gates(folder, gates, bank, alpha=ALPHA, names=NAMES)
    tensors = load_file(bank / "weights.safetensors")
    order = [2, 0, 3, 1]
    save_file({k: t[:, order].contiguous() for k, t in tensors.items()}, bank / "weights.safetensors")
    description = json.loads((bank / "bank.json").read_text())
    description["adapters"] = [description["adapters"][i] for i in order]
    (bank / "bank.json").write_text(json.dumps(description))
    found = import_gates(folder, tmp_path / "again", bank, base=base)
    assert found.names == NAMES
    model = mj.load(base, bank, tmp_path / "again", dtype="float32")
    assert model.adapter_names == tuple(NAMES[i] for i in order)
    ours = np.asarray(model.logits([ROW], router=mj.Gates(top_k=2)))[0]
    assert np.abs(ours - original_logits(hf, folder, 2, 1.0)).max() <= 1e-4
    edit_safetensors(bank / "weights.safetensors", lambda t: t["up_proj.b"][1, 2].add_(1))
    dest = tmp_path / "other"
    call = partial(import_gates, folder, dest, bank)
    assert_refused(call, dest, "bank.json: adapters: expected one with the values of adapter 3 there, found none")


def test_the_base_is_imported_from_the_checkpoint_too(tmp_path: Path):
    _, hf, folder = write_original(tmp_path, torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)  # as the original's training does
    import_base(hf, tmp_path / "known")
    import_base(folder, tmp_path / "alone")
    import_gates(folder, tmp_path / "gates", tmp_path / "bank", base=tmp_path / "beside", alpha=ALPHA, names=NAMES)
    for base in ("alone", "beside"):
        ours, expected = (load_file(tmp_path / name / "weights.safetensors") for name in (base, "known"))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
    mj.load(tmp_path / "beside", tmp_path / "bank", tmp_path / "gates")
    _, rows = plan_base(folder)
    how = {
        row.key.rpartition("self_attn.q_proj.")[2]: row.how for row in rows if "layers.0.self_attn.q_proj" in row.key
    }
    assert how.pop("base_layer.weight") == "transposed"
    assert how == dict.fromkeys(("lora_A.weight", "lora_B.weight", "moe_gate.weight"), "dropped: not of the base")
    edit_safetensors(
        folder / "model.safetensors", lambda t: t.pop(f"{PREFIX}model.layers.1.mlp.up_proj.base_layer.weight")
    )
    said = "up_proj.base_layer.weight: expected shape (80, 48), found no such tensor"
    assert_refused(lambda: import_base(folder, tmp_path / "dest"), tmp_path / "dest", said)


def test_a_fault_of_the_base_leaves_neither_bank_nor_gates(tmp_path: Path):
    _, _, folder = write_original(tmp_path)
    edit_safetensors(folder / "model.safetensors", lambda t: t[f"{PREFIX}model.norm.weight"].fill_(torch.nan))
    base, bank, gates = (tmp_path / name for name in ("base", "bank", "gates"))
    call = partial(import_gates, folder, gates, bank, base=base, alpha=ALPHA, names=NAMES)
    assert_refused(call, gates, "model.norm.weight: expected finite values")
    assert not base.exists()
    assert not bank.exists()


@pytest.mark.exhaustive("padding is in the tests of peft's folders")
def test_adapters_of_several_ranks_and_targets_are_padded(tmp_path: Path):
    """What is exported has one rank; read back, it acts as before."""
    _, hf, _ = write_original(tmp_path)
    base, bank, gates = (tmp_path / name for name in ("base", "bank", "gates"))
    import_base(hf, base)
    adapters = {
        "a": tiny_peft(tmp_path, hf, "a", r=2, lora_alpha=4),
        "b": tiny_peft(tmp_path, hf, "b", r=5, lora_alpha=10, seed=2, target_modules=["q_proj", "down_proj"]),
    }
    import_adapters(bank, base, adapters)
    rng = np.random.default_rng(0)
    model = mj.load(base, bank, dtype="float32")
    from meteora_jax.gate_config import GateConfig
    from meteora_jax.io.gates import save_gates

    def shape(p):
        return (3, model.config.projection_shape(p)[0], 2)

    save_gates(gates, GateConfig(("b", "a"), 2, 1.0), {p: rng.standard_normal(shape(p)) for p in PROJECTIONS})
    told = export_gates(base, bank, gates, tmp_path / "out")
    assert told == {"names": ["a", "b"], "rank": 5, "alpha": 10.0}
    import_gates(tmp_path / "out", tmp_path / "gates2", tmp_path / "bank2", base=base, alpha=10.0, names=("a", "b"))
    ours = [
        np.asarray(mj.load(base, k, g, dtype="float32").logits([ROW], router=mj.Gates()))
        for k, g in ((bank, gates), (tmp_path / "bank2", tmp_path / "gates2"))
    ]
    assert np.abs(ours[0] - ours[1]).max() <= 1e-5
    assert np.abs(ours[0] - np.asarray(model.logits([ROW], router=None))).max() > 0.1


def test_what_is_refused(tmp_path: Path):
    _, hf, folder = write_original(tmp_path)
    base, bank, dest = (tmp_path / name for name in ("base", "bank", "gates"))
    import_base(hf, base)
    call = partial(import_gates, folder, dest, bank, base=base, alpha=ALPHA, names=NAMES)
    call_without = partial(import_gates, folder, dest, bank, names=NAMES[:2])
    assert_refused(call_without, dest, "bank: expected a bank, or alpha", "names: expected 4", "found 2 (2 different)")
    good = (folder / "model.safetensors").read_bytes()
    q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
    for edit, said in (
        (lambda t: t.pop(f"{q0}.moe_gate.weight"), "moe_gate.weight: expected shape (4, 48), found no such tensor"),
        (lambda t: t.update({f"{q0}.lora_A.weight": torch.ones(11, 48)}), "lora_A.weight: expected shape (12, 48)"),
        (lambda t: t.update({f"{q0}.lora_C.weight": torch.ones(1)}), "lora_C.weight: expected no such tensor"),
        (lambda t: t[f"{q0}.moe_gate.weight"].fill_(torch.nan), "moe_gate.weight: expected finite values"),
        (lambda t: t[f"{q0}.lora_B.weight"][5, 1].fill_(torch.inf), "lora_B.weight: expected finite values"),
        (lambda t: t[f"{q0}.base_layer.weight"].add_(1), f"{q0}.base_layer.weight: expected the values of {base}"),
        (lambda t: t[f"{PREFIX}lm_head.weight"].add_(1), f"{PREFIX}lm_head.weight: expected the values of {base}"),
    ):
        edit_safetensors(folder / "model.safetensors", edit)
        assert_refused(call, dest, said)
        assert not bank.exists()
        (folder / "model.safetensors").write_bytes(good)
    shutil.copyfile(hf / "model.safetensors", folder / "model.safetensors")
    assert_refused(call, dest, "moe_gate.weight: expected gates [A, I] and lora_A [A*R, I] as in MeteoRA, found none")


def test_banks_that_the_original_cannot_hold(tmp_path: Path):
    _, hf, folder = write_original(tmp_path)
    base, gates, dest = (tmp_path / name for name in ("base", "gates", "out"))
    import_base(hf, base)
    import_gates(folder, gates, tmp_path / "bank", alpha=ALPHA, names=NAMES)
    for name, options, said in (
        ("dora", [{"use_dora": True}], "dora: expected none"),
        ("scales", [{}, {"lora_alpha": 3}], "scale: expected one for all adapters (as in the original)"),
    ):
        folders = {f"{name}{i}": tiny_peft(tmp_path, hf, f"{name}{i}", **o) for i, o in enumerate(options)}
        import_adapters(tmp_path / name, base, folders)
        call = partial(export_gates, base, tmp_path / name, gates, dest)
        assert_refused(call, dest, said)
    edit_json(gates / "gates.json", names=["kiwi", "lime", "mango", "pear"])
    call = partial(export_gates, base, tmp_path / "bank", gates, dest)
    assert_refused(call, dest, "gates.json: names: expected the bank's adapters")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, hf, folder = write_original(tmp_path)
    base, bank, gates = (str(tmp_path / name) for name in ("base", "bank", "gates"))
    import_base(hf, base)
    main(
        [
            *("import", "gates", str(folder), gates, "--bank", bank, "--base", base, "--alpha", "6"),
            *("--names", *NAMES, "--json", str(tmp_path / "in.json")),
        ]
    )
    assert json.loads((tmp_path / "in.json").read_text())["names"] == list(NAMES)
    main(["export", "gates", base, bank, gates, str(tmp_path / "out"), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["alpha"] == ALPHA
    assert "kiwi lime mango nut" in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        main(["import", "gates", str(folder), str(tmp_path / "g"), "--bank", str(tmp_path / "no"), "--alpha", "6"])
    assert status.value.code == 1
    assert "names: expected 4, one an adapter of the checkpoint, found 28" in capsys.readouterr().err
