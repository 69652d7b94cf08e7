"""A BANK folder changed in place: adapters added, removed, renamed; or some of them taken into a bank of their own.

What results is what an import of the same PEFT folders makes, byte for byte. Tensors go from file to file a layer at a
time. The old folder stays until the new one is complete, and then one system call swaps them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from converters.base_folder import common_dtype
from converters.folders import new_folder, sha256, write_json
from converters.own_folders import read_bank, read_base, read_origin
from converters.peft_bank import Adapters, check_names, read_adapters, with_digests
from converters.peft_folder import CONFIG, what_needs_base
from converters.peft_lora import bank_writer, check_saved, write_adapter
from converters.rules import Progress
from converters.tensor_files import DTYPES, TensorReader, TensorWriter
from meteora_jax.config import ENDS, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.io.provenance import BaseOrigin, misfits

_WEIGHTS, _DESCRIPTION = "weights.safetensors", "bank.json"


def add_adapters(
    bank: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    base: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> BankConfig:
    """Adds PEFT folders behind a BANK folder's adapters, in the order given.

    Args:
        bank: the folder that is changed.
        adapters, progress, any_base, on_remark: as `import_adapters`.
        base: the BASE folder of the bank; None: only adapters that need nothing of it but its shapes are taken.

    Raises:
        InputError: a name that the bank has, and what `import_adapters` refuses; the bank is then as it was.
    """
    pairs = cast("Adapters", adapters.items() if isinstance(adapters, Mapping) else adapters)
    named = [(name, Path(folder)) for name, folder in pairs]
    with _changed(bank, [folder / CONFIG for _, folder in named]) as (partial, old, reader):
        taken = [name for name, _ in named if name in old.names]
        problems = [f"{bank}: expected a name that no adapter of the bank has, found {name!r}" for name in taken]
        if base is None:
            config, origin = _shape_of_base(old), _origin_of(old, bank)
            needs = {str(folder): what_needs_base(folder) for _, folder in named}
            problems += [f"{folder}: expected the base beside it (--base BASE): {why}" for folder, why in needs.items()
                         if why]  # fmt: skip
        else:
            config, origin = read_base(Path(base), quantized=True)[0], read_origin(Path(base))
            problems += misfits(old, config, origin, str(Path(bank) / _DESCRIPTION))
        if problems:
            raise InputError(problems)
        new, loaded = read_adapters(config, origin, named, any_base, on_remark, progress)
        if base is not None:
            problems += [p for one in loaded if one.saved for p in check_saved(Path(base), one.read())]
        whole = old.join(new)
        writer = bank_writer(partial, whole, _stored_dtype(whole, reader))
        _copy(writer, whole, reader, old, range(len(old.names)))
        for index, one in enumerate(loaded):
            problems += write_adapter(writer, len(old.names) + index, one.read(), None if base is None else Path(base))
            if progress is not None:
                progress(one.name, len(loaded) + index + 1, 2 * len(loaded))
        if problems:
            raise InputError(problems)
        digests = [sha256(one.weights) for one in loaded]
        whole = with_digests(whole, [*(a.sha256 for a in old.adapters), *digests])
        write_json(partial / _DESCRIPTION, whole.to_json())
    return whole


def remove_adapters(bank: str | os.PathLike[str], names: Sequence[str]) -> BankConfig:
    """Removes adapters of a BANK folder; ranks that only they had go with them.

    Raises:
        InputError: a name twice, or that no adapter of the bank has; all of them.
    """
    with _changed(bank, ()) as (partial, old, reader):
        return _write_taken(partial, old, reader, names_left(old, names, str(bank)))


def names_left(bank: BankConfig, names: Sequence[str], source: str) -> tuple[str, ...]:
    """The adapters that stay where `names` go. Raises InputError as `remove_adapters`, and where none would stay."""
    check_present(bank, names, source)
    left = tuple(name for name in bank.names if name not in names)
    if not left:
        raise InputError(f"{source}: expected an adapter that stays, found all of them to be removed")
    return left


def take_adapters(
    bank: str | os.PathLike[str], dest: str | os.PathLike[str], names: Sequence[str], overwrite: bool = False
) -> BankConfig:
    """Writes a BANK folder `dest` with some adapters of another one, bit for bit, in the order given.

    Raises:
        InputError: a name twice, none at all, or that no adapter of the bank has; `dest` holds something.
    """
    old, reader = read_bank(Path(bank))
    check_present(old, names, str(bank))
    with new_folder(dest, overwrite, [Path(bank) / _DESCRIPTION]) as partial:
        return _write_taken(partial, old, reader, names)


def rename_adapter(bank: str | os.PathLike[str], old: str, new: str) -> BankConfig:
    """Gives one adapter of a BANK folder another name.

    Raises:
        InputError: no adapter has the old name, another has the new one, or that is no name.
    """
    with _changed(bank, ()) as (partial, config, _):
        check_rename(config.names, old, new, str(bank))
        renamed = config.rename(old, new)
        weights = Path(bank) / _WEIGHTS
        try:
            os.link(weights, partial / _WEIGHTS)
        except OSError:  # a file system without hard links
            shutil.copyfile(weights, partial / _WEIGHTS)
        write_json(partial / _DESCRIPTION, renamed.to_json())
    return renamed


def check_present(bank: BankConfig, names: Sequence[str], source: str) -> None:
    """Refuses names that are none of the bank's, and those that stand twice; all at once."""
    problems = [f"{source}: expected an adapter's name ({', '.join(bank.names)}), found {name!r}"
                for name in dict.fromkeys(names) if name not in bank.names]  # fmt: skip
    problems += [f"{source}: {name}: expected once, found {names.count(name)} times"
                 for name in dict.fromkeys(names) if names.count(name) > 1]  # fmt: skip
    if not names:
        problems.append(f"{source}: expected adapters' names, found none")
    if problems:
        raise InputError(problems)


