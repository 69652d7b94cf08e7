"""More than a thousand broken folders: each gives what peft or transformers gives, or is refused in one line.

Nothing is executed, nothing is written outside the destination, no import asks for much memory.
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_peft
from transformers import LlamaForCausalLM
from transformers.utils import logging

from converters import export_base, import_adapters, import_base
from converters.hf_llama import module_name
from meteora_jax.config import ENDS, BankConfig, InputError, read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 6, 7, 8, 9, 300, 17]])
MUTANTS = 1050  # adapters, of all kinds together
MEMORY = 48 << 10  # KiB that the high-water mark may rise in one import
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4, 3.5, -2.5, float("nan"), float("inf"), 10**30, "", "x", "none", "all", "(",
    "lora_only", "all-linear", "q_proj", ".*q_proj", ".*", "gaussian", "pissa", "eva", "CAUSAL_LM", "SEQ_CLS",
    [], [0], [1], [7], ["q_proj"], ["q_proj", "v_proj"], ["lm_head"], ["embed_tokens"], [None], {},
    {"q_proj": 2}, {"layers.1.*": 3}, {"(": 2}, {"q_proj": "x"}, {"q_proj": -1}, {"x": {"y": []}},
]  # fmt: skip


class Bomb:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


@dataclasses.dataclass
class Folder:
    """A sound adapter in memory, to be broken and written."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    pickled: bool
    after: list[Callable[[Path], None]] = dataclasses.field(default_factory=list)  # breaks the written files

    def write(self, path: Path) -> None:
        path.mkdir()
        (path / CONFIG).write_text(json.dumps(self.config))
        if self.pickled:
            torch.save(self.tensors, path / PICKLED)
        else:
            sound = {k: v.contiguous() for k, v in self.tensors.items() if isinstance(v, torch.Tensor)}
            save_file(sound, path / WEIGHTS)
        for damage in self.after:
            damage(path)


def any_key(folder: Folder, rng: random.Random) -> str:
    return rng.choice(sorted(folder.tensors))


def drop(folder: Folder, rng: random.Random) -> None:
    folder.tensors.pop(any_key(folder, rng))


