"""Which model a base is: names and norms recorded at import, adapters of another base of the same shape refused."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft

import meteora_jax as mj
from converters import export_adapter, export_base, export_merged, import_adapters, import_base
from meteora_jax.cli import main
from meteora_jax.config import BankConfig, InputError, read_json
from meteora_jax.io.provenance import BaseOrigin, Verdict, compare, is_known, normalized, split_name

SAME = [
    ("meta-llama/Meta-Llama-3-8B", "unsloth/Meta-Llama-3-8B-bnb-4bit", "meta-llama/Llama-3-8B", "llama-3-8b",
     "Meta-Llama-3-8B.Q4_K_M.gguf", "/data/models/Meta-Llama-3-8B/", "C:\\models\\meta_llama_3_8b", "Llama 3 8B",
     "/home/u/.cache/huggingface/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/62bd457b6fe961a42a631306577e622c83876cb6",
     "unsloth/llama-3-8b-unsloth-bnb-4bit", "Meta-Llama-3-8B-IQ3_XXS", "meta-llama/Meta-Llama-3-8B/original"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct-q4_1.gguf", "SmolLM2 135M Instruct",
     "SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct-f16-00001-of-00002.gguf"),
    ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M-BF16"),
    ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-hf", "Llama-2-7B-fp16", "TheBloke/Llama-2-7B-GPTQ",
     "llama-2-7b"),
    ("meta-llama/Llama-2-7b-chat-hf", "TheBloke/Llama-2-7B-Chat-GPTQ"),
    ("TheBloke/Llama-2-7B-Chat-AWQ", "Llama-2-7b-chat-AWQ-4bit"),
    ("mistralai/Mistral-7B-v0.1", "unsloth/mistral-7b-v0.1-bnb-4bit"),
    ("mistralai/Mistral-7B-v0.3", "unsloth/mistral-7b-v0.3"),
    ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0.3-Q8_0"),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b-chat-v1.0.Q5_K_S.gguf"),
]  # fmt: skip


def test_names_are_one_model_whatever_stores_it():
    groups = [{normalized(name) for name in names} for names in SAME]
    assert all(len(group) == 1 for group in groups), groups
    assert len(set.union(*groups)) == len(SAME)
    assert all(is_known(name) for names in SAME for name in names)
    unknown = [
        "/data/models/llama3",
        "llama3",
        "models/llama3",
        "./output",
        "checkpoint-500",
        "hf",
        "",
        "LLaMA v2",
        "4bit",
    ]
    assert not any(map(is_known, unknown))
    assert is_known("openai-community/gpt2")
    assert split_name(SAME[0][8])[1] == "62bd457b6fe961a42a631306577e622c83876cb6"


def origin(revision: str | None = None, **names: str) -> BaseOrigin:
    return BaseOrigin(names, revision, "")


def test_claims_are_compared():
    instruct = origin(path="/models/SmolLM2-135M-Instruct")
    for claimed, expected, remark in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None, None),
        ("HuggingFaceTB/SmolLM2-135M", "/models/SmolLM2-135M-Instruct", None),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "/models/SmolLM2-135M-Instruct", None),
        ("/data/models/smol", None, "trained on '/data/models/smol', a name that does not say"),
        (None, None, "does not say which base it was trained on"),
    ):
        verdict = compare(instruct, claimed, None)
        assert (verdict.expected, remark is None) == (expected, verdict.remark is None)
        assert remark is None or remark in str(verdict.remark)
    for unknown in (None, origin(), origin(path="base"), origin(path="hf", said="models")):
        assert "the base does not say" in str(compare(unknown, "HuggingFaceTB/SmolLM2-135M", None).remark)
    assert compare(origin(path="llama3"), "/data/models/llama3", None).remark is None
    # a fine-tuned model's config.json often names the model that its training began with
    both = origin(said="HuggingFaceTB/SmolLM2-135M", path="SmolLM2-135M-Instruct")
    assert "is called SmolLM2-135M-Instruct as well as" in str(compare(both, "HuggingFaceTB/SmolLM2-135M", None).remark)
    told = dataclasses.replace(both, names={**both.names, "name": "SmolLM2-135M-Instruct"})
    assert compare(told, "HuggingFaceTB/SmolLM2-135M", None).expected == "SmolLM2-135M-Instruct"
    assert compare(told, "unsloth/SmolLM2-135M-Instruct", None).remark is None
    # names without a size decide nothing, and where the weights are at hand their norms decide
    zephyr = origin(path="HuggingFaceH4/mistral-7b-sft-beta")
    assert "a name without a size, which may be" in str(compare(zephyr, "unsloth/zephyr-sft-bnb-4bit", None).remark)
    assert compare(zephyr, "unsloth/zephyr-sft-bnb-4bit", None, "").remark is None
    other = compare(zephyr, "unsloth/zephyr-sft-bnb-4bit", None, "0" * 64).expected
    assert other == "a model with this base's norms, "
    assert compare(zephyr, "mistralai/Mistral-7B-v0.3", None, "0" * 64).expected == "HuggingFaceH4/mistral-7b-sft-beta"
    assert compare(zephyr, "renamed/Mistral-7B-v9", None, "").expected is None
    at = origin("62bd457b6fe961a42a631306577e622c83876cb6", path="SmolLM2-135M")
    for revision, expected in (("62bd457", None), ("main", None), (None, None), ("0" * 40, at.revision)):
        assert compare(at, "SmolLM2-135M", revision).expected == expected


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("origin"), folder="Tiny-1M-Chat")[1]
    edit_json(folder / "config.json", _name_or_path="someone/Tiny-1M-Chat")
    return folder


def adapter(tmp_path: Path, hf: Path, name: str, claimed: Any, **settings: Any) -> Path:
    folder = tiny_peft(tmp_path, hf, name, target_modules=["q_proj"])
    edit_json(folder / "adapter_config.json", base_model_name_or_path=claimed, **settings)
    return folder


def recorded(base: Path) -> BaseOrigin:
    found = BaseOrigin.of_base(read_json(base / "config.json"), "config.json")
    assert found is not None
    return found


def test_every_kind_of_source_is_recorded(tmp_path: Path, hf: Path):
    import_base(hf, tmp_path / "base")
    assert recorded(tmp_path / "base").names["config.json _name_or_path"] == "someone/Tiny-1M-Chat"
    assert recorded(tmp_path / "base").names["path"] == "Tiny-1M-Chat"
    import_base(hf, tmp_path / "half", dtype="float16")
    import_base(hf, tmp_path / "given", name="org/Other-2M@0123456789abcdef0123456789abcdef01234567")
    assert recorded(tmp_path / "half").norms_sha256 == recorded(tmp_path / "base").norms_sha256
    assert recorded(tmp_path / "given").name == "org/Other-2M"
    assert recorded(tmp_path / "given").revision == "0123456789abcdef0123456789abcdef01234567"
    export_base(tmp_path / "base", tmp_path / "back")
    assert read_json(tmp_path / "back" / "config.json")["_name_or_path"] == "someone/Tiny-1M-Chat"
    import_base(tmp_path / "back", tmp_path / "again")
    assert recorded(tmp_path / "again").norms_sha256 == recorded(tmp_path / "base").norms_sha256
    other = tiny_llama(tmp_path, seed=1, folder="other")[1]
    import_base(other, tmp_path / "base2")
    assert recorded(tmp_path / "base2").norms_sha256 != recorded(tmp_path / "base").norms_sha256
    dest = tmp_path / "never"
    for bad in ("", "@abc", "..."):
        assert_refused(lambda b=bad: import_base(hf, dest, name=b), dest, "name: expected a model's name")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"name": "Tiny 1M Chat"}, {"general.name": "Tiny 1M Chat"}),
        (
            {"name": "LLaMA v2", "basename": "Tiny", "size_label": "1M", "finetune": "Chat"},
            {"general.name": "LLaMA v2", "general.basename": "Tiny-1M-Chat"},
        ),
        ({"basename": "Tiny-1M-Chat", "size_label": 7}, {"general.basename": "Tiny-1M-Chat"}),
        ({}, {}),
    ],
)
def test_gguf_metadata_is_recorded(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, str]):
    model, hf = tiny_llama(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    general = {f"general.{k}": v for k, v in metadata.items()}
    file = write_gguf(tmp_path / "tiny-1m-chat-q4_0.gguf", model, Type.Q4_0, edit=lambda m, _: m.update(general))
    import_base(file, tmp_path / "base")
    origin = recorded(tmp_path / "base")
    assert origin.names == {**expected, "path": "tiny-1m-chat-q4_0.gguf"}
    import_base(hf, tmp_path / "plain")
    assert origin.norms_sha256 == recorded(tmp_path / "plain").norms_sha256
    assert compare(origin, "someone/Tiny-1M-Chat", None) == Verdict("base_model_name_or_path")
    assert compare(origin, "someone/Tiny-1M", None).expected is not None


def test_adapters_of_another_base_are_refused(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]):
    base, bank = tmp_path / "base", tmp_path / "bank"
    import_base(hf, base)
    mine = adapter(tmp_path, hf, "mine", "someone-else/tiny_1m-chat-bnb-4bit")
    other = adapter(tmp_path, hf, "other", "someone/Tiny-1M")
    vague = adapter(tmp_path, hf, "vague", None)
    said = "other/adapter_config.json: base_model_name_or_path: expected someone/Tiny-1M-Chat (this base), found "
    said += "someone/Tiny-1M "
    call = partial(import_adapters, bank, base, {"mine": mine, "other": other, "vague": vague})
    error = assert_refused(call, bank, said, "--any-base")
    assert len(error.problems) == 1
    lines: list[str] = []
    import_adapters(bank, base, {"mine": mine, "vague": vague}, on_remark=lines.append)
    assert lines == ["vague: the adapter does not say which base it was trained on; taken for this base's"]
    told = ["import", "adapters", str(tmp_path / "b2"), f"o={other}", f"v={vague}", "--base", str(base)]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as status:
            main([*told, *more])
        assert status.value.code == 1
        assert said in capsys.readouterr().err
    main([*told, "--any-base"])
    assert "v: the adapter does not say" in capsys.readouterr().err
    dest = tmp_path / "never"
    for key, value in (("base_model_name_or_path", 7), ("revision", ["main"])):
        odd = adapter(tmp_path, hf, f"odd-{key}", "someone/Tiny-1M-Chat", **({key: value} if key == "revision" else {}))
        edit_json(odd / "adapter_config.json", **{key: value})
        assert_refused(lambda f=odd: import_adapters(dest, base, {"a": f}), dest, f"{key}: expected a name, found")


def test_norms_of_a_renamed_or_quantised_base_decide(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch):
    base, dest = tmp_path / "base", tmp_path / "never"
    import_base(hf, base)
    quantised = tmp_path / "hub" / "models--unsloth--tiny-bnb-4bit" / "snapshots" / ("ab" * 20)
    shutil.copytree(hf, quantised)
    (quantised.parents[1] / "refs").mkdir()
    (quantised.parents[1] / "refs" / "main").write_text("ab" * 20)
    edit_json(quantised / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    packed = {"model.layers.0.mlp.up_proj.weight": torch.zeros(7, 1, dtype=torch.uint8)}  # as bitsandbytes stores them
    edit_safetensors(quantised / "model.safetensors", lambda t: t.update(packed))
    _, other = tiny_llama(tmp_path, seed=5, folder="other-model")
    lines: list[str] = []
    folder = adapter(tmp_path, hf, "a", "unsloth/tiny-bnb-4bit")
    import_adapters(tmp_path / "bank", base, {"a": folder}, on_remark=lines.append)
    assert "a name without a size, which may be someone/Tiny-1M-Chat" in lines[0]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    import_adapters(tmp_path / "bank2", base, {"a": folder}, on_remark=lines.append)
    assert len(lines) == 1
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    said = "base_model_name_or_path: expected a model with this base's norms"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, said)
    shutil.copytree(hf, tmp_path / "Renamed-9B")  # a name that says something else, and the same weights
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "Renamed-9B"))
    import_adapters(tmp_path / "bank3", base, {"a": folder}, on_remark=lines.append)
    assert len(lines) == 1
    edit_json(other / "config.json", quantization_config={"quant_method": "awq"})  # AWQ scales norms
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    import_adapters(tmp_path / "bank4", base, {"a": folder}, on_remark=lines.append)
    assert "a name that does not say which model it is" in lines[1]


def test_revisions(tmp_path: Path, hf: Path):
    base, dest = tmp_path / "base", tmp_path / "never"
    import_base(hf, base, name="someone/Tiny-1M-Chat@" + "ab" * 20)
    old = adapter(tmp_path, hf, "old", "someone/Tiny-1M-Chat", revision="cd" * 20)
    assert_refused(lambda: import_adapters(dest, base, {"a": old}), dest, f"revision: expected {'ab' * 20}", "cd" * 20)
    import_adapters(tmp_path / "bank", base, {"a": old}, any_base=True)
    short = adapter(tmp_path, hf, "short", "someone/Tiny-1M-Chat", revision="abababab")
    import_adapters(tmp_path / "bank2", base, {"a": short})


def test_banks_know_their_base(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]):
    base, bank, other = tmp_path / "base", tmp_path / "bank", tmp_path / "other"
    import_base(hf, base)
    import_adapters(bank, base, {"a": adapter(tmp_path, hf, "a", "someone/Tiny-1M-Chat")})
    import_base(tiny_llama(tmp_path, seed=1, folder="Tiny-1M")[1], other)
    said = "base.norms_sha256: expected the base's"
    with pytest.raises(InputError, match=said):
        mj.load(other, bank)
    assert_refused(lambda: export_merged(other, bank, "a", tmp_path / "out"), tmp_path / "out", said)
    import_base(hf, tmp_path / "again", dtype="bfloat16", name="renamed-1M")
    assert mj.load(tmp_path / "again", bank).adapter_names == ("a",)
    export_merged(base, bank, "a", tmp_path / "merged")
    assert "_name_or_path" not in read_json(tmp_path / "merged" / "config.json")
    export_adapter(bank, "a", tmp_path / "out")
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == "someone/Tiny-1M-Chat"
    raw = read_json(bank / "bank.json")
    raw["adapters"][0]["peft_config"] = {}
    (bank / "bank.json").write_text(json.dumps(raw))
    assert export_adapter(bank, "a", tmp_path / "out2")["base_model_name_or_path"] == "someone/Tiny-1M-Chat"
    for folder, word in (
        (base, "norms_sha256"),
        (bank, "Tiny-1M-Chat"),
        (tmp_path / "out", "Tiny-1M-Chat"),
        (hf, "Tiny"),
    ):
        main(["inspect", str(folder), "--json", str(tmp_path / "report.json")])
        assert word in (tmp_path / "report.json").read_text()
    capsys.readouterr()

    edit_json(base / "config.json", meteora={"format": "meteora-base-1", "source": []})  # as older versions wrote it
    raw.pop("base")
    (bank / "bank.json").write_text(json.dumps(raw))
    assert mj.load(base, bank).adapter_names == ("a",)
    assert BankConfig.from_json(raw, "bank.json").base is None
    lines: list[str] = []
    import_adapters(tmp_path / "old", base, {"a": tmp_path / "a"}, on_remark=lines.append)
    assert "the base does not say which model it is (import it with --name)" in lines[0]
    edit_json(base / "config.json", meteora={"origin": {"names": []}})
    with pytest.raises(InputError, match=r"meteora\.origin: expected names, revision and norms_sha256"):
        mj.load(base, bank)
    import_base(hf, base, overwrite=True)
    (bank / "bank.json").write_text(json.dumps({**raw, "base": {"names": {}}}))
    with pytest.raises(InputError, match=r"bank\.json: base: expected names, revision and norms_sha256"):
        mj.load(base, bank)
