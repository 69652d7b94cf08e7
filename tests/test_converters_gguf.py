"""Importing GGUF files: values and tokenizers equal transformers' own GGUF loading; broken files are refused."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import SCALES, TEXTS, byte_level_metadata, random_blocks, sentencepiece_metadata, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import BOS, CHAT_TEMPLATE, EOS, assert_refused, hf_weights, tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from converters import gguf_tokenizer, import_base
from converters.gguf_file import read_gguf
from converters.gguf_llama import llama3_factors
from meteora_jax.config import InputError, RopeScaling, read_json
from meteora_jax.io import hf_config


def load_theirs(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def assert_base_holds(base: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    found = load_file(base / "weights.safetensors")
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert dtype is None or found[path].dtype == dtype, path
        assert torch.equal(found[path].float(), tensor.float()), path


@pytest.mark.parametrize(
    "variant",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 16}, {"attention_bias": True, "mlp_bias": True}],
    ids=["untied", "tied", "head_dim", "biases"],
)
def test_a_float_file_gives_the_model_that_it_was_made_from(tmp_path: Path, variant: dict[str, Any]):
    model, folder = tiny_llama(tmp_path, **variant)
    path = write_gguf(tmp_path / "m.gguf", model)
    import_base(path, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(model), torch.float32)
    ours = hf_config.from_hf(read_json(tmp_path / "base" / "config.json"))
    assert ours == hf_config.from_hf(read_json(folder / "config.json"))


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *(kind.name for kind in SCALES)]
)
def test_every_type_equals_transformers(tmp_path: Path, kind: str):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model, _ = tiny_llama(tmp_path, **sizes)
    path = write_gguf(tmp_path / "m.gguf", model, Type[kind])
    import_base(path, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(load_theirs(path)))
    found = load_file(tmp_path / "base" / "weights.safetensors")
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert found["layers.q_proj.kernel"].dtype == kept
    assert found["norm.scale"].dtype == torch.float32
    import_base(path, tmp_path / "half", dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "half" / "weights.safetensors").items():
        assert torch.equal(tensor, found[name].to(torch.bfloat16)), name


def test_a_mix_of_types_in_one_stack(tmp_path: Path):
    model, _ = tiny_llama(tmp_path, hidden_size=256, intermediate_size=512)

    def edit(_, tensors: dict[str, tuple[np.ndarray, Type]]) -> None:
        random = np.random.default_rng(1)
        tensors["blk.1.ffn_down.weight"] = (random_blocks((256, 512), Type.Q6_K, random), Type.Q6_K)
        values = random.normal(size=(512, 256)).astype(np.float32)
        tensors["blk.2.ffn_up.weight"] = (gguf.quantize(values, Type.F16), Type.F16)

    path = write_gguf(tmp_path / "m.gguf", model, Type.Q4_K, edit=edit)
    import_base(path, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(load_theirs(path)), torch.float32)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "default", "gpt-2", None])
@pytest.mark.parametrize("added", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_byte_level_tokenizer(tmp_path: Path, pre: str | None, added: dict[str, bool]):
    model, _ = tiny_llama(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_level_metadata(pre, **added))
    remarks: list[str] = []
    import_base(path, tmp_path / "base", on_remark=remarks.append)
    assert any("expected tokenizer.ggml.pre, found none" in line for line in remarks) == (pre is None)
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    if pre == "smollm":  # transformers leaves the digits of "smollm" together
        theirs = tiny_tokenizer()
    add_bos = added.get("add_bos_token", pre == "llama-bpe")
    add_eos = added.get("add_eos_token", False)
    for text in TEXTS:
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == plain, text
        assert ours(text)["input_ids"] == [1] * add_bos + plain + [2] * add_eos, text
        assert ours.decode(plain) == text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (BOS, EOS, "<|endoftext|>")
    assert ours.chat_template == CHAT_TEMPLATE
    assert ours.decode([1, *ours("hi")["input_ids"], 2], skip_special_tokens=True).strip() == "hi"


@pytest.mark.parametrize("changes", [{}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}])
def test_sentencepiece_tokenizer(tmp_path: Path, changes: dict[str, bool]):
    metadata = sentencepiece_metadata(**changes)
    model, _ = tiny_llama(tmp_path, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=metadata)
    import_base(path, tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    add_bos, add_eos = changes.get("add_bos_token", True), changes.get("add_eos_token", False)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (*TEXTS, "The quick</s>brown fox"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ours(text)["input_ids"] == [1] * add_bos + ids + [2] * add_eos
        if "add_space_prefix" not in changes:  # transformers does not read it
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        if "</s>" not in text and not text.startswith(" "):
            assert ours.decode(ids) == text
    if "add_space_prefix" in changes:
        assert not ours.tokenize("quick")[0].startswith("▁")


def test_tokenizer_loads_without_torch_and_conversion_needs_none(tmp_path: Path):
    model, _ = tiny_llama(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", model)
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from converters import import_base; import_base(sys.argv[1], sys.argv[2])\n"
        "from transformers import AutoTokenizer\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[2])('hi 24')['input_ids'])"
    )
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", script, path, tmp_path / "base"]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == tiny_tokenizer()("hi 24")["input_ids"]


def rope_factors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """The factors that transformers' own llama3 rotary embedding implies."""
    from transformers import LlamaConfig as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = HfConfig(head_dim=head_dim, rope_parameters={"rope_theta": theta, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled.double().numpy()).astype(np.float32)


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path):
    model, _ = tiny_llama(tmp_path, head_dim=64, rope_theta=500000.0)
    factors = rope_factors(LLAMA3, 64, 500000.0)
    np.testing.assert_allclose(factors, llama3_factors(32.0, 1.0, 4.0, 8192, 500000.0, 64), rtol=1e-5)
    path = write_gguf(
        tmp_path / "m.gguf", model, edit=lambda _, t: t.update({"rope_freqs.weight": (factors, Type.F32)})
    )
    import_base(path, tmp_path / "base")
    config = hf_config.from_hf(read_json(tmp_path / "base" / "config.json"))
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    other = rope_factors(LLAMA3 | {"high_freq_factor": 5.0}, 64, 500000.0)
    write_gguf(path, model, edit=lambda _, t: t.update({"rope_freqs.weight": (other, Type.F32)}))
    dest = tmp_path / "other"
    assert_refused(lambda: import_base(path, dest), dest, "m.gguf: rope_freqs.weight: expected llama3 factors")
    write_gguf(path, model, edit=lambda _, t: t.update({"rope_freqs.weight": (other[:5], Type.F32)}))
    assert_refused(lambda: import_base(path, dest), dest, "rope_freqs.weight: expected shape (32,), found (5,)")


