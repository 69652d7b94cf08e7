"""Importing PEFT folders: what the bank computes equals peft's own delta weights; all else is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, PromptTuningConfig, get_peft_model
from peft_deltas import LAYERS, assert_same_deltas, bank_deltas, peft_deltas
from safetensors.torch import load_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

from converters import import_adapters, import_base
from meteora_jax.config import PROJECTIONS, BankConfig, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6, r".*\.down_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3, r"model\.layers\.[02]\..*": 5}},
    "patterns_rslora": {"use_rslora": True, "rank_pattern": {"mlp.gate_proj": 9}, "alpha_pattern": {"gate_proj": 1}},
    "first_pattern_wins": {"rank_pattern": {"a_proj|q_proj": 2, "q_proj": 7}, "alpha_pattern": {"q_proj": 1, "q.*": 9}},
    "subset": {"target_modules": ["q_proj", "down_proj"]},
    "full_names": {"target_modules": ["model.layers.1.self_attn.v_proj", "2.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.[12]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "exclude_list": {"exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
    "exclude_regex": {"exclude_modules": r".*layers\.1\..*"},
    "layers": {"layers_to_transform": [0, 2]},
    "layers_beside_whole_names": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj", "lm_head"],
        "layers_to_transform": [1],
    },
    "saved_and_targeted": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "one_layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("peft"), num_hidden_layers=LAYERS)[1]


@pytest.fixture(scope="module")
def base(hf: Path) -> Path:
    import_base(hf, hf.parent / "base")
    return hf.parent / "base"


@pytest.fixture(scope="module")
def plain(hf: Path) -> Path:
    return tiny_peft(hf.parent, hf, "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A sound PEFT folder of its own for each test to break."""
    return Path(shutil.copytree(plain, tmp_path / "folder"))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("option", OPTIONS)
def test_deltas_equal_pefts(tmp_path: Path, hf: Path, base: Path, plain: Path, option: str):
    adapter = tiny_peft(tmp_path, hf, option, seed=5, **OPTIONS[option])
    bank = import_adapters(tmp_path / "bank", base, {"plain": plain, option + " 2": adapter})
    deltas = bank_deltas(tmp_path / "bank")
    assert list(deltas) == ["plain", option + " 2"]
    assert_same_deltas(deltas["plain"], peft_deltas(hf, plain))
    assert_same_deltas(deltas[option + " 2"], peft_deltas(hf, adapter))
    assert bank == BankConfig.from_json(read_json(tmp_path / "bank" / "bank.json"), "bank.json")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 6),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    targets=st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
    layers=st.none() | st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "layers.1.*", ".*up_proj", "mlp.*"]), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from(["v_proj", "layers.0.*", ".*down_proj", "self_attn.*"]), st.integers(1, 9)),
)
def test_deltas_equal_pefts_for_any_settings(
    tmp_path_factory: pytest.TempPathFactory, hf: Path, base: Path, rank, alpha, rslora, targets, layers, ranks, alphas
):
    folder = tmp_path_factory.mktemp("any")
    config = {
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": targets,
        "layers_to_transform": layers, "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    # adapter_config.json sorts its keys, and the first pattern wins: start from what a reader will see.
    config |= {key: dict(sorted(config[key].items())) for key in ("rank_pattern", "alpha_pattern")}
    adapter = tiny_peft(folder, hf, "a", **config)
    import_adapters(folder / "bank", base, {"a": adapter})
    assert_same_deltas(bank_deltas(folder / "bank")["a"], peft_deltas(hf, adapter))


def test_bank_description(tmp_path: Path, hf: Path, base: Path, plain: Path):
    other = tiny_peft(tmp_path, hf, "other", r=2, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 7})
    seen = []
    bank = import_adapters(
        tmp_path / "bank", base, [("b", other), ("a", plain)], progress=lambda *step: seen.append(step)
    )
    assert seen == [("b checked", 1, 4), ("a checked", 2, 4), ("b", 3, 4), ("a", 4, 4)]
    assert bank.names == ("b", "a")
    assert [a.rank for a in bank.adapters] == [7, 4]
    assert bank.adapters[0].targets == ("v_proj", "up_proj")
    assert bank.adapters[0].source == "other"
    assert len(bank.adapters[0].sha256) == 64
    assert bank.adapters[0].peft_config == read_json(other / CONFIG)
    assert bank.ranks == {p: 7 if p == "up_proj" else 4 for p in PROJECTIONS}
    assert bank.base_shapes["up_proj"] == (48, 80)


