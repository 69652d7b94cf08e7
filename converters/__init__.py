"""Files of other formats into ours, and back.

Imports numpy, ml_dtypes, safetensors, gguf and `meteora_jax.config` only.
"""

from __future__ import annotations

import os
from pathlib import Path

from converters import gguf_llama, hf_llama, meta_llama
from converters.hf_export import export_base, export_merged
from converters.meteora_torch import export_gates, import_gates
from converters.peft_export import export_adapter
from converters.peft_lora import import_adapters
from converters.rules import Progress
from meteora_jax.config import InputError

__all__ = [
    "export_adapter",
    "export_base",
    "export_gates",
    "export_merged",
    "import_adapters",
    "import_base",
    "import_gates",
]


def import_base(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Imports base weights from a Hugging Face folder, one of Meta's own, or a `.gguf` file into a BASE folder.

    Args:
        src: what to import.
        dest: the BASE folder to make.
        dtype: float32, bfloat16 or float16; None keeps the source's (float32 for quantised tensors).
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).

    Raises:
        InputError: everything that is wrong with the input; `dest` is then as it was.
    """
    path = Path(src)
    if path.is_dir() and meta_llama.is_meta_folder(path) and not (path / "config.json").exists():
        return meta_llama.import_base(path, dest, dtype, overwrite, progress)
    if path.is_dir():
        return hf_llama.import_base(path, dest, dtype, overwrite, progress)
    if not path.exists():
        raise InputError(f"{path}: expected a Hugging Face folder, Meta's or a .gguf file, found nothing")
    if path.suffix.lower() == ".gguf":
        return gguf_llama.import_base(path, dest, dtype, overwrite, progress)
    raise InputError(f"{path}: expected a Hugging Face folder, Meta's or a .gguf file, found another kind of file")