def rename(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    at = rng.randrange(len(key))
    letter = rng.choice("abAB.019_ \n/é")
    folder.tensors[key[:at] + letter + key[at + rng.randint(0, 1) :]] = folder.tensors.pop(key)


def respell(folder: Folder, rng: random.Random) -> None:
    old, new = rng.choice([("base_model.model.", ""), (".weight", ".default.weight"), ("base_model.", "")])
    folder.tensors = {k.replace(old, new): v for k, v in folder.tensors.items()}


def duplicate(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    old, new = rng.choice([("layers.0", "layers.1"), (".weight", ".default.weight"), ("base_model.model.", "")])
    folder.tensors[key.replace(old, new)] = folder.tensors[key].clone()


def swap(folder: Folder, rng: random.Random) -> None:
    one, other = any_key(folder, rng), any_key(folder, rng)
    folder.tensors[one], folder.tensors[other] = folder.tensors[other], folder.tensors[one]


def move_layer(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    layer = rng.choice(["2", "01", "-1", "99999999999999999999", "x", ""])
    folder.tensors[key.replace("layers.1", f"layers.{layer}")] = folder.tensors.pop(key)


def reshape(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    t = folder.tensors[key]
    shapes = [t.T if t.ndim == 2 else t, t[:1], t[:0], t.flatten(), t[None], torch.cat([t, t]), t.sum()]
    folder.tensors[key] = rng.choice(shapes).clone()


def poison(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    folder.tensors[key] = folder.tensors[key].clone()
    folder.tensors[key].view(-1)[rng.randrange(folder.tensors[key].numel())] = rng.choice([torch.nan, torch.inf, 1e30])


def retype(folder: Folder, rng: random.Random) -> None:
    key = any_key(folder, rng)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn]
    folder.tensors[key] = folder.tensors[key].to(rng.choice(kinds[:-1] if folder.pickled else kinds))


def extra(folder: Folder, rng: random.Random) -> None:
    names = [
        "x", "lm_head.weight", "model.embed_tokens.weight", "model.embed_tokens.lora_embedding_A", "model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector", "model.layers.0.mlp.up_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.rotary_emb.lora_A.weight", "",
        "../../outside", "lm_head.lora_A.weight", "lm_head.modules_to_save.weight", "a" * 10_000,
    ]  # fmt: skip
    folder.tensors[f"base_model.model.{rng.choice(names)}"] = torch.ones(rng.choice([(1,), (16,), (320, 16), (2, 16)]))


def set_known(folder: Folder, rng: random.Random) -> None:
    folder.config[rng.choice([f.name for f in dataclasses.fields(LoraConfig)])] = rng.choice(VALUES)


def set_weighty(folder: Folder, rng: random.Random) -> None:
    keys = (
        "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform use_dora"
    )
    folder.config[rng.choice([*keys.split(), "layers_pattern", "lora_bias", "modules_to_save"])] = rng.choice(VALUES)


def set_unknown(folder: Folder, rng: random.Random) -> None:
    folder.config[rng.choice(["use_mirrors", "lora_gamma", "", "é", "r "])] = rng.choice(VALUES)


def unset(folder: Folder, rng: random.Random) -> None:
    folder.config.pop(rng.choice(sorted(folder.config)))


def flip_bytes(folder: Folder, rng: random.Random) -> None:
    file, count, seed = rng.choice([CONFIG, WEIGHTS, WEIGHTS]), rng.randint(1, 4), rng.random()
    folder.after.append(lambda path: damage_bytes(path, file, count, seed))


def weights_of(path: Path) -> Path:
    return path / WEIGHTS if (path / WEIGHTS).exists() else path / PICKLED


def damage_bytes(path: Path, file: str, count: int, seed: float) -> None:
    rng = random.Random(seed)
    target = path / CONFIG if file == CONFIG else weights_of(path)
    if not target.is_file():  # another mutation was here first
        return
    raw = bytearray(target.read_bytes())
    # The description is at the start of one format and near the middle of the other: hit it more often than values.
    reach = len(raw) if target.suffix == ".bin" else min(len(raw), 1500)
    for _ in range(count if raw else 0):
        raw[rng.randrange(reach)] = rng.randrange(256)
    target.write_bytes(raw)


def truncate(folder: Folder, rng: random.Random) -> None:
    share, file = rng.random(), rng.choice([CONFIG, WEIGHTS])

    def cut(path: Path) -> None:
        target = path / CONFIG if file == CONFIG else weights_of(path)
        if target.is_file():
            target.write_bytes(target.read_bytes()[: int(share * target.stat().st_size)])

    folder.after.append(cut)


def oversize(folder: Folder, rng: random.Random) -> None:
    """Headers that claim more than there is."""
    size, shape = rng.choice([2**62, 2**40, 99_999_999, 10**7]), rng.choice([[2**40, 2**40], [10**12], [2**31, 0]])
    kind = rng.choice(["length", "shape", "deep", "wide"])

    def damage(path: Path) -> None:
        header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
        texts = {
            "length": b"{}",
            "shape": json.dumps(header).encode(),
            "deep": b'{"a":' * 100_000,
            "wide": b"{" + b",".join(b'"%d":[]' % i for i in range(50_000)) + b"}",
        }
        text = texts[kind]
        length = size if kind == "length" else len(text)
        (path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + bytes(8))
        (path / PICKLED).unlink(missing_ok=True)

    folder.after.append(damage)


def bomb(folder: Folder, rng: random.Random) -> None:
    folder.pickled = True
    kind = rng.choice(["value", "key", "state", "archive", "memo", "path", "legacy"])

    def damage(path: Path) -> None:
        trap = Bomb(path.parents[1] / "trap")
        target = path / PICKLED
        if kind in ("value", "key"):
            extra: dict[Any, Any] = {"x": trap} if kind == "value" else {trap: torch.ones(1)}
            torch.save(folder.tensors | extra, target)
        elif kind == "state":
            state = torch.nn.Linear(2, 2).state_dict()
            state._metadata = {"x": trap}
            torch.save(state, target)
        elif kind == "legacy":
            torch.save({"x": trap}, target, _use_new_zipfile_serialization=False)
        else:
            buffer = io.BytesIO()
            torch.save(folder.tensors, buffer)
            with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(target, "w") as archive:
                for info in source.infolist():
                    data = source.read(info)
                    if info.filename.endswith("data.pkl") and kind == "memo":
                        data = b"\x80\x02r\xff\xff\xff\x7f" + data[2:]
                    name = f"../../{info.filename}" if kind == "path" else info.filename
                    method = zipfile.ZIP_DEFLATED if kind == "archive" else zipfile.ZIP_STORED
                    archive.writestr(name, data * (1000 if kind == "archive" else 1), method)

    folder.after.append(damage)


def links_and_folders(folder: Folder, rng: random.Random) -> None:
    file, kind = rng.choice([CONFIG, WEIGHTS]), rng.choice(["folder", "loop", "empty", "gone"])

    def damage(path: Path) -> None:
        target = path / CONFIG if file == CONFIG else weights_of(path)
        target.unlink()
        if kind == "folder":
            target.mkdir()
        elif kind == "loop":
            target.symlink_to(target.name)
        elif kind == "empty":
            target.touch()

    folder.after.append(damage)


def other_format(folder: Folder, rng: random.Random) -> None:
    """The other kind of file beside, with other values: peft reads the safetensors."""
    other, pickled = {k: torch.ones_like(v) for k, v in folder.tensors.items()}, folder.pickled

    def beside(path: Path) -> None:
        if pickled:
            save_file({k: v.contiguous() for k, v in folder.tensors.items()}, path / WEIGHTS)
        torch.save(other, path / PICKLED)

    folder.after.append(beside)


def saved_end(folder: Folder, rng: random.Random) -> None:
    """A whole embedding or head under one of the names that peft gives them."""
    module, place = rng.choice(["model.embed_tokens", "lm_head"]), rng.choice(["", ".base_layer", ".modules_to_save"])
    folder.tensors[f"base_model.model.{module}{place}.weight"] = torch.ones(rng.choice([320, 320, 322]), 16)
    folder.config["modules_to_save"] = rng.choice([None, [module], [module.rpartition(".")[2]]])


def null_settings(folder: Folder, rng: random.Random) -> None:
    off = [k for k, v in folder.config.items() if v in (False, "none", [], {})]
    folder.config |= dict.fromkeys(rng.sample(sorted(off), k=min(3, len(off))))


MUTATIONS = [
    drop, rename, respell, duplicate, swap, move_layer, reshape, poison, retype, extra, set_known, set_known, set_known,
    set_weighty, set_weighty, set_unknown, unset, flip_bytes, flip_bytes, truncate, oversize, bomb, links_and_folders,
    other_format, saved_end, null_settings,
]  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "bias": {"lora_bias": True, "target_modules": ["v_proj", "up_proj"]},
    "layers": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]}},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return tiny_llama(tmp_path_factory.mktemp("fuzz"), attention_bias=True, mlp_bias=True, **sizes)[1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """peft and transformers say a lot about broken folders."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(level)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits[0].numpy()


def bank_logits(model: LlamaForCausalLM, bank: Path) -> np.ndarray:
    """Logits of a torch model whose weights are changed as bank.json's format says."""
    model = copy.deepcopy(model)
    tensors = load_file(bank / "weights.safetensors")
    config = BankConfig.from_json(read_json(bank / "bank.json"), "bank.json")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == config.weight_shapes()
    with torch.no_grad():
        for p in config.ranks:
            for layer in range(config.num_layers):
                part = lambda kind, p=p, layer=layer: tensors[f"{p}.{kind}"][layer, 0].float()  # noqa: E731
                linear: Any = model.get_submodule(f"model.layers.{layer}.{module_name(p)}")
                linear.weight += part("scale") * (part("b").T @ part("a"))
                if p in config.dora:
                    linear.weight *= 1 + part("dora")[:, None]
                if p in config.lora_bias:
                    linear.bias += part("scale") * part("bias")
        for end, held in config.ends.items():
            weight: Any = model.get_submodule(ENDS[end]).weight  # [V, D]
            if held.rank:
                left, right = ("a", "b") if end == "embed" else ("b", "a")
                weight += tensors[f"{end}.scale"][0] * tensors[f"{end}.{left}"][0].T @ tensors[f"{end}.{right}"][0]
            for row, token in enumerate(held.tokens[0]):
                weight[token] = tensors[f"{end}.rows"][0, row]
    return logits(model)


def respelled(path: Path) -> Path:
    """The folder with its keys as today's peft writes them: it skips, in silence, those that it does not know."""
    copied = Path(shutil.copytree(path, path.with_name("respelled")))
    pickled = not (path / WEIGHTS).exists()
    tensors = torch.load(path / PICKLED) if pickled else load_file(path / WEIGHTS)
    keys = {k: f"base_model.model.{k.removeprefix('base_model.model.').replace('.default', '')}" for k in tensors}
    (copied / PICKLED).unlink(missing_ok=True)
    save_file({keys[k]: t.clone() for k, t in tensors.items()}, copied / WEIGHTS)
    return copied


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.lstat().st_size for p in root.rglob("*")}


def attempt(call: Callable[[], Any], root: Path, dest: Path) -> InputError | None:
    """Runs an import: refused in one line, or done; nothing else changes below `root`, and memory stays flat."""
    before, peak = tree(root), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = None
    try:
        call()
    except InputError as e:
        refusal = e
    assert refusal is None or ("\n" not in str(refusal) and 10 < len(str(refusal)) < 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY
    after = {k: v for k, v in tree(root).items() if not k.startswith(str(dest.relative_to(root)))}
    assert after == before
    assert dest.exists() == (refusal is None)
    return refusal


@pytest.mark.parametrize("kind", ADAPTERS)
def test_mutated_adapters(tmp_path: Path, hf: Path, kind: str):
    with quiet():
        sound = tiny_peft(tmp_path, hf, "sound", **{"r": 2, "target_modules": ["q_proj", "v_proj"], **ADAPTERS[kind]})
        model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    base = tmp_path / "base"
    import_base(hf, base)
    tensors, config = load_file(sound / WEIGHTS), json.loads((sound / CONFIG).read_text())
    rng, seen = random.Random(kind), Counter()
    for i in range(MUTANTS // len(ADAPTERS)):
        mutant = Folder(dict(tensors), copy.deepcopy(config), rng.random() < 0.3)
        mutations = rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2]))
        for mutate in mutations:
            if mutant.tensors:
                mutate(mutant, rng)
        root = tmp_path / str(i)
        root.mkdir()
        mutant.write(root / "in")
        refusal = attempt(lambda r=root: import_adapters(r / "out", base, {"a": r / "in"}), root, root / "out")
        changed = {k: v for k, v in mutant.config.items() if k not in config or config[k] != v}
        what = f"{kind} {i}: {[m.__name__ for m in mutations]} {changed}"
        seen["refused" if refusal else "loaded"] += 1
        if refusal is None:
            found = bank_logits(model, root / "out")
            oracle = respelled(root / "in")
            with quiet():
                try:
                    expected = logits(PeftModel.from_pretrained(copy.deepcopy(model), oracle))
                    seen["compared"] += 1
                except Exception:  # peft falls over a setting that we ignore: then it must not have mattered
                    shutil.copyfile(sound / CONFIG, oracle / CONFIG)
                    expected = logits(PeftModel.from_pretrained(copy.deepcopy(model), oracle))
            assert np.allclose(found, expected, rtol=1e-5, atol=1e-4), what
        shutil.rmtree(root)
    assert not (tmp_path / "trap").exists()
    assert seen["refused"] >= 80
    assert seen["compared"] >= 15


