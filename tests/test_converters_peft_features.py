"""PEFT beyond plain LoRA: DoRA, biases, saved copies of the base and pickled files give peft's own logits."""

import json
import pickle
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

import meteora_jax as mj
from converters import export_adapter, export_merged, import_adapters, import_base
from converters.pickle_files import read_pickle
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.gates import save_gates

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROW = [5, 6, 7, 8, 9, 300, 17]
LAYERS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora_rslora_patterns": {
        "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"up_proj": 3},
    },
    "dora_subset": {"use_dora": True, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "lora_bias": {"lora_bias": True},
    "lora_bias_rslora": {"lora_bias": True, "use_rslora": True, "target_modules": ["v_proj", "gate_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),  # peft counts biases as matrices
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("features"), attention_bias=True)[1]


@pytest.fixture(scope="module")
def base(hf: Path) -> Path:
    import_base(hf, hf.parent / "base")
    return hf.parent / "base"


@pytest.fixture(scope="module")
def plain(hf: Path) -> Path:
    return tiny_peft(hf.parent, hf, "plain", seed=3, r=5)


def load_hf(hf: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()


def hf_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ROW])).logits[0].numpy()


def peft_logits(hf: Path, adapter: Path) -> np.ndarray:
    return hf_logits(PeftModel.from_pretrained(load_hf(hf), adapter))


