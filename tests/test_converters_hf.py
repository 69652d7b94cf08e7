"""Importing Hugging Face folders: values equal transformers' state dict, and every kind of broken input is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import assert_refused, edit_json, edit_safetensors, hf_weights, tiny_llama
from transformers import AutoTokenizer

from converters import import_base
from meteora_jax.config import InputError, read_json
from meteora_jax.io import hf_config

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "mha": {"num_key_value_heads": 4},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
}


def assert_base_holds(base: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(base / "weights.safetensors")
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert found[path].dtype == tensor.dtype, path
        assert torch.equal(found[path], tensor), path


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_equal_the_state_dict(tmp_path: Path, variant: str, shards: str):
    size = "50GB" if shards == "single" else 30_000
    model, folder = tiny_llama(tmp_path, max_shard_size=size, **VARIANTS[variant])
    assert (folder / "model.safetensors").exists() == (shards == "single")
    import_base(folder, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(model))
    config = hf_config.from_hf(read_json(tmp_path / "base" / "config.json"))
    assert config == hf_config.from_hf(read_json(folder / "config.json"))
    shapes = {path: tuple(t.shape) for path, t in load_file(tmp_path / "base" / "weights.safetensors").items()}
    assert shapes == config.weight_shapes()


@pytest.mark.parametrize("target", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_types(tmp_path: Path, source: torch.dtype, target: str | None):
    model, folder = tiny_llama(tmp_path, dtype=source, num_hidden_layers=2)
    import_base(folder, tmp_path / "base", dtype=target)
    wanted = source if target is None else getattr(torch, target)
    assert_base_holds(tmp_path / "base", {path: t.to(wanted) for path, t in hf_weights(model).items()})


def test_layers_of_different_types_become_the_wider_one(tmp_path: Path):
    model, folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_safetensors(folder / "model.safetensors", lambda t: t.update({key: t[key].float()}))
    import_base(folder, tmp_path / "base")
    expected = hf_weights(model)
    expected["layers.up_proj.kernel"] = expected["layers.up_proj.kernel"].float()
    assert_base_holds(tmp_path / "base", expected)


def test_file_is_aligned_and_named_sources_are_hashed(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    import_base(folder, tmp_path / "base")
    weights = tmp_path / "base" / "weights.safetensors"
    (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
    assert length % 8 == 0
    with safe_open(weights, "np") as file:
        assert "norm.scale" in file.keys()  # noqa: SIM118 - safe_open is no mapping
    meteora = read_json(tmp_path / "base" / "config.json")["meteora"]
    assert meteora["format"] == "meteora-base-1"
    names = {entry["file"] for entry in meteora["source"]}
    assert names == {"config.json", *(p.name for p in folder.glob("model*"))}
    assert all(len(entry["sha256"]) == 64 for entry in meteora["source"])


def test_tokenizer_comes_along(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    import_base(folder, tmp_path / "base")
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "base", folder))
    text = "Which of 24 foxes?\n <|im_end|>Ünï 🙂"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (tmp_path / "base" / "generation_config.json").exists()


def test_known_useless_tensors_are_dropped(tmp_path: Path):
    model, folder = tiny_llama(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_safetensors(folder / "model.safetensors", add)
    import_base(folder, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(model))


def test_progress_counts_every_tensor(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    seen = []
    import_base(folder, tmp_path / "base", progress=lambda key, done, total: seen.append((key, done, total)))
    assert [done for _, done, _ in seen] == list(range(1, 31))
    assert {total for *_, total in seen} == {30}


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN_TENSORS = {
    "transposed": (
        lambda t: t.update({UP: t[UP].T}),
        f"{UP}: expected shape (80, 48), found (48, 80)",
    ),
    "missing": (lambda t: t.pop(UP), f"{UP}: expected shape (80, 48), found no such tensor"),
    "unknown": (
        lambda t: t.update({"model.extra.weight": torch.ones(2)}),
        "model.extra.weight: expected no such tensor, found F32 (2,)",
    ),
    "layer": (
        lambda t: t.update({UP.replace("1", "7"): t[UP].clone()}),
        "model.layers.7.mlp.up_proj.weight: expected layers 0 to 2, found layer 7",
    ),
    "bias": (
        lambda t: t.update({UP.replace("weight", "bias"): torch.ones(80)}),
        "model.layers.1.mlp.up_proj.bias: expected no such tensor",
    ),
    "type": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP}: expected type F32, F16, BF16, found I8"),
    "double": (lambda t: t.update({UP: t[UP].double()}), f"{UP}: expected type F32, F16, BF16, found F64"),
    "nan": (lambda t: t[UP][3, 4:6].fill_(torch.nan), f"{UP}: expected finite values, found nan at (3, 4)"),
    "inf": (lambda t: t[UP][79, 47].fill_(-torch.inf), f"{UP}: expected finite values, found -inf at (79, 47)"),
    "scalar": (lambda t: t.update({UP: torch.tensor(1.0)}), f"{UP}: expected shape (80, 48), found ()"),
}


@pytest.mark.parametrize("kind", BROKEN_TENSORS)
def test_broken_tensors_are_refused(tmp_path: Path, kind: str):
    _, folder = tiny_llama(tmp_path)
    edit, message = BROKEN_TENSORS[kind]
    edit_safetensors(folder / "model.safetensors", edit)
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(folder, dest), dest, f"model.safetensors: {message}")


def test_all_failures_come_at_once(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("transposed", "unknown", "layer", "bias"):
            BROKEN_TENSORS[kind][0](tensors)
        del tensors["model.norm.weight"]

    edit_safetensors(folder / "model.safetensors", edit)
    error = assert_refused(lambda: import_base(folder, tmp_path / "base"), tmp_path / "base")
    assert len(error.problems) == 5


def test_every_tensor_that_is_not_finite_is_named(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    edit_safetensors(folder / "model.safetensors", lambda t: [v.view(-1)[0].fill_(torch.nan) for v in t.values()])
    error = assert_refused(lambda: import_base(folder, tmp_path / "base"), tmp_path / "base")
    assert len(error.problems) == 30


def test_values_beyond_the_wanted_type_are_refused(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    edit_safetensors(folder / "model.safetensors", lambda t: t[UP][0, 0].fill_(1e6))
    dest = tmp_path / "base"
    expected = f"{UP}: expected values that float16 can hold, found up to 1000000.0"
    assert_refused(lambda: import_base(folder, dest, dtype="float16"), dest, expected)
    import_base(folder, dest, dtype="bfloat16")


def rewrite_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(folder, dest), dest, f"{shards[1].name}: expected a file, found none")


def test_index_names_a_tensor_that_is_not_there(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    shard = sorted(p.name for p in folder.glob("model-*.safetensors"))[0]
    rewrite_index(folder, lambda m: m.update({"model.ghost.weight": shard}))
    dest = tmp_path / "base"
    expected = f"{shard}: model.ghost.weight: expected by model.safetensors.index.json, found no such tensor"
    assert_refused(lambda: import_base(folder, dest), dest, expected)


def test_tensor_without_an_index_entry(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    key = "model.norm.weight"  # shares its shard with others
    rewrite_index(folder, lambda m: m.pop(key))
    dest = tmp_path / "base"
    expected = f"{key}: expected in model.safetensors.index.json, found no entry"
    assert_refused(lambda: import_base(folder, dest), dest, expected)


def test_tensor_in_two_shards(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    home = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][UP]
    other = next(p for p in sorted(folder.glob("model-*.safetensors")) if p.name != home)
    edit_safetensors(other, lambda t: t.update({UP: torch.ones(80, 48)}))
    dest = tmp_path / "base"
    expected = f"{other.name}: {UP}: expected in model.safetensors.index.json, found it in {home}"
    assert_refused(lambda: import_base(folder, dest), dest, expected)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "", 3, "x.bin"]
)
def test_index_paths_stay_in_the_folder(tmp_path: Path, name):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    rewrite_index(folder, lambda m: m.update({UP: name}))
    dest = tmp_path / "base"
    expected = f"model.safetensors.index.json: {UP}: expected the name of a safetensors file in the same folder"
    assert_refused(lambda: import_base(folder, dest), dest, expected, repr(name))


def test_malformed_index(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, max_shard_size=30_000)
    dest = tmp_path / "base"
    edit_json(folder / "model.safetensors.index.json", weight_map=["x"])
    assert_refused(lambda: import_base(folder, dest), dest, "model.safetensors.index.json: weight_map: expected")
    (folder / "model.safetensors.index.json").write_text("{")
    assert_refused(lambda: import_base(folder, dest), dest, "model.safetensors.index.json: expected JSON")


@pytest.mark.parametrize("variant", ["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_equal_the_state_dict(tmp_path: Path, variant: str, shards: int):
    model, folder = tiny_llama(tmp_path, dtype=torch.bfloat16, **VARIANTS[variant])
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = {key: f"pytorch_model-{i % shards}.bin" for i, key in enumerate(state)}
        for name in set(names.values()):
            torch.save({k: t for k, t in state.items() if names[k] == name}, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    import_base(folder, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(model))
    assert read_json(tmp_path / "base" / "config.json")["meteora"]["source"][0]["file"].startswith("pytorch_model")


def test_safetensors_come_before_pickles(tmp_path: Path):
    model, folder = tiny_llama(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not read, as in transformers")
    import_base(folder, tmp_path / "base")
    assert_base_holds(tmp_path / "base", hf_weights(model))
    (folder / "model.safetensors").unlink()
    dest = tmp_path / "other"
    assert_refused(lambda: import_base(folder, dest), dest, "pytorch_model.bin: expected a zip archive")
    (folder / "pytorch_model.bin").unlink()
    assert_refused(lambda: import_base(folder, dest), dest, "found none of them")


def test_config_problems(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    dest = tmp_path / "base"
    edit_json(folder / "config.json", hidden_size=..., hidden_act="gelu")
    assert_refused(lambda: import_base(folder, dest), dest, "config.json: hidden_size", "hidden_act", "'gelu'")
    edit_json(folder / "config.json", model_type="gemma")
    assert_refused(lambda: import_base(folder, dest), dest, "model_type: expected llama, mistral, qwen2, qwen3, found")
    (folder / "config.json").unlink()
    assert_refused(lambda: import_base(folder, dest), dest, "config.json: expected a file, found none")


def test_a_config_with_endless_layers_is_refused_quickly(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    edit_json(folder / "config.json", num_hidden_layers=10**12)
    dest = tmp_path / "base"
    expected = "model.layers.{layer}.mlp.up_proj.weight: expected 1000000000000 layers of shape (80, 48), found 3"
    error = assert_refused(lambda: import_base(folder, dest), dest)
    assert any(expected in problem for problem in error.problems)


def test_broken_tokenizer_file(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": ')
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(folder, dest), dest, "tokenizer.json: expected JSON")


def test_wrong_arguments(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(folder, dest, dtype="int8"), dest, "dtype: expected float32", "'int8'")
    assert_refused(
        lambda: import_base(tmp_path / "no", dest), dest, "no: expected a Hugging Face folder, Meta's or a .gguf"
    )
    assert_refused(
        lambda: import_base(folder / "config.json", dest), dest, "config.json: expected a Hugging Face folder"
    )


def test_destination_rules(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    dest = tmp_path / "deep" / "base"
    edit_json(folder / "config.json", num_hidden_layers=4)
    with pytest.raises(InputError):
        import_base(folder, dest)
    assert not dest.parent.exists()
    edit_json(folder / "config.json", num_hidden_layers=3)
    import_base(folder, dest)
    first = (dest / "weights.safetensors").read_bytes()
    assert_refused(lambda: import_base(folder, dest), dest, "expected no folder or an empty one")

    edit_safetensors(folder / "model.safetensors", lambda t: t[UP].fill_(torch.nan))
    assert_refused(lambda: import_base(folder, dest, overwrite=True), dest, UP)
    assert (dest / "weights.safetensors").read_bytes() == first
    edit_safetensors(folder / "model.safetensors", lambda t: t[UP].fill_(0.5))
    import_base(folder, dest, overwrite=True)
    assert load_file(dest / "weights.safetensors")["layers.up_proj.kernel"][1].eq(0.5).all()
    assert [p.name for p in dest.parent.iterdir()] == ["base"]
    assert_refused(lambda: import_base(folder, folder, overwrite=True), dest, "expected a destination apart")


def test_end_tokens_of_the_generation_config_join_the_base(tmp_path):
    _, folder = tiny_llama(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    import_base(folder, tmp_path / "base")
    assert read_json(tmp_path / "base" / "config.json")["eos_token_id"] == [2, 7]
    edit_json(folder / "generation_config.json", eos_token_id="end")
    assert_refused(lambda: import_base(folder, tmp_path / "other"), tmp_path / "other", "eos_token_id", "'end'")