ENDS_MUTANTS = 120


def test_mutated_ends(tmp_path: Path):
    """Whole embeddings and heads on tied and untied bases: `--replace` makes the base on which peft's adapter acts."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    rng, seen = random.Random(1), Counter()
    bases = [
        tiny_llama(tmp_path, num_key_value_heads=1, folder=f"tied-{tied}", tie_word_embeddings=tied, **sizes)[1]
        for tied in (True, False)
    ]
    with quiet():
        sound = tiny_peft(tmp_path, bases[0], "sound", r=2, target_modules=["q_proj"])
        models = [LlamaForCausalLM.from_pretrained(base, attn_implementation="eager") for base in bases]
    config = json.loads((sound / CONFIG).read_text())
    tensors = load_file(sound / WEIGHTS)
    values = [torch.randn(320, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for i in range(ENDS_MUTANTS):
        root, which = tmp_path / str(i), rng.randrange(2)
        saved, modules = {}, []
        for module in rng.sample(list(ENDS.values()), k=rng.choice([1, 1, 2])):
            apart, value = (
                rng.random() < 0.6,
                rng.choice([*values, models[which].get_submodule(module).weight.detach()]),
            )
            modules += [rng.choice([module, module.rpartition(".")[2]])] if apart else []
            for place in rng.choice([["modules_to_save."], ["", "modules_to_save."], [""]]) if apart else [""]:
                saved[f"base_model.model.{module}.{place}weight"] = value.clone()
        mutant = Folder({**tensors, **saved}, {**config, "modules_to_save": modules or None}, pickled=False)
        root.mkdir()
        mutant.write(root / "in")
        call = lambda r=root, base=bases[which]: import_base(base, r / "base", replace=r / "in")  # noqa: E731
        refusal = attempt(call, root, root / "base")
        if refusal is not None:  # two values of one weight
            assert (which, len(saved), modules) == (0, 2, []), refusal
            seen["refused"] += 1
            continue
        import_adapters(root / "bank", root / "base", {"a": root / "in"})
        export_base(root / "base", root / "back")
        with quiet():
            found = bank_logits(
                LlamaForCausalLM.from_pretrained(root / "back", attn_implementation="eager"), root / "bank"
            )
            oracle = {k.replace(".modules_to_save.", "."): v for k, v in mutant.tensors.items()}
            save_file(oracle, root / "in" / WEIGHTS)  # the spelling that peft itself reads
            expected = logits(PeftModel.from_pretrained(copy.deepcopy(models[which]), root / "in"))
        what = f"{i} tied {which == 0}: {sorted(saved)}, {modules}"
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-4), what
        seen[which, len(saved)] += 1
        shutil.rmtree(root)
    assert min(seen.values()) >= 3, seen


BASE_MUTANTS = 220
PATHS = [
    "../outside.safetensors", "/etc/passwd", "/etc/x.safetensors", "..", ".", "", "a/b.safetensors", "x\0.safetensors",
    "model.bin", ".hidden.safetensors", "C:\\x.safetensors", "gone.safetensors", 3, None, [], {},
    "é" * 300 + ".safetensors",
]  # fmt: skip


def two_places(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Rotary settings in one or two of the places that may hold them, which may contradict each other."""
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"}, {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8},
    ]  # fmt: skip
    settings = rng.choice(kinds) | {"rope_theta": rng.choice([100.0, 10000.0])}
    found: dict[str, Any] = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    places = rng.sample(["rope_parameters", "rope_scaling", "rope_theta"], k=rng.choice([1, 2, 2]))
    for place in places:
        found[place] = settings["rope_theta"] if place == "rope_theta" else dict(settings)
    if len(places) > 1 and rng.random() < 0.5:
        name = rng.choice([place for place in places if place != "rope_theta"])
        key = rng.choice([key for key in found[name] if key != "low_freq_factor"])
        found[name][key] = "linear" if "type" in key else found[name][key] * 2
    return found


