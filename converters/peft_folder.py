"""One PEFT folder, read and checked: settings, tensor names, types, shapes, and whether they agree.

Format: `adapter_config.json` (peft's `LoraConfig`) and `adapter_model.safetensors` or `.bin`; `lora_A` [r, I], `lora_B`
[O, r], DoRA's `lora_magnitude_vector` [O], the bias of `lora_B` [O]; on the embedding `lora_embedding_A` [r, V] and
`lora_embedding_B` [D, r]; retrained rows `token_adapter.trainable_tokens_delta` [n, D]. Key spellings: with
`base_model.model.` in front or without, with the adapter's name `.default` inside or without. Tensors decide what an
adapter holds; settings are cross-checked against them, and a setting that cannot be honoured is refused by name,
whatever peft would make of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.hf_llama import module_name
from converters.peft_settings import LoraSettings, is_lora, read_settings
from converters.pickle_files import read_pickle
from converters.rules import same_values
from converters.tensor_files import FLOATS, SourceTensor, dtype_name, read_safetensors
from meteora_jax.config import ENDS, PROJECTIONS, InputError, LlamaConfig, read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = r"(?:base_model\.model\.)?"
_KEY = re.compile(
    _PREFIX + r"(?P<module>model\.layers\.(?P<layer>0|[1-9][0-9]*)\.(?P<name>(?:self_attn|mlp)\.\w+))\."
    r"(?:lora_(?P<half>[AB])(?:\.default)?\.weight|(?P<bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?))"
)
_SAVED = re.compile(
    _PREFIX + r"(?P<name>model\.embed_tokens|lm_head)(?:\.(?P<place>modules_to_save|base_layer"
    r"|token_adapter\.base_layer|original_module)(?:\.default)?)?\.weight"
)
_VOCAB_KEY = re.compile(
    _PREFIX + r"(?P<name>model\.embed_tokens|lm_head)\.(?:lora_embedding_(?P<embed>[AB])(?:\.default)?"
    r"|lora_(?P<head>[AB])(?:\.default)?\.weight|token_adapter\.trainable_tokens_delta(?:\.default)?)"
)
_PROJECTION_OF = {module_name(p): p for p in PROJECTIONS}
_UNSUPPORTED_TENSORS = {
    "embed_tokens.": "embeddings may have LoRA, retrained tokens and saved copies of the base's",
    "lm_head.": "the head may have LoRA, retrained tokens and saved copies of the base's",
    "modules_to_save": "saved modules other than embed_tokens and lm_head are not supported",
    "base_layer": "an adapter file that holds base weights is not supported",
}
Slot = tuple[int, str, str]  # layer, projection, part: a, b, bias or magnitude
VocabSlot = tuple[str, str]  # matrix (embed or head), part: a, b or rows


@dataclasses.dataclass(frozen=True)
class SavedVocabTensor:
    """A whole embedding or head in an adapter's file.

    tensor: what acts there. apart: it is a module of its own (`modules_to_save`) and leaves the base's weight as it
    is. original: the base's own weight, which peft saves too where the vocabulary was resized.
    """

    tensor: SourceTensor
    apart: bool
    original: SourceTensor | None


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """A PEFT folder after every check of its settings and headers."""

    name: str
    folder: Path
    weights: Path  # the file
    raw: dict[str, Any]  # adapter_config.json
    settings: LoraSettings
    parts: dict[Slot, SourceTensor]
    saved: dict[str, SavedVocabTensor]  # model.embed_tokens and lm_head, to be compared with the base's
    vocab_parts: dict[VocabSlot, SourceTensor]
    tokens: dict[str, tuple[int, ...]]  # embed, head: ids of the retrained rows; a tied head has the embedding's

    @property
    def trained(self) -> list[SourceTensor]:
        """All tensors that act, base copies left out."""
        return [*self.parts.values(), *self.vocab_parts.values()]

    @property
    def vocab_targets(self) -> list[str]:
        """Which of the two vocabulary matrices the file has tensors of; a tied head's rows may be the embedding's."""
        borrowed = (
            {("head", "rows")}
            if self.vocab_parts.get(("head", "rows")) is self.vocab_parts.get(("embed", "rows"))
            else set()
        )
        return [matrix for matrix in ENDS if any(m == matrix for m, _ in self.vocab_parts.keys() - borrowed)]

    @property
    def modules(self) -> list[tuple[int, str]]:
        return sorted({(layer, p) for layer, p, _ in self.parts})

    @property
    def inputs(self) -> tuple[Path, Path]:
        return self.folder / CONFIG, self.weights

    def rank_of(self, projection: str) -> int:
        """The largest rank over the layers; 0 where the adapter does not touch the projection."""
        shapes = (t.shape for (_, p, part), t in self.parts.items() if p == projection and part == "a")
        return max((shape[0] for shape in shapes), default=0)

    def scale_of(self, layer: int, projection: str) -> float:
        return self.settings.scale_of(f"model.layers.{layer}.{module_name(projection)}")

    def vocab_rank(self, matrix: str) -> int:
        """LoRA's rank on the embedding or the head; 0 where there is none."""
        return self.vocab_parts[matrix, "a"].shape[0] if (matrix, "a") in self.vocab_parts else 0