def logits(base: Path, bank: Path, router: Any, gates: Path | None = None) -> np.ndarray:
    return np.asarray(mj.load(base, bank, gates, dtype="float32").logits([ROW], router=router))[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_pefts(tmp_path: Path, hf: Path, base: Path, plain: Path, option: str):
    adapter = tiny_peft(tmp_path, hf, "in", **OPTIONS[option])
    import_adapters(tmp_path / "bank", base, {"plain": plain, "a": adapter})
    expected = peft_logits(hf, adapter)
    assert np.abs(logits(base, tmp_path / "bank", mj.Fixed("a")) - expected).max() <= 1e-4
    others = peft_logits(hf, plain)
    assert np.abs(expected - others).max() > 0.1
    assert np.abs(logits(base, tmp_path / "bank", mj.Fixed("plain")) - others).max() <= 1e-4
    export_adapter(tmp_path / "bank", "a", tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(adapter / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads((adapter / CONFIG).read_text())
    assert np.array_equal(peft_logits(hf, tmp_path / "out"), expected)


class Mixed(torch.nn.Module):
    """A projection that adds to the base's output each adapter's weighted difference from it, as peft computes them."""

    def __init__(self, plain: torch.nn.Module, adapted: list[torch.nn.Module], weigh: Any):
        super().__init__()
        self.plain, self.adapted, self.weigh = plain, torch.nn.ModuleList(adapted), weigh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.plain(x)
        return y + sum(w[..., None] * (m(x) - y) for w, m in zip(self.weigh(x), self.adapted, strict=True))


def mixed_logits(hf: Path, adapters: list[Path], weigh: Any) -> np.ndarray:
    """Logits of a model whose projections are `Mixed`; weigh(layer, projection, x) -> a weight [B, T] an adapter."""
    model = load_hf(hf)
    adapted = [PeftModel.from_pretrained(load_hf(hf), folder).base_model.model for folder in adapters]
    for layer in range(LAYERS):
        for p in PROJECTIONS:
            parent = f"model.layers.{layer}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}"
            own = model.get_submodule(parent)
            modules = [m.get_submodule(f"{parent}.{p}") for m in adapted]
            setattr(own, p, Mixed(getattr(own, p), modules, lambda x, layer=layer, p=p: weigh(layer, p, x)))
    return hf_logits(model)


@pytest.fixture(scope="module")
def three(hf: Path) -> list[Path]:
    """DoRA, plain and biased adapters on different projections."""
    options = [
        {"use_dora": True, "r": 3},
        {"target_modules": ["q_proj", "o_proj", "up_proj"]},
        {"lora_bias": True, "r": 6, "target_modules": ["v_proj", "gate_proj", "down_proj"]},
    ]
    return [tiny_peft(hf.parent, hf, f"three{i}", seed=10 + i, **o) for i, o in enumerate(options)]


def test_a_mixture_is_the_sum_of_weighted_differences(tmp_path: Path, hf: Path, base: Path, three: list[Path]):
    import_adapters(tmp_path / "bank", base, {str(i): folder for i, folder in enumerate(three)})
    for weights in ([0.5, 0.3, 0.2], [0.0, 0.7, 0.9]):
        router = mj.Fixed({str(i): w for i, w in enumerate(weights)})
        want = mixed_logits(hf, three, lambda layer, p, x, w=weights: [torch.full(x.shape[:2], v) for v in w])
        assert np.abs(logits(base, tmp_path / "bank", router) - want).max() <= 1e-4


def test_gates_mix_the_same_way_for_every_token(tmp_path: Path, hf: Path, base: Path, three: list[Path]):
    from meteora_jax.config import read_json

    names = tuple("012")
    import_adapters(tmp_path / "bank", base, dict(zip(names, three, strict=True)))
    config, rng = hf_config.from_hf(read_json(base / "config.json")), np.random.default_rng(0)

    def shape(p):
        return (LAYERS, config.projection_shape(p)[0], 3)

    arrays = {p: rng.standard_normal(shape(p)).astype(np.float32) for p in PROJECTIONS}
    save_gates(tmp_path / "gates", GateConfig(names, 2, 1.0), arrays)

    def weigh(layer: int, p: str, x: torch.Tensor) -> list[torch.Tensor]:
        values, chosen = (x @ torch.from_numpy(arrays[p][layer])).topk(2)
        weights = torch.zeros(*x.shape[:2], 3).scatter(2, chosen, values.softmax(-1))
        return list(weights.unbind(-1))

    want = mixed_logits(hf, three, weigh)
    assert np.abs(logits(base, tmp_path / "bank", mj.Gates(top_k=2), tmp_path / "gates") - want).max() <= 1e-4


def test_dora_merges_and_biases_only_where_the_base_has_them(tmp_path: Path, hf: Path, base: Path, three: list[Path]):
    attention = tiny_peft(tmp_path, hf, "attention", lora_bias=True, target_modules=["q_proj", "o_proj"])
    bank, dest = tmp_path / "bank", tmp_path / "out"
    import_adapters(bank, base, {"dora": three[0], "bias": three[2], "attention": attention})
    assert_refused(lambda: export_merged(base, bank, "bias", dest), dest, "mlp.gate_proj: expected no bias where")
    for name, folder in (("dora", three[0]), ("attention", attention)):
        export_merged(base, bank, name, tmp_path / f"merged-{name}")
        assert np.abs(hf_logits(load_hf(tmp_path / f"merged-{name}")) - peft_logits(hf, folder)).max() <= 1e-4


def test_halves_of_dora_and_biases_that_are_missing(tmp_path: Path, hf: Path, base: Path):
    module = "base_model.model.model.layers.1.mlp.up_proj"
    dest = tmp_path / "bank"
    for option, key, switch in (
        ("use_dora", "lora_magnitude_vector", "use_dora"),
        ("lora_bias", "lora_B.bias", "lora_bias"),
    ):
        folder = tiny_peft(tmp_path, hf, option, **{option: True})
        call = partial(import_adapters, dest, base, {"a": folder})
        edit_json(folder / CONFIG, **{switch: False})
        assert_refused(call, dest, f"{key}: expected no such tensor ({switch} is off), found one")
        edit_json(folder / CONFIG, **{switch: True})
        edit_safetensors(folder / WEIGHTS, lambda t, k=f"{module}.{key}": t.pop(k))
        assert_refused(call, dest, f"{module}.{key}: expected one ({switch} is on), found none")
        edit_safetensors(folder / WEIGHTS, lambda t, k=f"{module}.{key}": t.update({k: torch.ones(7)}))
        assert_refused(call, dest, f"{module}.{key}: expected shape (80,) for this base, found (7,)")
    edit_json(folder / CONFIG, use_dora=True)
    assert_refused(call, dest, "lora_bias: expected false with use_dora, as in peft")


def test_magnitudes_of_columns_that_are_zero_are_refused(tmp_path: Path, hf: Path, base: Path):
    folder = tiny_peft(tmp_path, hf, "in", use_dora=True, target_modules=["up_proj"])
    shutil.copytree(base, tmp_path / "base")
    edit_safetensors(tmp_path / "base" / "weights.safetensors", lambda t: t["layers.up_proj.kernel"][1, :, 3].fill_(0))
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit_safetensors(folder / WEIGHTS, lambda t: t[key][3].fill_(0))
    dest = tmp_path / "bank"
    call = partial(import_adapters, dest, tmp_path / "base", {"a": folder})
    assert_refused(call, dest, "lora_magnitude_vector: expected columns of W + scale A B that are not zero")


def test_saved_copies_of_the_base_are_accepted_and_changed_ones_refused(tmp_path: Path, hf: Path, base: Path):
    folder = tiny_peft(tmp_path, hf, "in", modules_to_save=["lm_head", "embed_tokens"])
    import_adapters(tmp_path / "bank", base, {"a": folder})
    assert np.abs(logits(base, tmp_path / "bank", mj.Fixed("a")) - peft_logits(hf, folder)).max() <= 1e-4
    dest = tmp_path / "other"
    for key in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        broken = Path(shutil.copytree(folder, tmp_path / key))
        edit_safetensors(broken / WEIGHTS, lambda t, k=key: t[k][7, 7].add_(1e-3))
        call = partial(import_adapters, dest, base, {"a": broken})
        assert_refused(call, dest, f"{key}: expected the values of the base, found others")
        edit_safetensors(broken / WEIGHTS, lambda t, k=key: t.pop(k))
        assert_refused(call, dest, "modules_to_save: expected tensors of", "found none")


# --- pickles ---


def pickle_weights(folder: Path, edit: Any = None) -> None:
    """Turns a folder's safetensors file into the .bin that older versions of peft wrote."""
    tensors = load_file(folder / WEIGHTS)
    torch.save(edit(tensors) if edit else tensors, folder / PICKLED)
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pickled_weights_equal_pefts(tmp_path: Path, hf: Path, base: Path, dtype: torch.dtype):
    folder = tiny_peft(tmp_path, hf, "in", dtype=dtype, use_dora=dtype == torch.float32)
    before = load_file(folder / WEIGHTS)
    pickle_weights(folder)
    import_adapters(tmp_path / "bank", base, {"a": folder})
    export_adapter(tmp_path / "bank", "a", tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == dtype for key in before)
    assert np.abs(logits(base, tmp_path / "bank", mj.Fixed("a")) - peft_logits(hf, folder)).max() <= 1e-4


def test_what_torch_saves_is_read(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    shared = torch.arange(24.0).reshape(4, 6)
    saved = {
        "module": model.state_dict(),  # an OrderedDict with _metadata
        "parameters": {"w": torch.nn.Parameter(torch.ones(2, 3))},
        "views": {"whole": shared, "rows": shared[1:3], "one": shared[2:3, :1]},
        "types": {str(t): torch.ones(2, 2).to(t) for t in (torch.float64, torch.int64, torch.int8, torch.bool)},
        "none": {},
    }
    for name, state in saved.items():
        torch.save(state, tmp_path / name)
        found = {t.key: t.read() for t in read_pickle(tmp_path / name)}
        assert found.keys() == state.keys()
        for key, tensor in state.items():
            np.testing.assert_array_equal(found[key], tensor.detach().numpy())
            assert found[key].dtype == tensor.detach().numpy().dtype
    tensor = {t.key: t for t in read_pickle(tmp_path / "views")}["rows"]
    np.testing.assert_array_equal(tensor.rows(1, 2), shared[2:3].numpy())


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def write_archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **parts: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)


def test_pickles_that_ask_for_more_are_refused_and_not_executed(tmp_path: Path):
    path, trap = tmp_path / "x.bin", tmp_path / "trap"
    cases: dict[str, tuple[Any, str]] = {
        "bomb": ({"w": Bomb(trap)}, "expected a dict of tensors, found a call of __builtin__.getattr"),
        "key": ({Bomb(trap): 1}, "found a call of"),
        "module": (torch.nn.Linear(2, 2), "found the instruction NEWOBJ"),
        "list": ([torch.ones(2)], "expected a dict of tensors by name, found list"),
        "number": ({"w": 3}, "w: expected a tensor, found int"),
        "nested": ({"w": {"v": torch.ones(2)}}, "w: expected a tensor, found dict"),
        "transposed": ({"w": torch.ones(2, 3).T}, "w: expected values that lie in order, found strides (1, 3)"),
        "expanded": ({"w": torch.ones(1).expand(1000, 1000)}, "w: expected values that lie in order"),
        "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "expected a storage of FloatStorage"),
        "sparse": ({"w": torch.eye(3).to_sparse()}, "found a call of torch."),
    }
    for case, (state, said) in cases.items():
        torch.save(state, path)
        with pytest.raises(InputError) as error:
            read_pickle(path)
        assert said in str(error.value), (case, str(error.value))
        assert "\n" not in str(error.value)
        assert not trap.exists(), case


def test_broken_archives_are_refused(tmp_path: Path):
    path = tmp_path / "x.bin"
    good = {"w": torch.arange(100.0)}
    torch.save(good, path)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        description = archive.read("x/data.pkl")
    legacy = tmp_path / "legacy"
    torch.save(good, legacy, _use_new_zipfile_serialization=False)
    values = good["w"].numpy().tobytes()
    cases: dict[str, tuple[Any, str]] = {
        "empty": (lambda: path.write_bytes(b""), "expected a zip archive"),
        "truncated": (lambda: path.write_bytes(raw[: len(raw) // 2]), "expected a zip archive"),
        "legacy": (lambda: path.write_bytes(legacy.read_bytes()), "expected a zip archive"),
        "plain pickle": (lambda: path.write_bytes(pickle.dumps({"w": 1})), "expected a zip archive"),
        "no values": (lambda: write_archive(path, description), "w: expected values at data/0, found none"),
        "few values": (
            lambda: write_archive(path, description, **{"data/0": values[:-1]}),
            "w: expected float32 (100,) at 0, found 399 bytes (truncated?)",
        ),
        "big endian": (
            lambda: write_archive(path, description, byteorder=b"big", **{"data/0": values}),
            "byteorder: expected b'little', found b'big'",
        ),
        "compressed": (
            lambda: write_archive(path, description, zipfile.ZIP_DEFLATED, **{"data/0": values}),
            "expected a whole, uncompressed part",
        ),
        "no pickle": (lambda: write_archive(path, b""), "data.pkl: expected"),
        "no end": (lambda: write_archive(path, description[:-1]), "data.pkl: expected"),
        "garbage": (lambda: write_archive(path, b"\xff" * 40), "data.pkl: expected a sound pickle"),
        "huge memo": (lambda: write_archive(path, b"\x80\x02}r\xff\xff\xff\x7f."), ""),
        "twice": (
            lambda: write_archive(path, b"\x80\x02}(X\1\0\0\0wK\1X\1\0\0\0wK\2u."),
            "data.pkl: expected 'w' once, found it twice",
        ),
        "other archive": (lambda: zipfile.ZipFile(path, "w").close(), "expected a data.pkl inside, found none"),
        "gone": (path.unlink, "expected a file, found none"),
    }
    for case, (make, said) in cases.items():
        make()
        if not said:
            assert read_pickle(path) == []
            continue
        with pytest.raises(InputError) as error:
            read_pickle(path)
        assert str(error.value).startswith("x.bin: "), case
        assert said in str(error.value), (case, str(error.value))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), inside=st.booleans())
def test_mutated_pickles_are_read_or_refused(tmp_path: Path, at: int, byte: int, inside: bool):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3, 2), "b": torch.nn.Parameter(torch.ones(4).half())}, path)
    if inside:
        with zipfile.ZipFile(path) as archive:
            parts = {n.removeprefix("x/"): bytearray(archive.read(n)) for n in archive.namelist()}
        parts["data.pkl"][at % len(parts["data.pkl"])] = byte
        write_archive(path, **{"data": bytes(parts.pop("data.pkl"))}, **{k: bytes(v) for k, v in parts.items()})
    else:
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] = byte
        path.write_bytes(raw)
    try:
        tensors = read_pickle(path)
    except InputError:
        return
    for tensor in tensors:
        if tensor.shape:
            assert tensor.read().shape == tensor.shape


def test_a_part_that_ends_behind_the_file_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3, 2)}, path)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x/data/0").header_offset
    raw = bytearray(path.read_bytes())
    raw[start + 29] = 255  # the length of its header's extra field
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.bin: x/data/0: expected 24 bytes at \d+, found -?\d+"):
        read_pickle(path)


def test_safetensors_and_pickles_give_one_bank(tmp_path: Path, hf: Path, base: Path, plain: Path):
    folder = Path(shutil.copytree(plain, tmp_path / "pickled"))
    pickle_weights(folder, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    banks = [tmp_path / "one", tmp_path / "two"]
    for bank, source in zip(banks, (plain, folder), strict=True):
        import_adapters(bank, base, {"a": source})
    one, two = (load_file(bank / "weights.safetensors") for bank in banks)
    assert all(torch.equal(one[key], two[key]) for key in one)
