"""Rules say which source tensor goes where; applying them is strict: every tensor used, dropped by name, or refused.

Two passes. `plan` needs headers only and reports every unknown, duplicate, missing or misshapen tensor at once,
in seconds even for a big checkpoint; `fill` streams the values and reports every tensor that is not finite.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from converters.folders import Journal
from converters.tensor_files import FLOATS, SourceTensor, TensorWriter, dtype_name
from meteora_jax.config import InputError

_MOST_LISTED = 100  # missing layers of one tensor that are named one by one
_ROWS_AT_ONCE = 64
SAVE_BYTES = 1 << 30  # what a killed import may have to do again, about
Progress = Callable[[str, int, int], None]  # (what was just done, how many are done, how many in all)


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a source tensor becomes its slice of the destination: rows moved, then axes swapped.

    `rows(n)` gives for each of the n source rows its row in the destination (before the swap); None keeps them.
    """

    transpose: bool = False
    rows: Callable[[int], np.ndarray] | None = None

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the source must have to fill a slice of `shape`."""
        return shape[::-1] if self.transpose else shape


AS_IS = Transform()
TRANSPOSE = Transform(transpose=True)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a conversion table.

    `pattern` is the source key, `{layer}` standing for the index that becomes the destination's leading axis, `{any}`
    for whatever stands before a name that needs no more.
    A `path` of None drops a key that is known and carries nothing, for the reason `why`; with `same_as` it is dropped
    only if its values equal that other key's.
    """

    pattern: str
    path: str | None
    transform: Transform = AS_IS
    same_as: str | None = None
    why: str = "implied"

    def match(self, key: str) -> re.Match[str] | None:
        escaped = re.escape(self.pattern).replace(r"\{any\}", ".*")
        return re.fullmatch(escaped.replace(r"\{layer\}", "(?P<layer>0|[1-9][0-9]*)"), key)

    @property
    def layered(self) -> bool:
        return "{layer}" in self.pattern


@dataclasses.dataclass(frozen=True)
class Placement:
    """One source tensor and where it goes: `path`, and the index along its leading axis (None: all of it)."""

    source: SourceTensor
    path: str
    layer: int | None
    transform: Transform


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One line of a dry run: a source tensor, and where it goes (`to` None: nowhere) in which type and how."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    to: str | None
    stored: str | None
    how: str


def plan(
    rules: Sequence[Rule], sources: Sequence[SourceTensor], shapes: Mapping[str, tuple[int, ...]], file: str
) -> list[Placement]:
    """Decides where every source tensor goes, from headers alone (`same_as` reads the two tensors).

    Args:
        rules: the table; it must cover every path of `shapes`.
        sources: all tensors found, in reading order.
        shapes: {path: shape} of the destination.
        file: what a message about a missing tensor names.

    Raises:
        InputError: unknown, duplicate or missing tensors, wrong shapes and types; all of them.
    """
    problems: list[str] = []
    taken: dict[tuple[str, int | None], SourceTensor] = {}
    placements: list[Placement] = []
    by_key = {source.key: source for source in sources}
    for source in sources:
        rule, layer = find_rule(rules, source.key)
        if rule is None:
            problems.append(f"{source.where}: expected no such tensor, found {_describe(source)}")
            continue
        slot = (rule.path or source.key, layer)
        if slot in taken:
            problems.append(f"{source.where}: expected once, found also in {taken[slot].where}")
            continue
        taken[slot] = source
        if rule.path is None:
            problems += _check_dropped(rule, source, by_key)
            continue
        shape = shapes[rule.path]
        if layer is not None and layer >= shape[0]:
            problems.append(f"{source.where}: expected layers 0 to {shape[0] - 1}, found layer {layer}")
            continue
        problems += _check_header(source, rule.transform.source_shape(shape[1:] if rule.layered else shape))
        placements.append(Placement(source, rule.path, layer, rule.transform))
    problems += _find_missing(rules, shapes, taken, file)
    if problems:
        raise InputError(problems)
    return placements


def find_rule(rules: Sequence[Rule], key: str) -> tuple[Rule | None, int | None]:
    """(the first rule that knows the key, its layer)."""
    for rule in rules:
        if match := rule.match(key):
            return rule, int(match["layer"]) if rule.layered else None
    return None, None


def _describe(source: SourceTensor) -> str:
    return f"{dtype_name(source.dtype)} {source.shape}"