def test_linear_scaling(tmp_path: Path):
    model, _ = tiny_llama(tmp_path)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", model, edit=lambda metadata, _: metadata.update(scaling))
    import_base(path, tmp_path / "base")
    config = hf_config.from_hf(read_json(tmp_path / "base" / "config.json"))
    assert config.rope_scaling == RopeScaling("linear", 4.0, 256)


SETTINGS = {
    "architecture": (
        {"general.architecture": "qwen2moe"}, "general.architecture: expected llama, qwen2, qwen3, found 'qwen2moe'"
    ),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected none", "'yarn'"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count: expected 0, found 8"),
    "unknown": ({"llama.logit_scale": 2.0}, "llama.logit_scale: expected no such setting (not supported), found 2.0"),
    "rotary": ({"llama.rope.dimension_count": 6}, "llama.rope.dimension_count: expected the head dimension 12"),
    "heads": ({"llama.attention.head_count": [4, 4, 4]}, "llama.attention.head_count: expected a single int"),
    "split": ({"split.count": 3}, "expected the name NAME-00001-of-00003.gguf (split.count), found another"),
    "absent": ({"llama.block_count": None}, "llama.block_count: expected a single int, found None"),
    "pre": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre: expected default", "found 'viking'"),
    "model": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model: expected 'gpt2' or 'llama', found 't5'"),
    "merges": ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: expected two tokens", "'a b c'"),
    "merge numbers": ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges: expected strings, found 1"),
    "end ids": ({"tokenizer.ggml.eot_token_id": [2, 3]}, "tokenizer.ggml.eot_token_id: expected a token id", "[2, 3]"),
    "merge": ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizer.ggml.merges: expected merges of known tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges: expected a list, found none"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type: expected", "found 1"),
    "bos": ({"tokenizer.ggml.bos_token_id": 4000}, "tokenizer.ggml.bos_token_id: expected an id below", "found 4000"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokenizer.ggml.tokens: expected different tokens"),
    "many": ({"tokenizer.ggml.tokens": [str(i) for i in range(400)]}, "expected 1 to 320 tokens, found 400"),
}  # fmt: skip


