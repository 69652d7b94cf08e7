"""More than a thousand broken folders: each gives what peft or transformers gives, or is refused in one line.

Nothing is executed, nothing is written outside the destination, no import asks for much memory.
"""

import copy
import dataclasses
import io
import json
import os
import random
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import CONFIG, PICKLED, VALUES, WEIGHTS, Folder, attempt, bank_logits, logits, quiet
from extent import examples
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

from converters import import_adapters, import_base

MUTANTS = examples(70, 1050)  # adapters, of all kinds together


class Bomb:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


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


def respelled(path: Path) -> Path:
    """The folder with its keys as today's peft writes them: it skips, in silence, those that it does not know."""
    copied = Path(shutil.copytree(path, path.with_name("respelled")))
    pickled = not (path / WEIGHTS).exists()
    tensors = torch.load(path / PICKLED) if pickled else load_file(path / WEIGHTS)
    keys = {k: f"base_model.model.{k.removeprefix('base_model.model.').replace('.default', '')}" for k in tensors}
    (copied / PICKLED).unlink(missing_ok=True)
    save_file({keys[k]: t.clone() for k, t in tensors.items()}, copied / WEIGHTS)
    return copied


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
    assert seen["refused"] >= examples(3, 80)
    assert seen["compared"] >= examples(1, 15)