def read_adapter(name: str, folder: Path, config: LlamaConfig) -> PeftAdapter:
    """One folder with its settings and headers checked.

    Raises:
        InputError: everything that is wrong with settings and tensors.
    """
    problems: list[str] = []
    settings, raw = None, {}
    try:
        raw = read_json(folder / CONFIG)
        settings = read_settings(raw, f"{folder / CONFIG}")
    except InputError as e:
        if isinstance(raw, dict) and raw and not is_lora(raw):
            raise  # the tensors of another method would say the same many times
        problems += e.problems
    try:
        weights, tensors = read_tensors(folder)
        _check_vocabulary(tensors, config, folder)
        parts, saved, vocab_parts = _sort_tensors(tensors, config, settings)
    except InputError as e:
        raise InputError([*problems, *e.problems]) from None
    if settings is not None:
        present = {(layer, p) for layer, p, _ in parts}
        problems += _cross_check(settings, present, config, f"{folder / CONFIG}")
        for module in settings.saved:
            if module not in saved:
                problems.append(f"{folder / CONFIG}: modules_to_save: expected tensors of {module}, found none")
        problems += _check_vocab_parts(settings, vocab_parts, config, f"{folder / CONFIG}")
        if max(settings.invocation, default=0) >= config.vocab_size:
            expected, found = f"token ids below {config.vocab_size}", max(settings.invocation)
            problems.append(f"{folder / CONFIG}: alora_invocation_tokens: expected {expected}, found {found}")
    if problems or settings is None:
        raise InputError(problems)
    tokens = dict(settings.tokens)
    # named for both with the same ids they are tied, too, and peft saves them once
    if config.tie_word_embeddings and "embed" in tokens and tokens.get("head", tokens["embed"]) == tokens["embed"]:
        own = vocab_parts.setdefault(("head", "rows"), vocab_parts["embed", "rows"])
        if not same_values(own, vocab_parts["embed", "rows"]):
            raise InputError(f"{own.where}: expected the rows of {ENDS['embed']} (the base ties the two), found others")
        tokens["head"], vocab_parts["head", "rows"] = tokens["embed"], vocab_parts["embed", "rows"]
    return PeftAdapter(name, folder, weights, raw, settings, parts, saved, vocab_parts, tokens)


