"""PEFT LoRA folders -> BANK: all adapters of one base, stacked and zero-padded to a common rank.

y = x W^T + scale ((x A^T) B^T + bias)          DoRA: the sum of the first two, times magnitude / norm by column

Vocabulary adapters: LoRA on the embedding or the head, and rows of either that were retrained for some tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from converters import rules
from converters.base_folder import common_dtype
from converters.claimed_base import norms_of
from converters.folders import Journal, new_folder, sha256, write_json
from converters.own_folders import read_base
from converters.peft_folder import CONFIG, PICKLED, WEIGHTS, PeftAdapter, read_adapter
from converters.quantize import open_matrix
from converters.rules import Progress, TensorPlan, copy_tensor
from converters.tensor_files import TensorWriter, dtype_name
from meteora_jax.config import (
    ENDS,
    PROJECTIONS,
    AdapterInfo,
    BankConfig,
    InputError,
    LlamaConfig,
    VocabAdapterConfig,
    read_json,
)
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import BaseOrigin, compare

Adapters: TypeAlias = Iterable[tuple[str, str | os.PathLike[str]]]  # (name, PEFT folder)
_DORA_ROWS = 512  # of a kernel at a time


def import_adapters(
    dest: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    overwrite: bool = False,
    progress: Progress | None = None,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> BankConfig:
    """Imports PEFT folders into one bank, in the order given; killed, the same call goes on from what is on disk.

    Args:
        dest: the BANK folder to make.
        base: the BASE folder that the adapters were trained on; its weights are read where an adapter needs them
            (DoRA's norms, saved copies of embeddings).
        adapters: {name: PEFT folder}, or (name, PEFT folder) pairs.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each adapter with (name, done, total).
        any_base: take adapters whose settings name another base.
        on_remark: called with a line about what could not be compared, or agrees only in part.

    Raises:
        InputError: everything that is wrong with the names, settings and tensors of all folders; `dest` is then as
            it was.
    """
    bank, loaded = plan_adapters(base, adapters, any_base, on_remark)
    base = Path(base)
    problems = [p for adapter in loaded for p in check_saved(base, adapter)]
    if problems:
        raise InputError(problems)
    inputs = [base / "config.json", base / "weights.safetensors", *(path for a in loaded for path in a.inputs)]
    with new_folder(dest, overwrite, inputs, _identity(bank, inputs)) as partial:
        dtype = common_dtype({t.dtype for a in loaded for t in a.trained})
        writer = bank_writer(partial, bank, dtype)
        journal = Journal(partial)
        if not writer.found:
            journal.begin(journal.conversion)
        first, unsaved = journal.done, 0
        for index, adapter in enumerate(loaded[first:], start=first):
            problems += write_adapter(writer, index, adapter, base)
            unsaved += sum(math.prod(t.shape) * t.dtype.itemsize for t in adapter.trained)
            if unsaved >= rules.SAVE_BYTES and not problems:
                writer.sync()
                journal.note(index + 1)
                unsaved = 0
            if progress is not None:
                progress(adapter.name, index + 1, len(loaded))
        if problems:
            raise InputError(problems)
        write_json(partial / "bank.json", bank.to_json())
    return bank


def bank_writer(folder: Path, bank: BankConfig, dtype: np.dtype) -> TensorWriter:
    """The weight file of a BANK folder; what is computed rather than copied stays float32."""
    shapes = bank.weight_shapes()
    float32 = (".scale", ".dora", ".own_gate")
    specs = {p: (np.dtype(np.float32) if p.endswith(float32) else dtype, shapes[p]) for p in shapes}
    return TensorWriter(folder / "weights.safetensors", specs)


def _identity(bank: BankConfig, inputs: Iterable[Path]) -> str:
    """A digest of the import: what the bank will hold, and the files as they are now."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs if path.exists()]
    return hashlib.sha256(json.dumps([bank.to_json(), files], sort_keys=True).encode("utf-8")).hexdigest()


def plan_adapters(
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> tuple[BankConfig, list[PeftAdapter]]:
    """What `import_adapters` would make, from settings and headers alone: the bank and the folders that fill it.

    `any_base` and `on_remark` as there.

    Raises:
        InputError: everything that is wrong with the names, settings and tensors of all folders.
    """
    config_file = Path(base) / "config.json"
    raw = read_json(config_file)
    config = hf_config.from_hf(raw, str(config_file))
    origin = BaseOrigin.of_base(raw, str(config_file))
    return read_adapters(config, origin, adapters, any_base, on_remark)


def read_adapters(
    config: LlamaConfig,
    origin: BaseOrigin | None,
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> tuple[BankConfig, list[PeftAdapter]]:
    """As `plan_adapters`, for a base of this shape and record."""
    pairs = cast("Adapters", adapters.items() if isinstance(adapters, Mapping) else adapters)
    named = [(name, Path(folder)) for name, folder in pairs]
    problems = check_names([name for name, _ in named])
    loaded: list[PeftAdapter] = []
    for name, folder in named:
        try:
            loaded.append(read_adapter(name, folder, config))
        except InputError as e:
            problems += e.problems
    wrong, remarks = _compare_bases(loaded, origin)
    twice = [a.name for a in loaded if (a.folder / PICKLED).exists() and a.weights.name != PICKLED]
    remarks += [f"{', '.join(twice)}: {WEIGHTS} is read, not {PICKLED}"] if twice else []
    problems += [] if any_base else wrong
    if problems:
        # The values of the sound folders are read too: one error then holds all there is to mend.
        raise InputError(problems + [p for adapter in loaded for p in _check_values(adapter)])
    if on_remark is not None:
        for line in remarks:
            on_remark(line)
    return dataclasses.replace(_describe_bank(loaded, config), base=origin and dataclasses.asdict(origin)), loaded


def _compare_bases(adapters: Sequence[PeftAdapter], origin: BaseOrigin | None) -> tuple[list[str], list[str]]:
    """(adapters that are another base's, what cannot be decided): lines, each for all adapters that it holds for."""
    problems: list[str] = []
    remarks: dict[str, list[str]] = {}
    for adapter in adapters:
        file, said = adapter.folder / CONFIG, {}
        for key in ("base_model_name_or_path", "revision"):
            said[key] = adapter.raw.get(key)
            if not isinstance(said[key], str | None):
                problems.append(f"{file}: {key}: expected a name, found {said[key]!r:.200}")
                said[key] = None
        claimed = said["base_model_name_or_path"] or None
        verdict = compare(origin, claimed, said["revision"], norms_of(claimed, said["revision"]))
        if verdict.expected is not None:
            problems.append(
                f"{file}: {verdict.key}: expected {verdict.expected} (this base), found {said[verdict.key]} "
                "(--any-base takes it all the same)"
            )
        elif verdict.remark is not None:
            remarks.setdefault(verdict.remark, []).append(adapter.name)
    return problems, [f"{', '.join(names)}: {remark}; taken for this base's" for remark, names in remarks.items()]


def describe_adapters(
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> tuple[BankConfig, dict[str, list[TensorPlan]]]:
    """What `import_adapters` would do, from headers alone: (the bank, {adapter: every tensor's way}).

    Raises:
        InputError: as `import_adapters`, but for values, which only the import itself reads.
    """
    bank, loaded = plan_adapters(base, adapters, any_base, on_remark)
    stored = dtype_name(common_dtype({t.dtype for a in loaded for t in a.trained}))
    plans: dict[str, list[TensorPlan]] = {}
    for index, adapter in enumerate(loaded):
        rows = []
        for (layer, p, part), t in adapter.parts.items():
            how = f"scale {adapter.scale_of(layer, p):g}" if part == "b" else "as is"
            how = f"transposed, {how}" if part == "b" else how
            rows.append(TensorPlan(t.key, dtype_name(t.dtype), t.shape, f"{p}.{part}[{layer}, {index}]", stored, how))
        for (matrix, part), t in adapter.vocab_parts.items():
            how = f"transposed, scale {adapter.settings.scale_of(ENDS[matrix]):g}" if part == "b" else "as is"
            rows.append(TensorPlan(t.key, dtype_name(t.dtype), t.shape, f"{matrix}.{part}[{index}]", stored, how))
        for t in (saved.tensor for saved in adapter.saved.values()):
            rows.append(TensorPlan(t.key, dtype_name(t.dtype), t.shape, None, None, "dropped: must equal the base's"))
        plans[adapter.name] = rows
    return bank, plans


def check_names(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of a bank's adapters, a line each."""
    problems = [] if names else ["adapters: expected at least one, found none"]
    for name in dict.fromkeys(names):
        if not name or name != name.strip() or not name.isprintable() or any(c in name for c in "/\\="):
            problems.append(f"adapter {name!r}: expected a printable name without '/', '\\' or '=', found {name!r}")
        if (count := names.count(name)) > 1:
            problems.append(f"adapter {name!r}: expected once, found {count} times")
    return problems


def _describe_bank(adapters: Sequence[PeftAdapter], config: LlamaConfig) -> BankConfig:
    ranks = {p: max(a.rank_of(p) for a in adapters) for p in PROJECTIONS}
    infos = tuple(
        AdapterInfo(
            name=a.name,
            rank=max(*map(a.rank_of, PROJECTIONS), *map(a.vocab_rank, ENDS)),
            targets=(
                *(p for p in PROJECTIONS if a.rank_of(p)),
                *(ENDS[matrix].rpartition(".")[2] for matrix in a.vocab_targets),
            ),
            source=a.folder.resolve().name,
            sha256=sha256(a.weights),
            peft_config=a.raw,
            dtype=dtype_name(common_dtype({t.dtype for t in a.trained})),
            invocation=a.settings.invocation,
        )
        for a in adapters
    )
    base_shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    kinds = {(p, part) for a in adapters for _, p, part in a.parts}
    dora = tuple(p for p in PROJECTIONS if (p, "magnitude") in kinds)
    bias = tuple(p for p in PROJECTIONS if (p, "bias") in kinds)
    vocab_adapters = {
        matrix: VocabAdapterConfig(
            max(a.vocab_rank(matrix) for a in adapters), tuple(a.tokens.get(matrix, ()) for a in adapters)
        )
        for matrix in ENDS
        if any(m == matrix for a in adapters for m, _ in a.vocab_parts)
    }
    vocab_shape = (config.vocab_size, config.hidden_size) if vocab_adapters else None
    used = {p: r for p, r in ranks.items() if r}
    return BankConfig(infos, used, config.num_layers, base_shapes, dora, bias, vocab_adapters, vocab_shape)


def write_adapter(writer: TensorWriter, index: int, adapter: PeftAdapter, base: Path | None) -> list[str]:
    """Fills the adapter's slices; rows beyond its rank and modules it lacks stay zero, scale 0 included.

    base: the BASE folder; None where the adapter has no DoRA. Returns what is wrong with its values.
    """
    problems = []
    for (layer, p, part), tensor in adapter.parts.items():
        out = writer.slice(f"{p}.{part}", layer, index)
        if part in ("a", "b"):
            out = out[: adapter.parts[layer, p, "a"].shape[0]]
        problems += copy_tensor(tensor, out.T if part == "b" else out)
    for layer, p in adapter.modules:
        writer.slice(f"{p}.scale", layer, index)[0] = adapter.scale_of(layer, p)
    for (matrix, part), tensor in adapter.vocab_parts.items():
        out = writer.slice(f"{matrix}.{part}", index)[: tensor.shape[1 if part == "b" else 0]]
        problems += copy_tensor(tensor, out.T if part == "b" else out)
        if part == "a":
            writer.slice(f"{matrix}.scale", index)[0] = adapter.settings.scale_of(ENDS[matrix])
    if adapter.settings.dora and not problems:
        assert base is not None, "DoRA's norms are the base's"
        problems += _write_dora(writer, index, adapter, base)
    return problems


def _write_dora(writer: TensorWriter, index: int, adapter: PeftAdapter, base: Path) -> list[str]:
    """Fills `p.dora`: magnitude / norm - 1 for each output column, the norm being that of W + scale A B."""
    weights = read_base(base, quantized=True)
    problems = []
    for layer, p in adapter.modules:
        a, b = (adapter.parts[layer, p, part].read().astype(np.float32) for part in ("a", "b"))
        b *= np.float32(adapter.scale_of(layer, p))
        kernel = open_matrix(*weights, f"layers.{p}.kernel", layer)  # [I, O]
        squares = np.zeros(kernel.shape[1], np.float64)
        for start in range(0, kernel.shape[0], _DORA_ROWS):
            stop = min(start + _DORA_ROWS, kernel.shape[0])
            merged = kernel.rows(start, stop).astype(np.float32) + a[:, start : start + _DORA_ROWS].T @ b.T
            squares += np.square(merged, dtype=np.float64).sum(axis=0)
        source = adapter.parts[layer, p, "magnitude"]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = source.read().astype(np.float64) / np.sqrt(squares) - 1
            columns = ratio.astype(np.float32)
        if not np.isfinite(columns).all():
            problems.append(f"{source.where}: expected columns of W + scale A B that are not zero, found some")
        writer.slice(f"{p}.dora", layer, index)[:] = columns
    return problems


def _check_values(adapter: PeftAdapter) -> list[str]:
    return [p for t in adapter.trained for p in copy_tensor(t, np.empty(t.shape, t.dtype))]


def check_saved(base: Path, adapter: PeftAdapter) -> list[str]:
    """Saved embeddings and heads are accepted where they are the base's own, value by value."""
    if not adapter.saved:
        return []
    config, weights = read_base(base, quantized=True)
    problems = []
    for module, saved in adapter.saved.items():
        embedding = module == ENDS["embed"] or config.tie_word_embeddings
        if (q := config.quantization) is not None and (q.embedding if embedding else q.head):
            kept = f"a base whose {'embedding' if embedding else 'head'} is not quantised, to compare it with"
            problems.append(f"{saved.tensor.where}: expected {kept}, found {q}")
            continue
        own = weights.slice("embed.embedding") if embedding else weights.slice("lm_head.kernel").T
        if not all(np.array_equal(block, own[rows]) for rows, block in saved.tensor.blocks()):
            problems.append(
                f"{saved.tensor.where}: expected the values of the base, found others (a bank has one base: meteora "
                f"import base SRC DEST --replace {adapter.folder} makes the one that has them)"
            )
    return problems
