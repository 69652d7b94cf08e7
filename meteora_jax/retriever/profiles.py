"""Profiles of adapters from files: a JSON of them all, or an adapter's training data."""

from __future__ import annotations

import json
import os
from typing import Any

from meteora_jax.config import InputError, read_json, read_lines
from meteora_jax.examples import parse_example
from meteora_jax.retriever.index import check_profile, spread
from meteora_jax.text import check_text


def read_profiles(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """{adapter: inputs} of a JSON file: that object itself, or LoraRetriever's release.

    The release is a list of {"model_name": ..., "sample": [{"inputs": ...}, ...]}.
    """
    raw = read_json(path, _of_different_keys)
    try:
        if isinstance(raw, list):
            names = [entry["model_name"] for entry in raw]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"{path}: expected each model_name once, found twice: {', '.join(twice)}")
            raw = {entry["model_name"]: [s["inputs"] for s in entry["sample"]] for entry in raw}
        profiles = dict(raw.items())
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: expected {{adapter: [inputs]}}, found something else ({e!r})") from None
    if problems := [f"{path}: {p}" for name, inputs in profiles.items() for p in check_profile(name, inputs)]:
        raise InputError(problems)
    return profiles


def _of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which Python would keep the last of two values under one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
        raise ValueError(f"expected each key once, found twice: {', '.join(sorted(twice))}")
    return found


def read_training_file(path: str | os.PathLike[str]) -> list[str]:
    """A profile from an adapter's training file, JSON lines with a "prompt" or "messages" (what the user says last):
    up to 20, spread evenly; prompts that are blank say nothing and are left out."""
    prompts = [_read_prompt(line, where) for where, line in read_lines(path)]
    if not any(p.strip() for p in prompts):
        raise InputError(f"{path}: expected prompts, found none")
    return spread(prompts)


def _read_prompt(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
        if "messages" in record or isinstance(record["prompt"], list):
            return parse_example(line, where).request
        prompt = record["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = line.decode(errors="replace")[:60]
        raise InputError(f'{where}: expected {{"prompt": ...}}, found {found!r}') from None
    if not isinstance(prompt, str):
        raise InputError(f"{where}: prompt: expected a string, found {prompt!r:.60}")
    check_text(prompt, f"{where}: prompt")
    return prompt
