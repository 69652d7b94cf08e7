"""Files of other formats into ours, and back.

Imports numpy, ml_dtypes, safetensors, gguf and `meteora_jax.config` only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from converters import gguf_llama, hf_llama, meta_llama, meteora_layout
from converters.bank_change import (
    add_adapters,
    check_rename,
    names_left,
    remove_adapters,
    rename_adapter,
    take_adapters,
)
from converters.base_folder import OpenedBase, describe_base, named, write_base
from converters.hf_export import export_base, export_merged
from converters.meteora_export import export_gates
from converters.meteora_import import describe_gates, import_gates
from converters.packed_base import write_packed
from converters.peft_export import export_adapter
from converters.peft_lora import describe_adapters, import_adapters
from converters.peft_vocab import replace_vocab
from converters.quantize import quantize_base
from converters.rules import Progress, TensorPlan
from meteora_jax.config import InputError, LlamaConfig

__all__ = [
    "add_adapters",
    "check_rename",
    "describe_adapters",
    "describe_gates",
    "export_adapter",
    "export_base",
    "export_gates",
    "export_merged",
    "import_adapters",
    "import_base",
    "import_gates",
    "names_left",
    "open_base",
    "plan_base",
    "quantize_base",
    "remove_adapters",
    "rename_adapter",
    "take_adapters",
]


def import_base(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    replace: str | os.PathLike[str] | None = None,
    name: str | None = None,
    on_remark: Callable[[str], None] | None = None,
    weights: str | None = None,
) -> None:
    """Imports base weights into a BASE folder; killed, the same call goes on from the tensors that are on disk.

    Args:
        src: a Hugging Face folder, one of Meta's own, a checkpoint of the original MeteoRA, or a `.gguf` file.
        dest: the BASE folder to make.
        dtype: float32, bfloat16 or float16; None keeps the source's (float32 for quantised tensors).
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).
        replace: a PEFT folder whose saved embedding and head take the place of the source's.
        name: which model it is (`meta-llama/Meta-Llama-3-8B`, perhaps with `@COMMIT`), in place of what the source
            says: adapters that were trained on another are refused by `import_adapters`.
        on_remark: called with a line about each choice that the source leaves open, and about what `weights` kept.
        weights: int8, fp8 or int4: a quantised base (see `packed_base`); `dtype` is then of what is not quantised.

    Raises:
        InputError: everything that is wrong with the input; `dest` is then as it was.
    """
    opened = named(_opened(src, replace, on_remark), name)
    if weights is None:
        write_base(dest, opened, dtype, overwrite, progress)
        return
    done = write_packed(dest, opened, weights, dtype=dtype, overwrite=overwrite, progress=progress)
    if on_remark is not None:
        on_remark(f"{src}: {done}")


def _opened(
    src: str | os.PathLike[str], replace: str | os.PathLike[str] | None, on_remark: Callable[[str], None] | None
) -> OpenedBase:
    opened = open_base(src)
    opened = opened if replace is None else replace_vocab(opened, replace)
    if on_remark is not None:
        for line in opened.remarks:
            on_remark(line)
    return opened


def plan_base(
    src: str | os.PathLike[str],
    dtype: str | None = None,
    replace: str | os.PathLike[str] | None = None,
    on_remark: Callable[[str], None] | None = None,
) -> tuple[LlamaConfig, list[TensorPlan]]:
    """What `import_base` would make: (configuration, every tensor's way). Reads headers only, so it takes seconds.

    Raises:
        InputError: as `import_base`, but for values that are not finite, which only the import itself finds.
    """
    opened = _opened(src, replace, on_remark)
    return opened.config, describe_base(opened, dtype)


def open_base(src: str | os.PathLike[str]) -> OpenedBase:
    """Finds out what `src` is and reads its headers. Raises InputError."""
    path = Path(src)
    if path.is_dir() and meta_llama.is_meta_folder(path) and not (path / "config.json").exists():
        return meta_llama.open_base(path)
    if path.is_dir():
        return (meteora_layout if meteora_layout.is_checkpoint(path) else hf_llama).open_base(path)
    if not path.exists():
        raise InputError(f"{path}: expected a Hugging Face folder, Meta's or a .gguf file, found nothing")
    if path.suffix.lower() == ".gguf":
        return gguf_llama.open_base(path)
    raise InputError(f"{path}: expected a Hugging Face folder, Meta's or a .gguf file, found another kind of file")