def mutate_base(folder: Path, rng: random.Random) -> str:
    """Breaks one thing in a sharded Hugging Face folder; returns what."""
    kinds = [
        "config",
        "config",
        "config",
        "path",
        "index",
        "shard",
        "key",
        "tokenizer",
        "rope",
        "tie",
        "buffer",
        "file",
    ]
    kind = rng.choice(kinds)
    shards = sorted(folder.glob("*.safetensors"))
    if kind in ("rope", "tie"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"tie_word_embeddings": True} if kind == "tie" else two_places(config, rng)
        (folder / "config.json").write_text(json.dumps(config))
        return f"{kind} {config}"
    if kind == "buffer":
        name = rng.choice(["model.layers.1.self_attn.rotary_emb.", "model.rotary_emb.", "rotary_emb.", "x."])
        name += rng.choice(["inv_freq", "cos_cached", "sin_cached", "weight"])
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = shards[0].name
        (folder / INDEX).write_text(json.dumps(index))
        save_file({**load_file(shards[0]), name: torch.ones(4)}, shards[0], {"format": "pt"})
        return f"buffer {name}"
    if kind == "file":
        name, factor = rng.choice(["model.safetensors", "pytorch_model.bin"]), rng.choice([1.0, 0.5])
        tensors = {k: t * factor for shard in shards for k, t in load_file(shard).items()}
        if name == "pytorch_model.bin":
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, {"format": "pt"})
        return f"file {name} {factor}"
    if kind == "config":
        config = json.loads((folder / "config.json").read_text())
        key = rng.choice(sorted(config))
        value = rng.choice(VALUES)
        # transformers takes no whole number where it expects a fraction; we do.
        config[key] = float(value) if type(value) is int and isinstance(config[key], float) else value
        (folder / "config.json").write_text(json.dumps(config))
        return f"config {key} {config[key]!r}"
    index = json.loads((folder / INDEX).read_text())
    if kind == "path":
        key = rng.choice(sorted(index["weight_map"]))
        index["weight_map"][key] = rng.choice(PATHS)
    elif kind == "key":
        key = rng.choice(sorted(index["weight_map"]))
        name = index["weight_map"].pop(key)
        if rng.random() < 0.5:
            index["weight_map"][rng.choice([f"{key}x", key.replace("layers.1", "layers.2")])] = name
    elif kind == "index":
        index = rng.choice([[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, 3])
    if kind in ("path", "key", "index"):
        (folder / INDEX).write_text(json.dumps(index))
        return kind
    target = rng.choice([folder / "tokenizer.json"] if kind == "tokenizer" else shards)
    raw = bytearray(target.read_bytes())
    change = rng.choice(["cut", "flip", "gone", "length"])
    if change == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif change == "flip":
        raw[rng.randrange(min(len(raw), 900))] = rng.randrange(256)
    elif change == "length":
        raw[:8] = rng.choice([2**62, 2**35, 99_000_000]).to_bytes(8, "little")
    target.unlink()
    if change != "gone":
        target.write_bytes(raw)
    return f"{kind} {change}"


def test_mutated_bases(tmp_path: Path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    _, sound = tiny_llama(tmp_path, num_key_value_heads=1, max_shard_size=20_000, **sizes)
    assert (sound / INDEX).exists()
    rng, seen = random.Random(0), Counter()
    for i in range(BASE_MUTANTS):
        root = tmp_path / str(i)
        shutil.copytree(sound, root / "in")
        what = mutate_base(root / "in", rng)
        refusal = attempt(lambda r=root: import_base(r / "in", r / "out"), root, root / "out")
        seen["refused" if refusal else "loaded"] += 1
        if refusal is None:
            export_base(root / "out", root / "back")
            with quiet():
                found = logits(LlamaForCausalLM.from_pretrained(root / "back", attn_implementation="eager"))
                try:
                    theirs = LlamaForCausalLM.from_pretrained(root / "in", attn_implementation="eager")
                    expected = logits(theirs.float())
                    seen["compared"] += 1
                except Exception:  # transformers falls over a setting that we ignore: it must not have mattered
                    shutil.copyfile(sound / "config.json", root / "in" / "config.json")
                    expected = logits(LlamaForCausalLM.from_pretrained(root / "in", attn_implementation="eager"))
            assert np.allclose(found, expected, rtol=1e-5, atol=1e-4), what
        shutil.rmtree(root)
    assert seen["refused"] >= 60
    assert seen["compared"] >= 15
