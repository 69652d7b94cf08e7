"""The tokenizer that a GGUF file describes, as a `tokenizer.json` that `transformers.AutoTokenizer` loads.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml. Two kinds of vocabulary: "gpt2" is byte-level
BPE whose pre-tokenizer `tokenizer.ggml.pre` names, "llama" is SentencePiece BPE with byte fallback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.folders import write_json
from meteora_jax.config import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers

# llama.cpp's token types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# Words, numbers, signs and spaces, as Llama 3 (up to three digits together) and Qwen 2 (one by one) split them.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_TOKENS = 128_256
_PLAIN = ("default", "gpt-2")
_QWEN2 = "qwen2"
_PRE_TOKENIZERS = (*_PLAIN, "smollm", *_LLAMA3, _QWEN2)
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A rebuilt tokenizer, ready to be written into a BASE folder."""

    tokenizer: Tokenizer
    settings: dict[str, Any]  # tokenizer_config.json
    chat_template: str | None
    remarks: tuple[str, ...]

    def write(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", self.settings)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """`tokenizer.*` metadata after its types and sizes were checked."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]  # empty where the merges are given
    merges: list[str]  # empty where the scores imply them
    roles: dict[str, str]  # bos, eos, unk, pad -> token
    add_bos: bool
    add_eos: bool
    prefix_space: bool


def build_tokenizer(metadata: Mapping[str, Any], file: str, vocab_size: int, context: int) -> TokenizerFiles:
    """Rebuilds the tokenizer.

    Args:
        metadata: of the GGUF file.
        file: its name, for messages.
        vocab_size: of the model; token ids must fit.
        context: tokens the model can read (`model_max_length`).

    Raises:
        InputError: a kind or pre-tokenizer that is not supported, or metadata that contradicts itself.
    """
    vocabulary = _read_vocabulary(metadata, file, vocab_size)
    tokenizer = (_byte_level if vocabulary.kind == "gpt2" else _sentencepiece)(vocabulary, file)
    _add_special_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": token for role, token in vocabulary.roles.items()},
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{file}: tokenizer.chat_template: expected a string, found {type(template).__name__}")
    remarks: tuple[str, ...] = ()
    if vocabulary.kind == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        said = f"{file}: expected tokenizer.ggml.pre, found none; text is split as {vocabulary.pre} files have it"
        remarks = (f"{said}: compare some token ids with the original's",)
    return TokenizerFiles(tokenizer, settings, template, remarks)


def _read_vocabulary(metadata: Mapping[str, Any], file: str, vocab_size: int) -> _Vocabulary:
    problems: list[str] = []

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and not isinstance(value, kind):
            problems.append(f"{file}: tokenizer.ggml.{key}: expected {kind.__name__}, found {value!r:.60}")
            return default
        return value

    kind = get("model", str)
    pre = get("pre", str, _implied_pre(metadata))
    tokens = get("tokens", list, [])
    types = get("token_type", list) or [1] * len(tokens)
    scores, merges = get("scores", list, []), get("merges", list, [])
    if kind not in ("gpt2", "llama"):
        problems.append(f"{file}: tokenizer.ggml.model: expected 'gpt2' or 'llama', found {kind!r}")
    if kind == "gpt2" and pre not in _PRE_TOKENIZERS:
        problems.append(f"{file}: tokenizer.ggml.pre: expected {', '.join(_PRE_TOKENIZERS)}, found {pre!r}")
    for key, values in (("tokens", tokens), ("merges", merges)):
        if odd := [value for value in values if not isinstance(value, str)]:
            raise InputError(f"{file}: tokenizer.ggml.{key}: expected strings, found {odd[0]!r:.60}")
    if not 0 < len(tokens) <= vocab_size:
        problems.append(f"{file}: tokenizer.ggml.tokens: expected 1 to {vocab_size} tokens, found {len(tokens)}")
    if len(set(tokens)) != len(tokens):
        problems.append(f"{file}: tokenizer.ggml.tokens: expected different tokens, found some twice")
    for key, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            problems.append(f"{file}: tokenizer.ggml.{key}: expected {len(tokens)} entries, found {len(values)}")
    if not merges and (kind == "gpt2" or not scores):
        problems.append(f"{file}: tokenizer.ggml.merges: expected a list, found none")
    roles: dict[str, str] = {}
    for role, key in _ROLES.items():
        index = get(key, int)
        if index is not None and not 0 <= index < len(tokens):
            problems.append(f"{file}: tokenizer.ggml.{key}: expected an id below {len(tokens)}, found {index}")
        elif index is not None:
            roles[role] = tokens[index]
    # What llama.cpp assumes where a file is silent.
    add_bos = get("add_bos_token", bool, kind == "llama" or pre in _LLAMA3)
    add_eos = get("add_eos_token", bool, False)
    for role, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and role not in roles:
            problems.append(f"{file}: tokenizer.ggml.{role}_token_id: expected an id (it is to be added), found none")
    prefix_space = get("add_space_prefix", bool, kind == "llama")
    if problems:
        raise InputError(problems)
    if kind == "llama" and "unk" not in roles and _UNKNOWN in types:
        roles["unk"] = tokens[types.index(_UNKNOWN)]
    return _Vocabulary(kind, pre, tokens, types, scores, merges, roles, add_bos, add_eos, prefix_space)


def _implied_pre(metadata: Mapping[str, Any]) -> str:
    """Of files older than the key `pre`, by what else they say: Llama 3's and Qwen's have their own, others GPT-2's."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if str(metadata.get("general.architecture")).startswith("qwen"):
        return _QWEN2
    return _LLAMA3[0] if isinstance(tokens, list) and len(tokens) == _LLAMA3_TOKENS else _PLAIN[0]


def _byte_level(vocabulary: _Vocabulary, file: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Llama 3's tokenizer.json takes a whole word that is a token before it tries any merge.
    model = _bpe(
        models, vocabulary, _split_merges(vocabulary.merges, file), file, ignore_merges=vocabulary.pre in _LLAMA3
    )
    tokenizer = Tokenizer(model)
    if vocabulary.pre == _QWEN2:  # as its own tokenizer.json; llama.cpp leaves it out
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(vocabulary: _Vocabulary) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    space = vocabulary.prefix_space
    if vocabulary.pre in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=space)
    if vocabulary.pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=space)])
    pattern = _SPLIT.replace("DIGITS", "" if vocabulary.pre == _QWEN2 else "{1,3}")
    first = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)])


def _sentencepiece(vocabulary: _Vocabulary, file: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if vocabulary.merges:
        merges = _split_merges(vocabulary.merges, file)
    else:
        merges = _merges_of_scores(vocabulary.tokens, vocabulary.scores)
    model = _bpe(
        models, vocabulary, merges, file, unk_token=vocabulary.roles.get("unk"), fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    scheme = "first" if vocabulary.prefix_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _bpe(models: Any, vocabulary: _Vocabulary, merges: list[tuple[str, str]], file: str, **settings: Any) -> Any:
    try:
        return models.BPE(vocab={t: i for i, t in enumerate(vocabulary.tokens)}, merges=merges, **settings)
    except Exception as e:  # tokenizers raises a bare Exception for a merge of unknown tokens
        raise InputError(
            f"{file}: tokenizer.ggml.merges: expected merges of known tokens, found others ({e})"
        ) from None


def _split_merges(merges: Sequence[str], file: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        first, space, second = merge.partition(" ")
        if not (first and space and second) or " " in second:
            raise InputError(f"{file}: tokenizer.ggml.merges: expected two tokens an entry, found {merge!r}")
        pairs.append((first, second))
    return pairs


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: each way to split a token in two, best token first.

    Ties go as in transformers' `generate_merges`.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        found += [(score, pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    found.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])), reverse=True)
    return [pair for _, pair in found]


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens stay whole and are skipped in decoding; user-defined ones only stay whole."""
    from tokenizers import AddedToken

    roles = set(vocabulary.roles.values())
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == _CONTROL or token in roles:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    from tokenizers import processors

    bos = [vocabulary.roles["bos"]] if vocabulary.add_bos else []
    eos = [vocabulary.roles["eos"]] if vocabulary.add_eos else []
    if bos or eos:
        ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A:0", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys(bos + eos)],
        )
