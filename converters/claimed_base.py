"""The base that an adapter says it was trained on, where its weights are on this machine: what its norms are."""

from __future__ import annotations

import os
from pathlib import Path

from converters.base_folder import norms_sha256
from converters.hf_llama import NORMS, read_weights
from converters.rules import Placement, find_rule
from meteora_jax.config import InputError, read_json

_PLAIN_NORMS = ("bitsandbytes", "gptq", "hqq", "fp8")  # unlike AWQ's and SmoothQuant's


def norms_of(claimed: str | None, revision: str | None) -> str | None:
    """`BaseOrigin.norms_sha256` of the Hugging Face folder that `claimed` names, a path or a model in the hub's cache.

    Quantised weights do as well, where the method leaves norms in floating point and folds nothing into them. None
    where no such folder is at hand.
    """
    folder = _find(claimed, revision) if claimed else None
    if folder is None:
        return None
    try:
        raw, tensors = read_json(folder / "config.json"), read_weights(folder)[1]
    except InputError:
        return None
    quantised = raw.get("quantization_config") if isinstance(raw, dict) else None
    if isinstance(quantised, dict) and quantised.get("quant_method") not in _PLAIN_NORMS:
        return None
    found = [(tensor, *find_rule(NORMS, tensor.key)) for tensor in tensors]
    placements = [Placement(t, rule.path, layer, rule.transform) for t, rule, layer in found if rule and rule.path]
    return norms_sha256(placements) if placements else None


def _find(claimed: str, revision: str | None) -> Path | None:
    if (Path(claimed) / "config.json").is_file():
        return Path(claimed)
    # the layout of huggingface_hub's cache: models--ORG--NAME/{refs/BRANCH,snapshots/COMMIT}
    home = (
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{claimed.replace('/', '--')}"
    branch = cache / "refs" / (revision or "main")
    commit = branch.read_text(encoding="utf-8").strip() if branch.is_file() else revision
    folder = cache / "snapshots" / commit if commit else None
    return folder if folder is not None and (folder / "config.json").is_file() else None
