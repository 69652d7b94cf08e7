"""Settings of training with each value under its own name alone, wherever it is declared: tests stay short."""

import dataclasses
from typing import Any, TypeVar

from meteora_jax.training.settings import Training

T = TypeVar("T", bound=Training)


def flat(kind: type[T], **given: Any) -> T:
    """`kind(data=Data(batch_size=...), optimization=Optimization(steps=...), ...)` of the values given."""
    settings = {f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            own = {f.name: given.pop(f.name) for f in dataclasses.fields(field.default) if f.name in given}
            settings[field.name] = dataclasses.replace(field.default, **own)
    assert not given, given
    return kind(**settings)


def changed(settings: T, **given: Any) -> T:
    """The settings with some values changed, each by its own name alone."""
    groups = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    own = {name: given.pop(name) for name in groups if name in given}
    for name, group in groups.items():
        if dataclasses.is_dataclass(group):
            inside = {f.name: given.pop(f.name) for f in dataclasses.fields(group) if f.name in given}
            own |= {name: dataclasses.replace(group, **inside)} if inside else {}
    assert not given, given
    return dataclasses.replace(settings, **own)