def test_projections_that_no_adapter_touches_are_absent(tmp_path: Path, hf: Path, base: Path):
    adapter = tiny_peft(tmp_path, hf, "a", target_modules=["k_proj"])
    bank = import_adapters(tmp_path / "bank", base, {"a": adapter})
    assert bank.ranks == {"k_proj": 4}


@pytest.mark.parametrize(
    ("types", "stored"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
    ],
)
def test_types(tmp_path: Path, hf: Path, base: Path, types: tuple[torch.dtype, ...], stored: torch.dtype):
    folders = {str(i): tiny_peft(tmp_path, hf, f"a{i}", dtype=dtype) for i, dtype in enumerate(types)}
    import_adapters(tmp_path / "bank", base, folders)
    weights = load_file(tmp_path / "bank" / "weights.safetensors")
    assert {t.dtype for path, t in weights.items() if not path.endswith("scale")} == {stored}
    for i, adapter in enumerate(folders.values()):
        raw = load_file(adapter / WEIGHTS)["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]
        assert raw.dtype == types[i]
        assert torch.equal(weights["up_proj.a"][2, i].float(), raw.float())


@pytest.mark.parametrize(("old", "new"), [("base_model.model.", ""), (".weight", ".default.weight")])
def test_other_key_spellings(tmp_path: Path, hf: Path, base: Path, plain: Path, folder: Path, old: str, new: str):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    edit_safetensors(folder / WEIGHTS, rename)
    import_adapters(tmp_path / "bank", base, {"a": folder})
    assert_same_deltas(bank_deltas(tmp_path / "bank")["a"], peft_deltas(hf, plain))


REFUSED_SETTINGS: dict[str, tuple[Any, str]] = {
    "peft_type": ("IA3", "expected 'LORA', found 'IA3'"),
    "use_dora": ("yes", "expected true or false, found 'yes'"),
    "bias": ("lora_only", "expected 'none'"),
    "modules_to_save": (["norm"], "expected embed_tokens or lm_head, found ['norm']"),
    "fan_in_fan_out": (1, "expected true or false"),
    "lora_bias": ("all", "expected true or false"),
    "megatron_config": ({"x": 1}, "expected None"),
    "layer_replication": ([[0, 3]], "expected None"),
    "trainable_token_indices": ([1, 2], "expected 2 rows of model.embed_tokens, found none"),
    "alora_invocation_tokens": ([1, -2], "expected token ids, found [1, -2]"),
    "loftq_config": ({"loftq_bits": 4}, "LoftQ changes the base's weights"),
    "target_parameters": (["mlp.w"], "expected None"),
    "arrow_config": ({"top_k": 3}, "expected None"),
    "kasa_config": ({"beta": 1}, "expected None"),
    "use_bdlora": ({"nblocks": 2}, "expected None"),
    "use_qalora": (True, "expected False"),
    "velora_config": ({"scale": 1.0}, "expected None"),
    "monteclora_config": ({"num_samples": 2}, "expected None"),
    "brand_new_option": ("on", "expected no such setting (unknown to this importer), found 'on'"),
    "task_type": ("SEQ_CLS", "expected 'CAUSAL_LM', found 'SEQ_CLS'"),
    "r": (0, "expected a rank of at least 1, found 0"),
    "lora_alpha": ("8", "expected a number that float32 can hold, found '8'"),
    "use_rslora": (1, "expected true or false, found 1"),
    "rank_pattern": (["q_proj"], "expected an object of module patterns and numbers"),
    "alpha_pattern": ({"(": 1}, "expected a regex"),
    "target_modules": (None, "expected module names, a regex or 'all-linear', found None"),
    "exclude_modules": (7, "expected a list of module names or a regex, found 7"),
    "layers_to_transform": (["1"], "expected layer indices"),
    "layers_pattern": ("layers", "expected layers_to_transform with it"),
}


@pytest.mark.parametrize("method", ["IA3", "LOHA", "PROMPT_TUNING"])
def test_another_method_is_one_line_and_not_one_a_tensor(tmp_path: Path, hf: Path, base: Path, method: str):
    """Folders that peft itself wrote, each with the other method's tensors."""
    kinds = {"IA3": IA3Config, "LOHA": LoHaConfig, "PROMPT_TUNING": PromptTuningConfig}
    more: dict[str, Any] = {"num_virtual_tokens": 4} if method == "PROMPT_TUNING" else {"target_modules": ["up_proj"]}
    more |= {"feedforward_modules": ["up_proj"]} if method == "IA3" else {}
    made = get_peft_model(LlamaForCausalLM.from_pretrained(hf), kinds[method](task_type="CAUSAL_LM", **more))
    made.save_pretrained(tmp_path / "other")
    dest = tmp_path / "bank"
    refusal = assert_refused(lambda: import_adapters(dest, base, {"a": tmp_path / "other"}), dest)
    expected = f"{tmp_path / 'other' / CONFIG}: peft_type: expected 'LORA', found {method!r}"
    assert list(refusal.problems) == [expected]


@pytest.mark.parametrize("key", REFUSED_SETTINGS)
def test_settings_that_are_refused(tmp_path: Path, base: Path, folder: Path, key: str):
    value, message = REFUSED_SETTINGS[key]
    edit_json(folder / CONFIG, **{key: value})
    dest = tmp_path / "bank"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, f"{folder}/{CONFIG}: {key}", message)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new", 1])
