"""The project's own folders as converters read them: a description, and weights of which nothing is read yet."""

from __future__ import annotations

from pathlib import Path

from converters.tensor_files import TensorReader
from meteora_jax.config import BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.io import hf_config
from meteora_jax.io.files import refuse_unimported_bank, refuse_unimported_base
from meteora_jax.io.provenance import BaseOrigin


def read_base(folder: Path, quantized: bool = False, unless: str = "") -> tuple[LlamaConfig, TensorReader]:
    """A BASE folder.

    quantized: whether it may be a quantised one, whose matrices are read by `converters.quantize.open_matrix`.
    unless: what the refusal of one says behind what is expected.

    Raises:
        InputError: a missing or damaged file, tensors other than those of config.json, or a quantised base.
    """
    refuse_unimported_base(folder)
    config = hf_config.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if config.quantization is not None and not quantized:
        expected = f"a base whose weights are not quantised{unless}"
        raise InputError(
            f"{folder / 'config.json'}: meteora.quantization: expected {expected}, found {config.quantization}"
        )
    return config, TensorReader(folder / "weights.safetensors", config.weight_shapes(), config.stored_types())


def read_origin(folder: Path) -> BaseOrigin | None:
    """Which model a BASE folder is; None if it records nothing. Raises InputError: a malformed record."""
    return BaseOrigin.of_base(read_json(folder / "config.json"), str(folder / "config.json"))


def read_bank(folder: Path) -> tuple[BankConfig, TensorReader]:
    """A BANK folder. Raises InputError: a missing or damaged file, or tensors other than those of bank.json."""
    refuse_unimported_bank(folder)
    bank = BankConfig.from_json(read_json(folder / "bank.json"), str(folder / "bank.json"))
    return bank, TensorReader(folder / "weights.safetensors", bank.weight_shapes())