@pytest.mark.parametrize("said", [{}, {"llama.rope.scaling.type": "none"}])
def test_a_factor_alone_scales_linearly(tmp_path: Path, said: dict[str, str]):
    model, _ = tiny_llama(tmp_path)
    changes = {"llama.rope.scaling.factor": 4.0, **said}
    path = write_gguf(tmp_path / "m.gguf", model, edit=lambda metadata, _: metadata.update(changes))
    import_base(path, tmp_path / "base")
    scaling = json.loads((tmp_path / "base" / "config.json").read_text())["rope_scaling"]
    assert (scaling is None) == bool(said)
    assert said or (scaling["rope_type"], scaling["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("architecture", "count", "expected"),
    [("qwen2", 9, "qwen2"), ("llama", 128_256, "llama-bpe"), ("llama", 9, "default")],
)
def test_files_without_a_pre_tokenizer(architecture: str, count: int, expected: str):
    metadata = {"general.architecture": architecture, "tokenizer.ggml.tokens": [""] * count}
    assert gguf_tokenizer._implied_pre(metadata) == expected


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(tmp_path: Path, case: str):
    model, _ = tiny_llama(tmp_path)
    changes, *parts = SETTINGS[case]

    def edit(metadata: dict[str, Any], _) -> None:
        metadata.update(changes)
        for key in [k for k, v in metadata.items() if v is None]:
            del metadata[key]

    path = write_gguf(tmp_path / "m.gguf", model, edit=edit)
    dest = tmp_path / "base"
    error = assert_refused(lambda: import_base(path, dest), dest)
    assert any(p.startswith("m.gguf: ") and all(part in p for part in parts) for p in error.problems), error


def test_split_files_give_what_the_whole_gives(tmp_path: Path):
    model, _ = tiny_llama(tmp_path)
    import_base(write_gguf(tmp_path / "m.gguf", model), tmp_path / "whole")

    def part(number: int, path: Path, **changes: Any) -> None:
        def edit(metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Type]]) -> None:
            for name in [n for i, n in enumerate(tensors) if i % 3 != number]:
                del tensors[name]
            if number:
                metadata.clear()  # gguf-split leaves the metadata to the first part
            metadata |= {"split.no": number, "split.count": 3, "split.tensors.count": 30, **changes}

        write_gguf(path, model, edit=edit)

    paths = [tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for number, path in enumerate(paths):
        part(number, path)
    import_base(paths[1], tmp_path / "split")  # any part names them all
    whole, split = (load_file(tmp_path / f / "weights.safetensors") for f in ("whole", "split"))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[key], split[key]) for key in whole)
    dest = tmp_path / "base"
    part(1, paths[1], **{"split.no": 2})
    assert_refused(lambda: import_base(paths[0], dest), dest, "m-00002-of-00003.gguf: split.no: expected 1, found 2")
    paths[1].unlink()
    assert_refused(lambda: import_base(paths[0], dest), dest, "m-00002-of-00003.gguf: cannot be read")


