"""Copies of adapters into slots that fail."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from meteora_jax.config import InputError
from meteora_jax.engine.copies import Coming, Copies


@pytest.mark.parametrize("error", [KeyError(7), MemoryError("no room"), InputError("damaged")])
def test_a_copy_that_fails_is_its_own_adapter_s_failure(error: Exception):
    """Unloaded meanwhile, or whatever happens to a reader: the pool goes on."""
    for known in (True, False):
        failed: Future[Any] = Future()
        failed.set_exception(error)
        copies: Any = SimpleNamespace(_coming={7: Coming((0,), False, failed)}, failed={})
        assert Copies.advance(copies, lambda n, known=known: known) == 0
        assert copies._coming == {}
        assert [type(e) for e in copies.failed.values()] == [InputError] * known
