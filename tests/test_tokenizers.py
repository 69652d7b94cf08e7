"""Tokenizers of bases and encoders: those that transformers.AutoTokenizer reads, and sooner."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf_files import sentencepiece_metadata
from meshes import environment
from tiny import CORPUS, edit_json, tiny_tokenizer

from converters.gguf_tokenizer import build_tokenizer
from meteora_jax import text
from meteora_jax.text import CLASSES, load_tokenizer

TEXTS = (*CORPUS[:3], "  two  spaces\n\n\ttab", "don't 'S it", "1234567", "", "Ünï 🙂 <|im_end|>x</s>y")
CHAT = [{"role": "user", "content": "Is 7 odd?"}, {"role": "assistant", "content": " yes "}]
BASES = ("llama", "mistral", "qwen2", "qwen3")
NAMES = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer")
HEAVY = {
    "torch", "tensorflow", "accelerate", "sklearn", "scipy", "pandas", "pyarrow", "datasets", "nltk", "grain", "orbax",
    "matplotlib", "fastapi", "sympy",
}  # fmt: skip


def write(folder: Path, kind: str, family: str, **settings: Any) -> Path:
    """A folder with a tokenizer of bytes or of SentencePiece's pieces, and the configuration of a family of models."""
    tiny_tokenizer().save_pretrained(folder)
    if kind == "pieces":
        build_tokenizer(sentencepiece_metadata(), "x", 480, 100).write(folder)
    edit_json(folder / "tokenizer_config.json", **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def assert_same(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.special_tokens_map, ours.all_special_ids) == (theirs.special_tokens_map, theirs.all_special_ids)
    assert (ours.model_max_length, ours.padding_side) == (theirs.model_max_length, theirs.padding_side)
    for said in TEXTS:
        ids = theirs(said)["input_ids"]
        assert ours(said)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.chat_template == theirs.chat_template
    if ours.chat_template is not None:
        for prompt in (False, True):
            turns = [t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt) for t in (ours, theirs)]
            assert turns[0] == turns[1]


def sooner(folder: Path) -> bool:
    """Whether a folder's tokenizer is read without AutoTokenizer."""
    return text._class_name(folder) != "AutoTokenizer"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("family", BASES)
def test_a_base_s_tokenizer_is_autotokenizer_s(tmp_path, family, kind):
    found = {}
    for name in NAMES:
        assert_same(folder := write(tmp_path / name, kind, family, tokenizer_class=name))
        found[name] = sooner(folder)
    known = {n for n in NAMES if n.removesuffix("Fast") in CLASSES[family]}
    if (family, kind) == ("llama", "bytes"):
        known -= {"LlamaTokenizer", "LlamaTokenizerFast"}
    if family == "mistral" and find_spec("mistral_common"):
        known = set()
    assert {name for name, is_soon in found.items() if is_soon} == known


@pytest.mark.parametrize("family", sorted(CLASSES.keys() - set(BASES)))
def test_an_encoder_s_tokenizer_is_autotokenizer_s(tmp_path, family):
    (name,) = CLASSES[family]
    made = getattr(transformers, name)
    pieces = ["<s>", "<pad>", "</s>", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<mask>", "is", "##s", *"aehioqst7"]
    words = made(vocab={piece: i for i, piece in enumerate(pieces)}) if family in ("bert", "mpnet") else made()
    words.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert_same(tmp_path)
    assert sooner(tmp_path)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, {}),
        ({"tokenizer_class": ...}, {}),
        ({"tokenizer_class": 3}, {}),
        ({"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}, {}),
        ({}, {"model_type": "gpt2"}),
        ({}, {"model_type": ["llama"]}),
        ({}, {"model_type": ...}),
        ({}, None),
    ],
)
def test_what_is_not_plain_is_left_to_autotokenizer(tmp_path, settings, config):
    write(tmp_path, "bytes", "llama", **settings)
    if config is None:
        (tmp_path / "config.json").unlink()
    else:
        edit_json(tmp_path / "config.json", **config)
    assert not sooner(tmp_path)


def test_mistral_s_own_package_is_left_to_autotokenizer(tmp_path, monkeypatch):
    folder = write(tmp_path, "pieces", "mistral")
    for installed in (False, True):
        monkeypatch.setattr(text, "find_spec", lambda name, found=installed: found and name == "mistral_common")
        assert sooner(folder) is not installed


COMMAND = """
import sys
from meteora_jax.cli import main
main(sys.argv[1:])
print(sorted({name.partition(".")[0] for name in sys.modules}))
import torch  # the user's own, after ours
import meteora_jax as mj
tokens = mj.load(sys.argv[sys.argv.index("--base") + 1], dtype="float32").tokenizer("The", return_tensors="pt")
print(type(tokens["input_ids"]) is torch.Tensor)
"""


def test_a_command_imports_what_it_needs(world):
    """Eleven of its seventeen seconds of imports were PyTorch, on a machine with GPUs. It may come later."""
    folders = [word for key in ("base", "bank", "gates") for word in (f"--{key}", str(world[key]))]
    command = [sys.executable, "-c", COMMAND, "generate", "Is 7 odd?", "--chat", *folders, "--max-new-tokens", "2"]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment(1), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, imported, with_torch = run.stdout.splitlines()
    assert {"meteora_jax", "transformers", "jinja2"} <= (modules := set(json.loads(imported.replace("'", '"'))))
    assert not modules & HEAVY
    assert with_torch == "True"
