"""How much runs: by default what proves each thing once, with `./scripts/test.sh --all` everything."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

ALL = "METEORA_TEST_ALL" in os.environ  # conftest.py sets it, so that workers and child processes know as well


def examples(few: int, many: int) -> int:
    """The number of random examples, mutants or cases: `few`, or `many` with --all."""
    return many if ALL else few


def parameters(values: Iterable[Any], kept: Iterable[Any], reason: str) -> list[Any]:
    """Values for `pytest.mark.parametrize` of which all but the `kept` ones are marked exhaustive for that reason."""
    kept, mark = list(kept), pytest.mark.exhaustive(reason)
    return [v if v in kept else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=mark) for v in values]
