"""PEFT LoRA folders -> BANK: all adapters of one base, stacked and zero-padded to a common rank.

y = x W^T + scale ((x A^T) B^T + bias)          DoRA: the sum of the first two, times magnitude / norm by column

Vocabulary adapters: LoRA on the embedding or the head, and rows of either that were retrained for some tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from converters import rules
from converters.base_folder import common_dtype
from converters.folders import Journal, new_folder, sha256, write_json
from converters.own_folders import read_base
from converters.peft_bank import Adapters, plan_adapters, with_digests
from converters.peft_folder import PeftAdapter
from converters.quantize import open_matrix
from converters.rules import Progress, TensorPlan, copy_tensor
from converters.tensor_files import DTYPES, TensorWriter, dtype_name
from meteora_jax.config import ENDS, BankConfig, InputError

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
        progress: called with (what was done, done, total) after each adapter's check and after its import, so that
            the total is twice their number.
        any_base: take adapters whose settings name another base.
        on_remark: called with a line about what could not be compared, or agrees only in part.

    Raises:
        InputError: everything that is wrong with the names, settings and tensors of all folders; `dest` is then as
            it was.
    """
    bank, loaded = plan_adapters(base, adapters, any_base, on_remark, progress)
    base = Path(base)
    problems = [p for adapter in loaded if adapter.saved for p in check_saved(base, adapter.read())]
    if problems:
        raise InputError(problems)
    inputs = [base / "config.json", base / "weights.safetensors", *(path for a in loaded for path in a.inputs)]
    with new_folder(dest, overwrite, inputs, _identity(bank, inputs)) as partial:
        writer = bank_writer(partial, bank, stored_dtype(bank))
        journal = Journal(partial)
        if not writer.found:
            journal.begin(journal.conversion)
        first, unsaved = journal.done, 0
        digests = [sha256(adapter.weights) for adapter in loaded[:first]]
        for index, adapter in enumerate(loaded[first:], start=first):
            read = adapter.read()
            problems += write_adapter(writer, index, read, base)
            digests.append(sha256(adapter.weights))
            unsaved += sum(math.prod(t.shape) * t.dtype.itemsize for t in read.trained)
            if unsaved >= rules.SAVE_BYTES and not problems:
                writer.sync()
                journal.note(index + 1)
                unsaved = 0
            if progress is not None:
                progress(adapter.name, len(loaded) + index + 1, 2 * len(loaded))
        if problems:
            raise InputError(problems)
        bank = with_digests(bank, digests)
        write_json(partial / "bank.json", bank.to_json())
    return bank


def stored_dtype(bank: BankConfig) -> np.dtype:
    """What the adapters of a new bank are stored in: the type that holds all of theirs."""
    return common_dtype({DTYPES[a.dtype] for a in bank.adapters if a.dtype is not None})


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
    stored = dtype_name(stored_dtype(bank))
    plans: dict[str, list[TensorPlan]] = {}
    for index, checked in enumerate(loaded):
        rows, adapter = [], checked.read()
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
    return with_digests(bank, [sha256(adapter.weights) for adapter in loaded]), plans


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
