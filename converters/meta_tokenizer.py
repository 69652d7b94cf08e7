"""Meta's `tokenizer.model` -> a tokenizer that transformers loads.

Llama 1 and 2: a SentencePiece model (a protocol buffer, sentencepiece_model.proto). Llama 3: tiktoken's text format, a
token in base64 and its rank on each line, to which Llama 3's code adds 256 special tokens.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.gguf_tokenizer import TokenizerFiles, build_tokenizer
from meteora_jax.config import InputError

_SPECIAL = 256
_NAMED = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip
_CONTROL, _BPE = 3, 2


def read_tokenizer(path: Path, vocab_size: int, context: int) -> tuple[TokenizerFiles, dict[str, Any]]:
    """(tokenizer, {"bos": id, "eos": ids}) of a `tokenizer.model` of either kind.

    Raises:
        InputError: a file of another kind, or one whose size is not the model's.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    # A SentencePiece model starts with its first piece (field 1, a message), which is no base64.
    read = _read_sentencepiece if raw[:1] == b"\n" else _read_tiktoken
    metadata, eos = read(raw, path.name)
    tokenizer = build_tokenizer(metadata, path.name, vocab_size, context)
    return tokenizer, {"bos": metadata["tokenizer.ggml.bos_token_id"], "eos": eos}


def _metadata(kind: str, **values: Any) -> dict[str, Any]:
    return {"tokenizer.ggml.model": kind, **{f"tokenizer.ggml.{key}": value for key, value in values.items()}}


def _read_tiktoken(raw: bytes, file: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    tokens: list[bytes] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            decoded = base64.b64decode(token, validate=True)
            if int(rank) != len(tokens):
                raise ValueError(f"rank {int(rank)}")
        except (binascii.Error, ValueError) as e:
            raise InputError(
                f"{file}: line {number}: expected a token in base64 and rank {len(tokens)}, found {line[:60]!r} ({e})"
            ) from None
        tokens.append(decoded)
    letters = _byte_letters()
    spelled = ["".join(letters[b] for b in token) for token in tokens]
    count = len(spelled)
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(_SPECIAL))
    special = [_NAMED.get(i) or next(reserved) for i in range(_SPECIAL)]
    metadata = _metadata(
        "gpt2", pre="llama-bpe", tokens=spelled + special, token_type=[1] * count + [_CONTROL] * _SPECIAL,
        merges=_merges(tokens, letters), bos_token_id=count, eos_token_id=count + 1,
    )  # fmt: skip
    return metadata, (count + 1, count + 8, count + 9)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's encoder)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in own else chr(next(others)) for b in range(256)]


def _merges(tokens: list[bytes], letters: list[str]) -> list[str]:
    """Each way to make a token of two others, lower ranks first: the order in which tiktoken merges."""
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token):
        return "".join(letters[b] for b in token)

    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{spell(first)} {spell(second)}" for first, second in known]
    return merges


def _read_sentencepiece(raw: bytes, file: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    kind = 1  # unigram, where the trainer is silent
    prefix = True
    try:
        for field, value in _fields(raw):
            if field == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, 1))
            elif field == 2:
                kind = dict(_fields(value)).get(3, 1)
            elif field == 3:
                prefix = bool(dict(_fields(value)).get(3, True))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise InputError(f"{file}: expected a SentencePiece model, found a broken one ({e!r})") from None
    if kind != _BPE:
        raise InputError(f"{file}: trainer_spec.model_type: expected {_BPE} (BPE), found {kind}")
    roles = {}
    for role, token in (("bos", "<s>"), ("eos", "</s>")):
        if token not in tokens:
            raise InputError(f"{file}: expected a piece {token}, found none")
        roles[f"{role}_token_id"] = tokens.index(token)
    metadata = _metadata("llama", tokens=tokens, scores=scores, token_type=types, add_space_prefix=prefix, **roles)
    return metadata, (roles["eos_token_id"],)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of a protocol buffer message."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                size, at = _varint(raw, at)
            if size is None or size > len(raw) - at:
                raise ValueError(f"field of wire type {wire} at byte {at}")
            value, at = raw[at : at + size], at + size
        yield tag >> 3, value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"number at byte {at}")
