"""One adapter from files of others, for a model that is loaded: the same import as `meteora import adapters`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from numpy.typing import DTypeLike

from meteora_jax.bank import AdapterBank
from meteora_jax.config import LlamaConfig
from meteora_jax.engine.adapter_pool import Import
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import read_origin


def importer_of(base: Path) -> Import:
    """What makes BANK folders of PEFT folders, for models of this BASE folder."""

    def importer(folder: Path, dest: Path, name: str, any_base: bool) -> None:
        import converters

        converters.import_adapters(dest, base, {name: folder}, any_base=any_base)

    return importer


def read_adapter(
    path: Path, name: str, base: Path, config: LlamaConfig, dtype: DTypeLike, any_base: bool
) -> AdapterBank:
    """A bank of one adapter: of a PEFT folder, or of a BANK folder that has one of this name.

    Args:
        name: what it is called. base: the BASE folder of the model. config: the model's. dtype: of A and B.
        any_base: take an adapter whose settings name another base.

    Raises:
        InputError: what `meteora import adapters` refuses.
    """
    import converters

    with tempfile.TemporaryDirectory() as scratch:
        one = Path(scratch) / "bank"
        if (path / "bank.json").exists():
            converters.take_adapters(path, one, [name])
        else:
            importer_of(base)(path, one, name, any_base)
        return load_bank(one, config, dtype, read_origin(base))