def check_rename(names: Sequence[str], old: str, new: str, source: str) -> None:
    """Refuses a renaming of an adapter that is not there, or to what is taken or no name."""
    problems = check_names([new])
    if old not in names:
        problems.append(f"{source}: expected an adapter's name ({', '.join(names)}), found {old!r}")
    if new in names:
        problems.append(f"{source}: expected a name that no adapter of the bank has, found {new!r}")
    if problems:
        raise InputError(problems)


@contextlib.contextmanager
def _changed(bank: str | os.PathLike[str], sources: Iterable[Path]) -> Iterator[tuple[Path, BankConfig, TensorReader]]:
    """(hidden folder that becomes the bank, the bank as it is): read once no other process can change it."""
    read_json(Path(bank) / _DESCRIPTION)  # without a bank nothing is made
    with new_folder(bank, True, sources) as partial:
        yield partial, *read_bank(Path(bank))


def _write_taken(partial: Path, old: BankConfig, reader: TensorReader, names: Sequence[str]) -> BankConfig:
    at = [old.names.index(name) for name in names]
    new = old.take(at, _rank_in(reader))
    _copy(bank_writer(partial, new, _stored_dtype(new, reader)), new, reader, old, at)
    write_json(partial / _DESCRIPTION, new.to_json())
    return new


def _rank_in(reader: TensorReader) -> Callable[[int, str], int]:
    """What `BankConfig.take` asks: the rows of an adapter's A or B that are not padding."""

    def rank(i: int, place: str) -> int:
        layers = [()] if place in ENDS else [(n,) for n in range(len(reader.slice(f"{place}.a")))]
        found = 1
        for layer in layers:
            for part in ("a", "b"):
                used = np.flatnonzero(reader.slice(f"{place}.{part}", *layer, i).any(axis=1))
                found = max(found, int(used.max(initial=-1)) + 1)
        return found

    return rank


def _stored_dtype(bank: BankConfig, reader: TensorReader) -> np.dtype:
    """What an import of these adapters stores them in; of adapters that do not say, what they are stored in."""
    held = next((reader.dtype(key) for key in reader.keys if key.endswith((".a", ".rows"))), np.dtype(np.float32))
    return common_dtype({held if a.dtype is None else DTYPES[a.dtype] for a in bank.adapters})


def _copy(writer: TensorWriter, new: BankConfig, reader: TensorReader, old: BankConfig, at: Sequence[int]) -> None:
    """Fills the first adapters of the bank `new` with those of `old` at these places, a layer at a time."""
    shapes, before = new.weight_shapes(), old.weight_shapes()
    for key in shapes.keys() & before.keys():
        if key.split(".")[0] in ENDS:
            for j, i in enumerate(at):
                _fill(writer.slice(key, j), reader.slice(key, i))
        else:
            for layer in range(new.num_layers):
                out, values = writer.slice(key, layer), reader.slice(key, layer)
                for first, (start, stop) in _runs(at):  # views of both files: nothing is copied in between
                    _fill(out[first : first + stop - start], values[start:stop])


def _runs(at: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Places as (where in `at`, (first, end)) of those that lie together."""
    runs: list[tuple[int, tuple[int, int]]] = []
    for j, i in enumerate(at):
        if runs and runs[-1][1][1] == i:
            first, (start, _) = runs[-1]
            runs[-1] = first, (start, i + 1)
        else:
            runs.append((j, (i, i + 1)))
    return runs


def _fill(out: np.ndarray, values: np.ndarray) -> None:
    """What both have in common: a rank may be padded more in one of them."""
    common = tuple(slice(min(sizes)) for sizes in zip(out.shape, values.shape, strict=True))
    out[common] = values[common]


def _origin_of(bank: BankConfig, folder: str | os.PathLike[str]) -> BaseOrigin | None:
    return None if bank.base is None else BaseOrigin.from_json(bank.base, f"{Path(folder) / _DESCRIPTION}: base")


def _shape_of_base(bank: BankConfig) -> LlamaConfig:
    """A base of the shapes that the bank was imported for. Nothing else of it is the base's: see `what_needs_base`."""
    width, queries = bank.base_shapes["q_proj"]
    return LlamaConfig(
        vocab_size=1, hidden_size=width, intermediate_size=bank.base_shapes["gate_proj"][1],
        num_layers=bank.num_layers, num_heads=queries, num_kv_heads=bank.base_shapes["k_proj"][1], head_dim=1,
        rms_norm_eps=0.0, rope_theta=1.0, rope_scaling=None, max_position_embeddings=1, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
