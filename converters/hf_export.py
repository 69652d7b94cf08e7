"""BASE -> a Hugging Face folder that `transformers` loads, optionally with one adapter of a BANK merged in.

    W' = W + scale A B            DoRA: (W + scale A B) * magnitude / norm, by column

computed in float32 a block of rows at a time and stored in the base's own type.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from converters.folders import new_folder, write_json
from converters.hf_llama import INDEX, SINGLE, copy_tokenizer, llama_rules
from converters.own_folders import read_base, read_origin
from converters.peft_export import BankAdapter, list_modules, open_adapter
from converters.quantize import open_matrix
from converters.rules import AS_IS, Progress, Transform, copy_tensor
from converters.tensor_files import SourceTensor, TensorReader, TensorWriter, dtype_name
from meteora_jax.config import PROJECTIONS, InputError, LlamaConfig
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import BaseOrigin, misfits

SHARD_BYTES = 5_000_000_000
_HF_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class _Output:
    """One tensor of the folder to write."""

    key: str
    source: SourceTensor
    transform: Transform
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transform.source_shape(self.source.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_base(
    base: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    dequantize: bool = False,
) -> LlamaConfig:
    """Writes a BASE folder as a Hugging Face folder, bit for bit.

    Args:
        base: the BASE folder.
        dest: the folder to make.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).
        shard_bytes: weights beyond this go into several files with an index.
        dequantize: take a quantised base, whose matrices are written as what they stand for, in the type of its norms.

    Raises:
        InputError: a damaged base, or a quantised one unless `dequantize`; `dest` is then as it was.
    """
    return _export(Path(base), None, dest, overwrite, progress, shard_bytes, dequantize)


def export_merged(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    name: str,
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    dequantize: bool = False,
) -> LlamaConfig:
    """Writes a BASE folder with the adapter `name` of a BANK merged into its weights; arguments as `export_base`.

    Raises:
        InputError: a damaged base or bank, a quantised base unless `dequantize`, a bank for another base, no such
            adapter, an adapter whose biases the base has no place for, or sums that the base's type cannot hold; `dest`
            is then as it was.
    """
    return _export(Path(base), open_adapter(bank, name), dest, overwrite, progress, shard_bytes, dequantize)


def _export(
    base: Path,
    adapter: BankAdapter | None,
    dest: str | os.PathLike[str],
    overwrite: bool,
    progress: Progress | None,
    shard_bytes: int,
    dequantize: bool,
) -> LlamaConfig:
    config, reader = read_base(base, quantized=dequantize, unless=" (--dequantize writes what they stand for)")
    origin = read_origin(base)
    if adapter is not None:
        _check_fit(config, origin, adapter)
    outputs = _list_outputs(config, reader, adapter)
    shards = _split(outputs, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    inputs = [base / "config.json"] + ([adapter.folder / "bank.json"] if adapter else [])
    problems: list[str] = []
    done = 0
    with new_folder(dest, overwrite, inputs) as partial:
        copy_tokenizer(base, partial)
        for file, shard in zip(names, shards, strict=True):
            writer = TensorWriter(partial / file, {o.key: (o.dtype, o.shape) for o in shard})
            for output in shard:
                problems += copy_tensor(output.source, writer.slice(output.key), output.transform)
                done += 1
                if progress is not None:
                    progress(output.key, done, len(outputs))
        if problems:
            raise InputError(problems)
        if len(shards) > 1:
            weight_map = {o.key: file for file, shard in zip(names, shards, strict=True) for o in shard}
            total = sum(o.size for o in outputs)
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        dtype = _HF_DTYPES[dtype_name(_stored_dtype(config, reader, "embed.embedding"))]
        # a base with an adapter in its weights is no longer the model of that name
        name = {"_name_or_path": origin.name} if origin and origin.name and adapter is None else {}
        write_json(partial / "config.json", {**name, **hf_config.to_hf(config), "torch_dtype": dtype})
    return config


def _list_outputs(config: LlamaConfig, reader: TensorReader, adapter: BankAdapter | None) -> list[_Output]:
    places = {f"layers.{p}.{part}": (p, part) for p in PROJECTIONS for part in ("kernel", "bias")}
    adapted = set() if adapter is None else {(m.layer, m.projection) for m in list_modules(adapter)}
    outputs = []
    for rule in llama_rules(config):
        if rule.path is None:
            continue
        projection, part = places.get(rule.path, ("", ""))
        for layer in range(config.num_layers) if rule.layered else (None,):
            source = open_matrix(config, reader, rule.path, layer)
            stored = _stored_dtype(config, reader, rule.path)
            if adapter is not None and layer is not None and (layer, projection) in adapted:
                merge = _merged_kernel if part == "kernel" else _merged_bias
                source = merge(source, adapter, layer, projection)
            # The rule's transform leads from Hugging Face to us; a transposition is its own way back.
            back = Transform(transpose=True) if rule.transform.transpose else AS_IS
            outputs.append(_Output(rule.pattern.format(layer=layer), source, back, stored))
    return outputs


def _check_fit(config: LlamaConfig, origin: BaseOrigin | None, adapter: BankAdapter) -> None:
    bank, source = adapter.bank, adapter.folder / "bank.json"
    problems = misfits(bank, config, origin, str(source))
    if adapter.info.name in bank.vocab_adapter_names:
        found = f"{adapter.info.name}, which changes the embedding or the head (merging those is not supported)"
        problems.append(f"{source}: expected an adapter of the layers, found {found}")
    if adapter.info.invocation:
        found = f"{adapter.info.name}, which acts from its invocation on (weights act on every token)"
        problems.append(f"{source}: expected an adapter that acts on every token, found {found}")
    if not problems:
        for module in list_modules(adapter):
            if "bias" in module.parts and not config.projection_bias(module.projection):
                found = "a bias of lora_B (lora_bias)"
                problems.append(f"{source}: {module.name}: expected no bias where the base has none, found {found}")
    if problems:
        raise InputError(problems)


def _stored_dtype(config: LlamaConfig, reader: TensorReader, path: str) -> np.dtype:
    """The type that a tensor is written in: its own, or that of the norms where it is quantised."""
    return reader.dtype("norm.scale" if path in config.quantized_tensors() else path)


def _merged_kernel(base: SourceTensor, adapter: BankAdapter, layer: int, p: str) -> SourceTensor:
    scale = np.float32(adapter.scale(layer, p))
    a, b = (adapter.slice(layer, p, half).astype(np.float32) for half in ("a", "b"))
    b *= scale
    columns = 1 + adapter.slice(layer, p, "dora") if p in adapter.bank.dora else None

    def rows(start: int, stop: int) -> np.ndarray:
        merged = base.rows(start, stop).astype(np.float32) + a[:, start:stop].T @ b
        return merged if columns is None else merged * columns

    return dataclasses.replace(base, dtype=np.dtype(np.float32), rows=rows)


def _merged_bias(base: SourceTensor, adapter: BankAdapter, layer: int, p: str) -> SourceTensor:
    if p not in adapter.bank.lora_bias:
        return base
    added = np.float32(adapter.scale(layer, p)) * adapter.slice(layer, p, "bias").astype(np.float32)

    def rows(start, stop):
        return base.rows(start, stop).astype(np.float32) + added[start:stop]

    return dataclasses.replace(base, dtype=np.dtype(np.float32), rows=rows)


def _split(outputs: list[_Output], shard_bytes: int) -> list[list[_Output]]:
    """Consecutive tensors, as many to a file as fit in `shard_bytes`, at least one."""
    shards: list[list[_Output]] = [[]]
    free = shard_bytes
    for output in outputs:
        if shards[-1] and output.size > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(output)
        free -= output.size
    return shards