def _check_header(source: SourceTensor, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if source.shape != shape:
        problems.append(f"{source.where}: expected shape {shape}, found {source.shape}")
    if dtype_name(source.dtype) not in FLOATS:
        problems.append(f"{source.where}: expected type {', '.join(FLOATS)}, found {dtype_name(source.dtype)}")
    return problems


def _check_dropped(rule: Rule, source: SourceTensor, by_key: Mapping[str, SourceTensor]) -> list[str]:
    if rule.same_as is None:
        return []
    other = by_key.get(rule.same_as)
    if other is None:
        return []  # the missing tensor is reported as such
    if source.shape != other.shape:
        return [f"{source.where}: expected shape {other.shape} (tied to {other.key}), found {source.shape}"]
    if not same_values(source, other):
        return [f"{source.where}: expected the values of {other.key} (tied in config.json), found others"]
    return []


def same_values(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two tensors hold the same values, whatever their types; read a block at a time."""
    return first.shape == second.shape and all(
        np.array_equal(block.astype(np.float32), second.rows(rows.start, rows.stop).astype(np.float32))
        for rows, block in first.blocks()
    )


def _find_missing(
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    taken: Mapping[tuple[str, int | None], SourceTensor],
    file: str,
) -> list[str]:
    by_path = {rule.path: rule for rule in rules if rule.path is not None}
    problems = []
    for path, shape in shapes.items():
        rule = by_path[path]
        expected = rule.transform.source_shape(shape[1:] if rule.layered else shape)
        found = sum(slot[0] == path for slot in taken)
        if rule.layered and shape[0] - found > _MOST_LISTED:  # a config may claim any number of layers
            problems.append(f"{file}: {rule.pattern}: expected {shape[0]} layers of shape {expected}, found {found}")
            continue
        for layer in range(shape[0]) if rule.layered else (None,):
            if (path, layer) not in taken:
                key = rule.pattern.format(layer=layer)
                problems.append(f"{file}: {key}: expected shape {expected}, found no such tensor")
    return problems


def fill(
    placements: Sequence[Placement],
    writer: TensorWriter,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Streams every planned tensor into the file, a block of rows at a time.

    Args:
        placements: of `plan`, in an order that is always the same.
        writer: the file; one that was found is filled from where the journal says that it was left.
        progress: called after each tensor with (key, done, total).
        journal: of a conversion that can go on after it was killed.

    Raises:
        InputError: values that are not finite, or not finite any more in the destination's type; all tensors.
    """
    problems: list[str] = []
    if journal is not None and not writer.found:
        journal.begin(journal.conversion)
    first = journal.done if journal is not None else 0
    unsaved = 0
    for done, placement in enumerate(placements[first:], start=first + 1):
        index = () if placement.layer is None else (placement.layer,)
        out = writer.slice(placement.path, *index)
        problems += copy_tensor(placement.source, out, placement.transform)
        unsaved += out.nbytes
        if journal is not None and unsaved >= SAVE_BYTES and not problems:
            writer.sync()
            journal.note(done)
            unsaved = 0
        if progress is not None:
            progress(placement.source.key, done, len(placements))
    if problems:
        raise InputError(problems)


def copy_tensor(source: SourceTensor, out: np.ndarray, transform: Transform = AS_IS) -> list[str]:
    """Writes the source's values to `out` in its type; returns what is wrong with them (at most one problem)."""
    out = out.T if transform.transpose else out
    target = None if transform.rows is None else transform.rows(source.shape[0])
    for rows, block in source.blocks():
        if not np.isfinite(block).all():
            return [f"{source.where}: expected finite values, found {_first_not_finite(block, rows.start)}"]
        with np.errstate(over="ignore"):
            values = block.astype(out.dtype, copy=False)
        if values is not block and not np.isfinite(values).all():
            return [f"{source.where}: expected values that {out.dtype} can hold, found up to {np.abs(block).max()}"]
        # A transposed write of many rows at once misses the cache on every value: 64 rows are a cache line or two.
        for i in range(0, len(values), _ROWS_AT_ONCE):
            at = slice(rows.start + i, min(rows.start + i + _ROWS_AT_ONCE, rows.stop))
            out[at if target is None else target[at]] = values[i : i + _ROWS_AT_ONCE]
    return []


def _first_not_finite(block: np.ndarray, start: int) -> str:
    first = np.argwhere(~np.isfinite(block))[0]
    at = (start + int(first[0]), *map(int, first[1:]))
    return f"{float(block[tuple(first)])} at {at}"