def test_unsupported_types_are_named(tmp_path: Path):
    model, _ = tiny_llama(tmp_path, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    path = write_gguf(
        tmp_path / "m.gguf", model, edit=lambda _, t: t.update(old=(np.zeros((4, 64), np.int32), Type.I32))
    )
    error = assert_refused(
        lambda: import_base(path, tmp_path / "base"), tmp_path / "base", "old: expected type F32, F16"
    )
    assert all(word in str(error) for word in ("Q5_K", "IQ4_NL", "found I32"))


def test_broken_tensors(tmp_path: Path):
    model, _ = tiny_llama(tmp_path)
    infinite = np.full((48, 48), np.inf, np.float32)

    def edit(_, tensors: dict[str, tuple[np.ndarray, Type]]) -> None:
        del tensors["blk.1.ffn_up.weight"]
        tensors["blk.9.ffn_up.weight"] = (infinite, Type.F32)
        tensors["blk.0.attn_q.weight"] = (infinite[:12], Type.F32)
        tensors["blk.0.attn_sinks"] = (infinite, Type.F32)

    path = write_gguf(tmp_path / "m.gguf", model, edit=edit)
    dest = tmp_path / "base"
    error = assert_refused(
        lambda: import_base(path, dest), dest,
        "m.gguf: blk.1.ffn_up.weight: expected shape (80, 48), found no such tensor",
        "m.gguf: blk.9.ffn_up.weight: expected layers 0 to 2, found layer 9",
        "m.gguf: blk.0.attn_q.weight: expected shape (48, 48), found (12, 48)",
        "m.gguf: blk.0.attn_sinks: expected no such tensor",
    )  # fmt: skip
    assert len(error.problems) == 4
    write_gguf(path, model, edit=lambda _, t: t.update({"blk.2.attn_q.weight": (infinite, Type.F32)}))
    expected = "m.gguf: blk.2.attn_q.weight: expected finite values, found inf at (0, 0)"
    assert_refused(lambda: import_base(path, dest), dest, expected)


def test_the_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = tiny_llama(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(path, dest), dest, "expected the package gguf", "install extra `convert`")


BROKEN = {
    "empty": (lambda raw: b"", "expected a GGUF header, found 0 bytes (truncated?)"),
    "magic": (lambda raw: b"GGML" + raw[4:], "expected the magic b'GGUF', found b'GGML'"),
    "version": (lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:], "expected GGUF version 2 or 3", "found 9"),
    "big endian": (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "little-endian"),
    "half": (lambda raw: raw[: len(raw) // 2], "expected data up to byte", "(truncated?)"),
    "header": (lambda raw: raw[:300], "header: expected"),
    "keys": (lambda raw: raw[:16] + struct.pack("<Q", 2**60) + raw[24:], "m.gguf: "),
    "tensors": (lambda raw: raw[:8] + struct.pack("<Q", 2**60) + raw[16:], "m.gguf: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str):
    model, _ = tiny_llama(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", model)
    break_it, *parts = BROKEN[case]
    path.write_bytes(break_it(path.read_bytes()))
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(path, dest), dest, "m.gguf: ", *parts)


def test_an_array_of_impossible_length_costs_nothing(tmp_path: Path):
    for kind in (4, 8):  # uint32, string
        array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, 2**60)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
        with pytest.raises(InputError, match="expected"):
            read_gguf(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    model, _ = tiny_llama(folder, num_hidden_layers=1)
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.model": "gpt2"}
    return write_gguf(folder / "m.gguf", model, tokenizer=tokens).read_bytes()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 4000))
def test_mutated_headers_are_read_or_refused(tmp_path: Path, small_file: bytes, at: int, byte: int, cut: int):
    raw = bytearray(small_file)
    raw[at] = byte
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[: len(raw) - cut] if cut < 1000 else raw)
    try:
        file = read_gguf(path)
    except InputError:
        return
    assert all(tensor.shape for tensor in file.tensors)