def test_initialisations_that_change_the_base_are_refused(tmp_path: Path, base: Path, folder: Path, init):
    edit_json(folder / CONFIG, init_lora_weights=init)
    dest = tmp_path / "bank"
    expected = f"init_lora_weights: expected an initialisation that leaves the base as it is, found {init!r}"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, expected)


def test_settings_without_effect_are_accepted(tmp_path: Path, base: Path, folder: Path):
    edit_json(
        folder / CONFIG, peft_version="9", revision="main", inference_mode=False, eva_config={"rho": 2.0},
        megatron_core="x", auto_mapping={"a": "b"}, future_feature=None, another=[], init_lora_weights=False,
        target_parameters=..., velora_config=...,
    )  # fmt: skip
    import_adapters(tmp_path / "bank", base, {"a": folder})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


BROKEN_TENSORS = {
    "no B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), f"{Q0}.lora_B.weight: expected the partner of lora_A"),
    "no A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), f"{Q0}.lora_A.weight: expected the partner of lora_B, found none"),
    "shape": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64)}),
        f"{Q0}.lora_A.weight: expected shape (4, 48) for this base, found (4, 64)",
    ),
    "transposed": (
        lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(4, 48)}),
        f"{Q0}.lora_B.weight: expected shape (48, 4) for this base, found (4, 48)",
    ),
    "flat": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4)}), "(4, 48) for this base, found (4,)"),
    "layer": (
        lambda t: t.update({f"{Q0.replace('0', '9')}.lora_A.weight": torch.ones(4, 48)}),
        "model.layers.9.self_attn.q_proj.lora_A.weight: expected layers 0 to 2, found layer 9",
    ),
    "twice": (
        lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, 48)}),
        f"expected once, found also in {Q0}.lora_A",
    ),
    "nan": (
        lambda t: t[f"{Q0}.lora_B.weight"][5, 1].fill_(torch.nan),
        f"{Q0}.lora_B.weight: expected finite values, found nan at (5, 1)",
    ),
    "type": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 48, dtype=torch.int32)}), "found I32"),
    "block": (
        lambda t: t.update({f"{Q0.replace('self_attn', 'mlp')}.lora_A.weight": torch.ones(4, 48)}),
        "expected lora_A or lora_B of q_proj",
    ),
    "dora": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(48)}),
        "lora_magnitude_vector: expected no such tensor (use_dora is off), found one",
    ),
    "lora_bias": (
        lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(48)}),
        "lora_B.bias: expected no such tensor (lora_bias is off), found one",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)}),
        "target_modules: expected none on model.embed_tokens, found tensors",
    ),
    "saved embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(320, 48)}),
        "embed_tokens.weight: expected the values of the base, found others",
    ),
    "head": (
        lambda t: t.update({"base_model.model.lm_head.lora_magnitude_vector": torch.ones(320)}),
        "(the head may have LoRA, retrained tokens and saved copies of the base's)",
    ),
    "unknown": (lambda t: t.update({"x": torch.ones(1)}), "x: expected lora_A or lora_B of", "(an unknown tensor)"),
    "module gone": (
        lambda t: [t.pop(f"{Q0}.lora_{half}.weight") for half in "AB"],
        "target_modules: expected tensors of self_attn.q_proj in layers [0], found none",
    ),
    "empty": (lambda t: t.clear(), "expected LoRA tensors, found none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_TENSORS)
def test_broken_tensors_are_refused(tmp_path: Path, base: Path, folder: Path, kind: str):
    edit, *parts = BROKEN_TENSORS[kind]
    edit_safetensors(folder / WEIGHTS, edit)
    dest = tmp_path / "bank"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, str(folder), *parts)


