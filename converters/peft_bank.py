"""What a bank of PEFT folders will hold, from settings and headers alone: every check but that of values."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from converters.base_folder import common_dtype
from converters.claimed_base import norms_of
from converters.peft_folder import CONFIG, PICKLED, WEIGHTS, PeftAdapter, read_adapter
from converters.rules import Progress, copy_tensor
from converters.tensor_files import dtype_name
from meteora_jax.config import (
    ENDS,
    NAME,
    PROJECTIONS,
    AdapterInfo,
    BankConfig,
    InputError,
    LlamaConfig,
    VocabAdapterConfig,
    is_name,
    read_json,
)
from meteora_jax.io import hf_config
from meteora_jax.io.files import refuse_unimported_base
from meteora_jax.io.provenance import BaseOrigin, compare

Adapters: TypeAlias = Iterable[tuple[str, str | os.PathLike[str]]]  # (name, PEFT folder)


@dataclasses.dataclass(frozen=True)
class CheckedAdapter:
    """A PEFT folder after every check of its settings and headers, which are read again when they are needed: of a
    thousand folders they would be half a gigabyte.

    bank: of it alone, without the weights' SHA-256. saved: whether it has copies of the base's embedding or head.
    state: size and time of its files.
    """

    name: str
    folder: Path
    weights: Path
    base: LlamaConfig
    bank: BankConfig
    saved: bool
    state: tuple[tuple[int, int], ...]

    @property
    def raw(self) -> dict[str, Any]:
        """adapter_config.json."""
        return self.bank.adapters[0].peft_config

    @property
    def inputs(self) -> tuple[Path, Path]:
        """The files."""
        return self.folder / CONFIG, self.weights

    def read(self) -> PeftAdapter:
        """The folder as it was checked. Raises InputError: it has changed since."""
        if _state(self.inputs) != self.state:
            raise InputError(f"{self.folder}: expected the files that were checked, found others since")
        return read_adapter(self.name, self.folder, self.base)


def _state(files: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    found = [path.stat() for path in files]
    return tuple((s.st_size, s.st_mtime_ns) for s in found)


def check_adapter(name: str, folder: Path, base: LlamaConfig) -> CheckedAdapter:
    """Raises InputError as `read_adapter`."""
    read = read_adapter(name, folder, base)
    bank, saved = _describe(read, base), bool(read.saved)
    return CheckedAdapter(name, folder, read.weights, base, bank, saved, _state(read.inputs))


def with_digests(bank: BankConfig, digests: Sequence[str]) -> BankConfig:
    """The bank with the SHA-256 of each adapter's weight file."""
    adapters = zip(bank.adapters, digests, strict=True)
    return dataclasses.replace(bank, adapters=tuple(dataclasses.replace(a, sha256=d) for a, d in adapters))


def plan_adapters(
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> tuple[BankConfig, list[CheckedAdapter]]:
    """What `import_adapters` would make, from settings and headers alone: the bank, without digests of files, and the
    folders that fill it.

    `any_base` and `on_remark` as there. progress: called after each folder with (what was done, how many, twice their
    number): the other half is their import.

    Raises:
        InputError: everything that is wrong with the names, settings and tensors of all folders.
    """
    config_file = Path(base) / "config.json"
    refuse_unimported_base(base)
    raw = read_json(config_file)
    config = hf_config.from_hf(raw, str(config_file))
    origin = BaseOrigin.of_base(raw, str(config_file))
    return read_adapters(config, origin, adapters, any_base, on_remark, progress)


def read_adapters(
    config: LlamaConfig,
    origin: BaseOrigin | None,
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    any_base: bool = False,
    on_remark: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> tuple[BankConfig, list[CheckedAdapter]]:
    """As `plan_adapters`, for a base of this shape and record."""
    pairs = cast("Adapters", adapters.items() if isinstance(adapters, Mapping) else adapters)
    named = [(name, Path(folder)) for name, folder in pairs]
    problems = check_names([name for name, _ in named])
    loaded: list[CheckedAdapter] = []
    for done, (name, folder) in enumerate(named, start=1):
        try:
            loaded.append(check_adapter(name, folder, config))
        except InputError as e:
            problems += e.problems
        if progress is not None:
            progress(f"{name} checked", done, 2 * len(named))
    wrong, remarks = _compare_bases(loaded, origin)
    twice = [a.name for a in loaded if (a.folder / PICKLED).exists() and a.weights.name != PICKLED]
    remarks += [f"{', '.join(twice)}: {WEIGHTS} is read, not {PICKLED}"] if twice else []
    problems += [] if any_base else wrong
    if problems:
        # The values of the sound folders are read too: one error then holds all there is to mend.
        raise InputError(problems + [p for adapter in loaded for p in _check_values(adapter.read())])
    if on_remark is not None:
        for line in remarks:
            on_remark(line)
    bank = functools.reduce(BankConfig.join, (adapter.bank for adapter in loaded))
    return dataclasses.replace(bank, base=origin and dataclasses.asdict(origin)), loaded


def _compare_bases(adapters: Sequence[CheckedAdapter], origin: BaseOrigin | None) -> tuple[list[str], list[str]]:
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


def check_names(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of a bank's adapters, a line each."""
    problems = [] if names else ["adapters: expected at least one, found none"]
    for name in dict.fromkeys(names):
        if not is_name(name):
            problems.append(f"adapter {name!r}: expected {NAME}, found {name!r}")
        if (count := names.count(name)) > 1:
            problems.append(f"adapter {name!r}: expected once, found {count} times")
    return problems


def _describe(adapter: PeftAdapter, config: LlamaConfig) -> BankConfig:
    """The bank of one adapter alone."""
    info = AdapterInfo(
        name=adapter.name,
        rank=max(*map(adapter.rank_of, PROJECTIONS), *map(adapter.vocab_rank, ENDS)),
        targets=(
            *(p for p in PROJECTIONS if adapter.rank_of(p)),
            *(ENDS[matrix].rpartition(".")[2] for matrix in adapter.vocab_targets),
        ),
        source=adapter.folder.resolve().name,
        sha256="",
        peft_config=adapter.raw,
        dtype=dtype_name(common_dtype({t.dtype for t in adapter.trained})),
        invocation=adapter.settings.invocation,
    )
    kinds = {(p, part) for _, p, part in adapter.parts}
    vocab_adapters = {
        matrix: VocabAdapterConfig(adapter.vocab_rank(matrix), (adapter.tokens.get(matrix, ()),))
        for matrix in ENDS
        if any(m == matrix for m, _ in adapter.vocab_parts)
    }
    return BankConfig(
        (info,),
        {p: rank for p in PROJECTIONS if (rank := adapter.rank_of(p))},
        config.num_layers,
        {p: config.projection_shape(p) for p in PROJECTIONS},
        tuple(p for p in PROJECTIONS if (p, "magnitude") in kinds),
        tuple(p for p in PROJECTIONS if (p, "bias") in kinds),
        vocab_adapters,
        (config.vocab_size, config.hidden_size) if vocab_adapters else None,
    )


def _check_values(adapter: PeftAdapter) -> list[str]:
    return [p for t in adapter.trained for p in copy_tensor(t, np.empty(t.shape, t.dtype))]
