"""Meta's original folders: values, logits and tokenizers equal plain transcriptions of Meta's model and formats."""

import base64
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from gguf_files import sentencepiece_metadata
from safetensors.torch import load_file
from tiny import CORPUS, assert_refused, edit_json, hf_weights, tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer
from transformers.utils.sentencepiece_model_pb2_new import ModelProto

import meteora_jax as mj
from converters import import_base
from converters.gguf_tokenizer import build_tokenizer
from meteora_jax.config import read_json
from meteora_jax.io import hf_config

ROW = [5, 6, 7, 8, 9, 300, 17]
NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as Meta orders them: the two rotary halves of a head pair by pair."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def meta_tensors(model: Any) -> dict[str, torch.Tensor]:
    config, tensors = model.config, {}
    for key, value in model.state_dict().items():
        module = key.removesuffix(".weight")
        if module in TOP:
            tensors[f"{TOP[module]}.weight"] = value
            continue
        _, _, layer, name = module.split(".", 3)
        if name == "self_attn.q_proj":
            value = interleave(value, config.num_attention_heads)
        if name == "self_attn.k_proj":
            value = interleave(value, config.num_key_value_heads)
        tensors[f"layers.{layer}.{NAMES[name]}.weight"] = value
    tensors["rope.freqs"] = torch.ones(config.head_dim // 2)
    return tensors


def cut(tensors: dict[str, torch.Tensor], count: int, vocabulary: bool) -> list[dict[str, torch.Tensor]]:
    """Model-parallel shards, as fairscale's layers (`vocabulary` off) or Llama 3's (on) cut them."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for key, value in tensors.items():
        columns = ("attention.wo.weight", "feed_forward.w2.weight", *(() if vocabulary else ("tok_embeddings.weight",)))
        whole = value.ndim < 2
        parts = [value] * count if whole else value.chunk(count, 1 if key.endswith(columns) else 0)
        for shard, part in zip(shards, parts, strict=True):
            shard[key] = part.clone()
    return shards


def sentencepiece_model() -> bytes:
    metadata = sentencepiece_metadata()
    model = ModelProto()
    model.trainer_spec.model_type = 2
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    return model.SerializeToString()


def ranks() -> dict[bytes, int]:
    """A byte-level vocabulary as tiktoken writes it: bytes first, then what merges make, in their order."""
    backend = tiny_tokenizer().backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    letters = {v: k for k, v in bytes_to_letters().items()}
    special = {t.content for t in backend.get_added_tokens_decoder().values()}
    tokens = [t for t in sorted(model["vocab"], key=model["vocab"].__getitem__) if t not in special]
    return {bytes(letters[c] for c in token): i for i, token in enumerate(tokens)}


def bytes_to_letters() -> dict[int, str]:
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    count = itertools.count()
    return {b: chr(b) if b in own else chr(256 + next(count)) for b in range(256)}


def write_meta(
    tmp_path: Path, *, count: int = 1, vocabulary: bool = True, tiktoken: bool = False, params: Any = None, **sizes: Any
) -> tuple[Any, Path]:
    """(the torch model, Meta's folder with its weights)."""
    sizes = {"vocab_size": len(ranks()) + 256 if tiktoken else 480, "intermediate_size": 128, **sizes}
    model, _ = tiny_llama(tmp_path, num_key_value_heads=2, **sizes)
    folder = tmp_path / "meta"
    folder.mkdir()
    for i, shard in enumerate(cut(meta_tensors(model), count, vocabulary)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    own = {
        "dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 32,
        **(params or {}),
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(own))
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())
    (folder / "tokenizer.model").write_bytes(lines if tiktoken else sentencepiece_model())
    return model, folder


def meta_logits(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> np.ndarray:
    """Meta's model in plain torch: rotation by complex numbers over neighbouring pairs."""
    width = params["dim"] // params["n_heads"]
    freqs = params["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    if params.get("use_scaled_rope"):
        low, high, old = 8192.0, 8192 / 4.0, 8192
        scaled = []
        for freq in freqs:
            length = 2 * torch.pi / freq
            smooth = (old / length - 1) / (4 - 1)
            middle = (1 - smooth) * freq / params["rope_scaling_factor"] + smooth * freq
            scaled.append(freq if length < high else freq / params["rope_scaling_factor"] if length > low else middle)
        freqs = torch.stack(scaled)
    turns = torch.polar(torch.ones(len(ROW), width // 2).double(), torch.outer(torch.arange(len(ROW)).double(), freqs))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    t = {key: value.double() for key, value in tensors.items()}
    x = t["tok_embeddings.weight"][ROW]
    mask = torch.full((len(ROW), len(ROW)), -torch.inf).triu(1)
    for i in range(params["n_layers"]):

        def w(name, i=i):
            return t[f"layers.{i}.{name}.weight"]

        h = norm(x, w("attention_norm"))
        q, k, v = ((h @ w(f"attention.w{n}").T).reshape(len(ROW), -1, width) for n in "qkv")
        repeat = params["n_heads"] // params["n_kv_heads"]
        k, v = (z.repeat_interleave(repeat, 1) for z in (rotate(k), v))
        scores = torch.einsum("thd,shd->hts", rotate(q), k) / width**0.5 + mask
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w("attention.wo").T
        h = norm(x, w("ffn_norm"))
        gate = torch.nn.functional.silu(h @ w("feed_forward.w1").T)
        x = x + (gate * (h @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
    return (norm(x, t["norm.weight"]) @ t["output.weight"].T).numpy()


CASES: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama2_shards": {"count": 2, "vocabulary": False},
    "llama3": {"tiktoken": True, "params": {"rope_theta": 500000.0}},
    "llama3_shards": {"count": 2, "tiktoken": True, "params": {"rope_theta": 500000.0}},
    "llama31": {
        "tiktoken": True,
        "params": {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8, "max_seq_len": 512},
    },
    "ffn": {"intermediate_size": 176, "params": {"ffn_dim_multiplier": 1.3, "multiple_of": 16}},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_logits(tmp_path: Path, case: str):
    model, folder = write_meta(tmp_path, **CASES[case])
    import_base(folder, tmp_path / "base")
    found, expected = load_file(tmp_path / "base" / "weights.safetensors"), hf_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    params = {"rope_theta": 10000.0, **json.loads((folder / "params.json").read_text())}
    ours = np.asarray(mj.load(tmp_path / "base", dtype="float32").logits([ROW]))[0]
    assert np.abs(ours - meta_logits(meta_tensors(model), params)).max() <= 1e-4


def test_token_ids_and_context(tmp_path: Path):
    for name, options, bos, eos, context in (
        ("two", {}, 1, (2,), 4096),
        ("three", {"tiktoken": True, "params": {"max_seq_len": 77}}, 317, (318, 325, 326), 77),
    ):
        (tmp_path / name).mkdir()
        _, folder = write_meta(tmp_path / name, **options)
        import_base(folder, tmp_path / name / "base", dtype="bfloat16")
        config = hf_config.from_hf(read_json(tmp_path / name / "base" / "config.json"))
        assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (bos, eos, context)


TEXTS = (*CORPUS, "  two  spaces\n\n\ttab", "don't 'S it", "1234567", "", "a\r\n b", "<|eot_id|>x")


def test_sentencepiece(tmp_path: Path):
    _, folder = write_meta(tmp_path)
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")  # Llama 2's download: in the folder above
    import_base(folder, tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    want = build_tokenizer(sentencepiece_metadata(), "x", 480, 100).tokenizer
    for text in TEXTS:
        assert ours(text)["input_ids"] == want.encode(text).ids


def test_tiktoken(tmp_path: Path):
    _, folder = write_meta(tmp_path, tiktoken=True)
    import_base(folder, tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in TEXTS[:-1]:
        ids = ours(text)["input_ids"]
        assert ids == [317, *tiktoken_encode(text)]
        assert ours.decode(ids, skip_special_tokens=True) == text
    assert ours("<|eot_id|>x")["input_ids"] == [317, 326, *tiktoken_encode("x")]
    assert ours.convert_ids_to_tokens([317, 318, 319, 322, 323, 328]) == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_2|>",
        "<|start_header_id|>", "<|reserved_special_token_3|>",
    ]  # fmt: skip


def tiktoken_encode(text: str) -> list[int]:
    """tiktoken's algorithm: whole words that are tokens, else always the pair whose union has the lowest rank."""
    table = ranks()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    ids = []
    for word in regex.findall(pattern, text):
        raw = word.encode()
        parts = [raw] if raw in table else [bytes([b]) for b in raw]
        while True:
            pairs = [(table[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in table]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [table[p] for p in parts]
    return ids


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"moe_args": {"experts": 8}}, "moe_args: expected no such setting"),
    "heads": ({"n_heads": 0}, "n_heads: expected a positive int, found 0"),
    "type": ({"dim": "48"}, "dim: expected a positive int, found '48'"),
    "vocabulary": ({"vocab_size": 481}, "vocab_size: expected 480 (rows of output.weight), found 481"),
    "width": ({"multiple_of": 100}, "ffn_dim_multiplier: expected 128 units (rows of feed_forward.w1), found 200"),
    "scaling": (
        {"use_scaled_rope": True},
        "rope_scaling_factor: expected a number (use_scaled_rope is on), found none",
    ),
    "layers": ({"n_layers": 4}, "layers.3.attention.wq.weight: expected shape (48, 48), found no such tensor"),
}


@pytest.mark.parametrize("case", PARAMS)
def test_params_that_are_refused(tmp_path: Path, case: str):
    _, folder = write_meta(tmp_path)
    changes, said = PARAMS[case]
    edit_json(folder / "params.json", **changes)
    dest = tmp_path / "base"
    error = assert_refused(lambda: import_base(folder, dest), dest)
    assert any(said in problem for problem in error.problems), error


def test_shards_that_do_not_fit(tmp_path: Path):
    _, folder = write_meta(tmp_path, count=2)
    dest, second = tmp_path / "base", folder / "consolidated.01.pth"
    call = partial(import_base, folder, dest)
    good = torch.load(second)
    for changes, said in (
        ({"norm.weight": good["norm.weight"] + 1}, "norm.weight: expected the same values in every shard"),
        ({"output.weight": good["output.weight"][:, :5].clone()}, "output.weight: expected shards that fit together"),
        ({"layers.0.attention.wq.weight": good["layers.0.attention.wq.weight"].half()}, "expected shards that fit"),
        ({"extra": torch.ones(1)}, "extra: expected in every shard, found in some only"),
    ):
        torch.save({**good, **changes}, second)
        assert_refused(call, dest, said)
    torch.save(good, second)
    second.rename(folder / "consolidated.02.pth")
    assert_refused(call, dest, "expected consolidated.00.pth to consolidated.01.pth, found")
    (folder / "consolidated.02.pth").rename(second)
    (folder / "tokenizer.model").rename(folder / "gone")
    assert_refused(call, dest, "tokenizer.model: expected a file here or in the folder above, found none")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\n\xff\xff", "expected a SentencePiece model, found a broken one"),
        (b"\n\x03\n\x01a\x12\x00", "trainer_spec.model_type: expected 2 (BPE), found 1"),
        (b"IQ== 0\nIg== 7\n", "line 2: expected a token in base64 and rank 1"),
        (b"!!! 0\n", "line 1: expected a token in base64 and rank 0"),
        (b"", "tokenizer.ggml.merges: expected a list, found none"),
    ],
)
def test_broken_tokenizers(tmp_path: Path, raw: bytes, said: str):
    _, folder = write_meta(tmp_path)
    (folder / "tokenizer.model").write_bytes(raw)
    dest = tmp_path / "base"
    assert_refused(lambda: import_base(folder, dest), dest, "tokenizer.model", said)