def test_settings_that_contradict_the_tensors(tmp_path: Path, base: Path, folder: Path):
    dest = tmp_path / "bank"
    edit_json(folder / CONFIG, layers_to_transform=[0, 1], r=8)
    assert_refused(
        lambda: import_adapters(dest, base, {"a": folder}), dest, "expected shape (8, 48) for this base, found (4, 48)"
    )
    edit_json(folder / CONFIG, r=4)
    expected = "target_modules: expected no tensors of self_attn.q_proj in layers [2], found some"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, expected)
    edit_json(folder / CONFIG, layers_to_transform=None, exclude_modules=["up_proj"])
    expected = "target_modules: expected no tensors of mlp.up_proj in layers [0, 1, 2], found some"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, expected)
    edit_json(folder / CONFIG, exclude_modules=None, target_modules=".*_proj", layers_to_transform=[0])
    expected = "layers_to_transform: expected none with a target_modules that is a string"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, expected)


def test_an_adapter_of_another_base(tmp_path: Path, base: Path):
    for name, sizes in {"wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 4}}.items():
        _, other = tiny_llama(tmp_path, folder=name, **sizes)
        adapter = tiny_peft(tmp_path, other, f"{name}-adapter")
        parts = {"wide": ("(4, 48) for this base, found (4, 64)",), "deep": ("layers 0 to 2, found layer 3",)}[name]
        dest = tmp_path / "bank"
        assert_refused(lambda a=adapter, d=dest: import_adapters(d, base, {"a": a}), dest, *parts)


def test_all_problems_of_all_folders_come_at_once(tmp_path: Path, base: Path, plain: Path, folder: Path):
    others = [Path(shutil.copytree(plain, tmp_path / f"other{i}")) for i in range(3)]
    edit_json(folder / CONFIG, use_qalora=True, bias="all")
    edit_safetensors(folder / WEIGHTS, lambda t: t.pop(f"{Q0}.lora_B.weight"))
    edit_safetensors(others[0] / WEIGHTS, lambda t: t[f"{Q0}.lora_B.weight"].fill_(torch.inf))
    (others[1] / WEIGHTS).write_bytes((others[1] / WEIGHTS).read_bytes()[:-1])
    (others[2] / CONFIG).unlink()
    dest = tmp_path / "bank"
    named = {"a": folder, **{str(i): other for i, other in enumerate(others)}, "b/c": plain}
    error = assert_refused(
        lambda: import_adapters(dest, base, named), dest, "use_qalora", "bias", "lora_B.weight: expected the partner",
        f"{others[0]}/{WEIGHTS}", "finite", f"{others[1]}/{WEIGHTS}", "(truncated?)",
        f"{others[2]}/{CONFIG}: expected a file, found none", "adapter 'b/c'",
    )  # fmt: skip
    assert len(error.problems) == 7


@pytest.mark.parametrize("name", ["", "a/b", "a=b", " a", "a\nb", "a\\b"])
def test_names_that_are_refused(tmp_path: Path, base: Path, plain: Path, name: str):
    dest = tmp_path / "bank"
    assert_refused(
        lambda: import_adapters(dest, base, {name: plain}), dest, f"adapter {name!r}: expected a printable name"
    )


def test_duplicate_names_and_none_at_all(tmp_path: Path, base: Path, plain: Path):
    dest = tmp_path / "bank"
    pairs = [("a", plain), ("b", plain), ("a", plain)]
    assert_refused(lambda: import_adapters(dest, base, pairs), dest, "adapter 'a': expected once, found 2 times")
    assert_refused(lambda: import_adapters(dest, base, {}), dest, "adapters: expected at least one, found none")


def test_missing_and_pickled_files(tmp_path: Path, base: Path, folder: Path):
    dest = tmp_path / "bank"
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    expected = "adapter_model.bin: expected a zip archive as torch.save writes it"
    assert_refused(lambda: import_adapters(dest, base, {"a": folder}), dest, expected)
    assert_refused(
        lambda: import_adapters(dest, base, {"a": tmp_path / "no"}),
        dest,
        f"no/{CONFIG}: expected a file",
        f"no/{WEIGHTS}",
    )
    assert_refused(
        lambda: import_adapters(dest, tmp_path / "no", {"a": folder}), dest, "no/config.json: expected a file"
    )


def test_destination_rules(tmp_path: Path, base: Path, plain: Path, folder: Path):
    dest = tmp_path / "bank"
    import_adapters(dest, base, {"a": plain})
    assert_refused(lambda: import_adapters(dest, base, {"b": plain}), dest, "expected no folder or an empty one")
    import_adapters(dest, base, {"b": plain}, overwrite=True)
    assert json.loads((dest / "bank.json").read_text())["adapters"][0]["name"] == "b"
    for source in (folder, base):
        assert_refused(
            lambda s=source: import_adapters(s, base, {"a": folder}, overwrite=True),
            dest,
            "expected a destination apart",
        )
