"""Broken bases, and bases with the embeddings that adapters saved: transformers' or peft's logits, or one line."""

import copy
import json
import random
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from broken import CONFIG, INDEX, VALUES, WEIGHTS, Folder, attempt, bank_logits, logits, quiet
from extent import examples
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

from converters import export_base, import_adapters, import_base
from meteora_jax.config import ENDS

ENDS_MUTANTS = examples(24, 120)


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
        call = partial(import_base, bases[which], root / "base", replace=root / "in")
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
    assert min(seen.values()) >= examples(1, 3), seen


BASE_MUTANTS = examples(40, 220)
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
    assert seen["refused"] >= examples(10, 60)
    assert seen["compared"] >= examples(1, 15)