def what_needs_base(folder: Path) -> str:
    """What of a PEFT folder only its base itself can check or complete, in words; empty: the base's shapes suffice.

    A folder that `read_adapter` refuses anyway needs nothing.
    """
    try:
        settings = read_settings(read_json(folder / CONFIG), f"{folder / CONFIG}")
        keys = [tensor.key for tensor in read_tensors(folder)[1]]
    except InputError:
        return ""
    at_vocabulary = any(_SAVED.fullmatch(key) or _VOCAB_KEY.fullmatch(key) for key in keys)
    reasons = {
        "DoRA's norms are those of its weights": settings.dora,
        "the adapter has tensors at its vocabulary": at_vocabulary or settings.saved or settings.tokens,
        "the invocation is tokens of its vocabulary": settings.invocation,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _check_vocab_parts(
    settings: LoraSettings, vocab_parts: Mapping[VocabSlot, SourceTensor], config: LlamaConfig, file: str
) -> list[str]:
    """Where settings and tensors of embedding and head contradict each other, and what has no meaning there."""
    problems = []
    for matrix, module in ENDS.items():
        present, wanted = {part for m, part in vocab_parts if m == matrix}, settings.adapts(matrix)
        for part in ("a", "b"):
            if (part in present) != wanted:
                found = "tensors" if part in present else f"no lora_{part.upper()}"
                problems.append(
                    f"{file}: target_modules: expected {'LoRA' if wanted else 'none'} on {module}, found {found}"
                )
        ids = settings.tokens.get(matrix, ())
        if ids and max(ids) >= config.vocab_size:
            expected = f"token ids below {config.vocab_size}"
            problems.append(f"{file}: trainable_token_indices: expected {expected}, found {max(ids)}")
        # peft saves no rows of a tied head with the embedding's ids
        tied = matrix == "head" and config.tie_word_embeddings and ids == settings.tokens.get("embed")
        if ids and "rows" not in present and not tied:  # the other way round is a wrong shape
            problems.append(f"{file}: trainable_token_indices: expected {len(ids)} rows of {module}, found none")
    if config.tie_word_embeddings and "embed" in settings.tokens and settings.adapts("head"):
        found = "a LoRA of it"
        problems.append(f"{file}: trainable_token_indices: expected a head tied to the retrained rows, found {found}")
    return problems


def read_tensors(folder: Path) -> tuple[Path, list[SourceTensor]]:
    """(file, tensors) of a PEFT folder; of headers alone. Where it holds both formats the safetensors are read, as
    peft does. Raises InputError."""
    path, pickled = folder / WEIGHTS, folder / PICKLED
    path = pickled if pickled.exists() and not path.exists() else path
    tensors = (read_pickle if path == pickled else read_safetensors)(path, str(path))
    if not tensors:
        raise InputError(f"{path}: expected LoRA tensors, found none")
    return path, tensors


def saved_rows(tensors: Sequence[SourceTensor]) -> set[int]:
    """The vocabulary sizes of the embeddings and heads among an adapter's tensors: one, if the file is sound."""
    return {t.shape[0] for t in tensors if _SAVED.fullmatch(t.key) and len(t.shape) == 2}


def _check_vocabulary(tensors: Sequence[SourceTensor], config: LlamaConfig, folder: Path) -> None:
    """Refuses, in one line, the adapter of a model whose vocabulary has another size than the base's."""
    rows = saved_rows(tensors) - {config.vocab_size}
    if rows:
        raise InputError(
            f"{tensors[0].file}: expected an embedding of {config.vocab_size} rows (the base's vocabulary), found "
            f"{' and '.join(map(str, sorted(rows)))}: resized in training (meteora import base SRC DEST --replace "
            f"{folder} makes the base that has it)"
        )


def _sort_tensors(
    tensors: Sequence[SourceTensor], config: LlamaConfig, settings: LoraSettings | None
) -> tuple[dict[Slot, SourceTensor], dict[str, SavedVocabTensor], dict[VocabSlot, SourceTensor]]:
    """(parts in the layers, whole vocabulary matrices, parts on these).

    Names, types and shapes are checked, ranks only if the settings are sound.
    """
    problems: list[str] = []
    parts: dict[Slot, SourceTensor] = {}
    whole: dict[tuple[str, str], SourceTensor] = {}  # by module and the place of the weight in it
    vocab_parts: dict[VocabSlot, SourceTensor] = {}
    for tensor in tensors:
        if match := _SAVED.fullmatch(tensor.key):
            place = match["name"], match["place"] or ""
            if place in whole:
                problems.append(f"{tensor.where}: expected once, found also in {whole[place].key}")
            whole[place] = tensor
            problems += _check_header(tensor, (config.vocab_size, config.hidden_size))
            continue
        if (match := _VOCAB_KEY.fullmatch(tensor.key)) and (vocab_slot := _vocab_slot(match)):
            if vocab_slot in vocab_parts:
                problems.append(f"{tensor.where}: expected once, found also in {vocab_parts[vocab_slot].key}")
            vocab_parts[vocab_slot] = tensor
            problems += _check_header(tensor, _vocab_shape(tensor, vocab_slot, config, settings))
            continue
        match = _KEY.fullmatch(tensor.key)
        projection = _PROJECTION_OF.get(match["name"]) if match else None
        if match is None or projection is None:
            problems.append(
                f"{tensor.where}: expected lora_A or lora_B of {', '.join(PROJECTIONS)}, found {_why(tensor)}"
            )
            continue
        part = "bias" if match["bias"] else "magnitude" if match["magnitude"] else match["half"].lower()
        slot = (int(match["layer"]), projection, part)
        if slot[0] >= config.num_layers:
            problems.append(f"{tensor.where}: expected layers 0 to {config.num_layers - 1}, found layer {slot[0]}")
        elif slot in parts:
            problems.append(f"{tensor.where}: expected once, found also in {parts[slot].key}")
        else:
            parts[slot] = tensor
            problems += _check_header(tensor, _expected_shape(tensor, slot, match["module"], config, settings))
    problems += _check_partners(parts, settings)
    if not parts and not vocab_parts and not problems:
        problems.append(f"{tensors[0].file}: expected LoRA tensors, found none")
    if problems:
        raise InputError(problems)
    return parts, _saved_matrices(whole, settings), vocab_parts


def _saved_matrices(
    whole: Mapping[tuple[str, str], SourceTensor], settings: LoraSettings | None
) -> dict[str, SavedVocabTensor]:
    """What acts as embedding and as head.

    peft writes a saved module under its own name and under `modules_to_save`.
    """
    saved: dict[str, SavedVocabTensor] = {}
    problems = []
    for module in ENDS.values():
        original = whole.get((module, "original_module"))
        names = ("modules_to_save", "", "base_layer", "token_adapter.base_layer")
        acting = [whole[module, name] for name in names if (module, name) in whole]
        problems += [
            f"{other.where}: expected the values of {acting[0].key}, found others"
            for other in acting[1:]
            if not same_values(acting[0], other)
        ]
        if tensor := acting[0] if acting else original:
            apart = settings is not None and module in settings.saved
            saved[module] = SavedVocabTensor(tensor, apart, original)
    if problems:
        raise InputError(problems)
    return saved


def _vocab_slot(match: re.Match[str]) -> VocabSlot | None:
    """(matrix, part) of a tensor on it; None for an embedding's tensor on the head or the other way round."""
    matrix = "embed" if match["name"] == ENDS["embed"] else "head"
    half = match["embed"] or match["head"]
    return (matrix, half.lower() if half else "rows") if half is None or match[matrix] else None


def _vocab_shape(
    tensor: SourceTensor, slot: VocabSlot, config: LlamaConfig, settings: LoraSettings | None
) -> tuple[int | str, ...]:
    matrix, part = slot
    vocab, width = config.vocab_size, config.hidden_size
    if part == "rows":
        # peft writes the embedding's rows for a tied head, too
        as_embedding = settings is not None and config.tie_word_embeddings and matrix not in settings.tokens
        ids = settings.tokens.get("embed" if as_embedding else matrix, ()) if settings is not None else None
        return ("n" if ids is None else len(ids), width)
    rank = settings.rank_of(ENDS[matrix]) if settings is not None else "r"
    inputs, outputs = (vocab, width) if matrix == "embed" else (width, vocab)
    return (rank, inputs) if part == "a" else (outputs, rank)


def _why(tensor: SourceTensor) -> str:
    reason = next((why for part, why in _UNSUPPORTED_TENSORS.items() if part in tensor.key), "an unknown tensor")
    return f"{dtype_name(tensor.dtype)} {tensor.shape} ({reason})"


def _expected_shape(
    tensor: SourceTensor, slot: Slot, module: str, config: LlamaConfig, settings: LoraSettings | None
) -> tuple[int | str, ...]:
    _, projection, part = slot
    inputs, outputs = config.projection_shape(projection)
    if part in ("bias", "magnitude"):
        return (outputs,)
    if settings is not None:
        rank = settings.rank_of(module)
    else:
        rank = tensor.shape[0 if part == "a" else 1] if len(tensor.shape) == 2 else "r"
    return (rank, inputs) if part == "a" else (outputs, rank)


def _check_header(tensor: SourceTensor, expected: tuple[int | str, ...]) -> list[str]:
    problems = []
    if tensor.shape != expected:
        problems.append(f"{tensor.where}: expected shape {expected} for this base, found {tensor.shape}")
    if dtype_name(tensor.dtype) not in FLOATS:
        problems.append(f"{tensor.where}: expected type {', '.join(FLOATS)}, found {dtype_name(tensor.dtype)}")
    return problems


def _check_partners(parts: Mapping[Slot, SourceTensor], settings: LoraSettings | None) -> list[str]:
    """Modules of which a tensor is missing, or one too many."""
    problems = []
    keys = {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"}
    switches = {"bias": "lora_bias", "magnitude": "use_dora"}
    wanted = {"bias": settings is not None and settings.lora_bias, "magnitude": settings is not None and settings.dora}
    for layer, projection in dict.fromkeys((layer, p) for layer, p, _ in parts):
        present = {part: parts[layer, projection, part] for part in keys if (layer, projection, part) in parts}
        tensor = next(iter(present.values()))
        module = re.split(r"\.lora_", tensor.key)[0]
        for part in ("a", "b"):
            if part not in present:
                other = next(p for p in present)
                partner = {"a": "lora_A", "b": "lora_B"}.get(other, other)
                problems.append(f"{tensor.file}: {module}{keys[part]}: expected the partner of {partner}, found none")
        for part, switch in switches.items():
            if settings is None or (part in present) == wanted[part]:
                continue
            if part in present:
                problems.append(f"{present[part].where}: expected no such tensor ({switch} is off), found one")
            else:
                problems.append(f"{tensor.file}: {module}{keys[part]}: expected one ({switch} is on), found none")
    return problems


def _cross_check(settings: LoraSettings, found: set[tuple[int, str]], config: LlamaConfig, file: str) -> list[str]:
    """Where what the settings select is not what the tensors hold."""
    problems = []
    for p in PROJECTIONS:
        name = module_name(p)
        selected = {n for n in range(config.num_layers) if settings.selects(f"model.layers.{n}.{name}")}
        present = {layer for layer, projection in found if projection == p}
        if missing := sorted(selected - present):
            problems.append(f"{file}: target_modules: expected tensors of {name} in layers {missing}, found none")
        if extra := sorted(present - selected):
            problems.append(f"{file}: target_modules: expected no tensors of {name} in layers {extra}, found some")
    others = ["model", "model.layers", "model.norm", "model.rotary_emb"]
    inner = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
    inner += (".self_attn.q_norm", ".self_attn.k_norm") if config.qk_norm else ()
    others += [f"model.layers.{n}{module}" for n in range(config.num_layers) for module in inner]
    if settings.target != "all-linear" and (strange := [name for name in others if settings.selects(name)]):
        problems.append(f"{file}: target_modules: expected projections of the layers, found also {strange[0]}")
    return problems
