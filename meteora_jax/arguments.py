"""What a caller passes to a public function, checked: a line an argument, with what was expected and found."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from meteora_jax.config import InputError
from meteora_jax.text import check_text

MOST = 2**31 - 1  # what the device's int32 holds


class Arguments:
    """Collects what is wrong with the arguments of one call; leaving the `with` block raises all of it at once.

    Args:
        of: whose arguments, in front of their names.
    """

    def __init__(self, of: str = ""):
        self._of, self._problems = f"{of}: " if of else "", []

    def __enter__(self) -> Arguments:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._problems and kind is None:
            raise InputError(self._problems)

    def refuse(self, name: str, expected: str, found: Any) -> None:
        """Notes a problem; `found` is shown as Python writes it, at most 200 characters."""
        self.add(f"{name}: expected {expected}, found {found!r:.200}")

    def add(self, problem: str) -> None:
        """Notes a problem in words."""
        self._problems.append(f"{self._of}{problem}")

    def whole(self, name: str, value: Any, least: int = 1, most: int = MOST, none: bool = False) -> None:
        """A whole number in [least, most] (or None, where `none`); True and 1.0 are not."""
        if none and value is None:
            return
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            self.refuse(name, "a whole number", value)
        elif not least <= int(value) <= most:
            self.refuse(name, f"at least {least}" if int(value) < least else f"at most {most}", value)

    def number(self, name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
        """A finite number for which `holds` is true; `expected` says so in words."""
        sound = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not sound or not math.isfinite(value) or not holds(value):
            self.refuse(name, expected, value)

    def choice(self, name: str, value: Any, options: Collection[str]) -> None:
        """One of some names."""
        if not isinstance(value, str) or value not in options:
            self.refuse(name, f"one of {', '.join(options)}", value)

    def texts(self, name: str, value: Any) -> None:
        """A list of texts; a single one is no list of its characters, and what can be read once is read by this."""
        if isinstance(value, str | bytes | Mapping | Iterator) or not isinstance(value, Iterable):
            self.refuse(name, "a list of texts", value)
            return
        for i, text in enumerate(value):
            if not isinstance(text, str):
                self.refuse(f"{name} {i}", "a text", text)
                continue
            try:
                check_text(text, f"{name} {i}")
            except InputError as e:
                self.add(str(e))

    def stops(self, value: Any) -> None:
        """Texts that end a response."""
        self.texts("stop", value)
        if isinstance(value, Collection) and "" in value:
            self.refuse("stop", "texts that can end a response", "")

    def path(self, name: str, value: Any, none: bool = False) -> None:
        """A path that the system can open (or None, where `none`)."""
        if none and value is None:
            return
        try:
            if isinstance(value, str | os.PathLike) and b"\0" not in os.fsencode(value):
                return
        except (TypeError, UnicodeEncodeError):
            pass
        self.refuse(name, "a path", value)

    def ends(
        self, max_new_tokens: Any, stop: Any
    ) -> tuple[Callable[[int], list[int]], Callable[[int], list[Sequence[str]]]]:
        """What ends responses to so many prompts: `max_new_tokens` and `stop`, one for all or a list of own ones."""
        stop = (stop,) if isinstance(stop, str) else stop
        own_stops = isinstance(stop, Sequence) and len(stop) > 0 and not isinstance(stop[0], str)
        own_numbers = isinstance(max_new_tokens, list | tuple)
        for most in max_new_tokens if own_numbers else [max_new_tokens]:
            self.whole("max_new_tokens", most)
        for texts in stop if own_stops else [stop]:
            self.stops(texts)

        def one_each(name: str, values: Any, own: bool, count: int) -> list[Any]:
            if own and len(values) != count:
                raise InputError(f"{name}: expected one for each of {count} prompts, found {len(values)}")
            return list(values) if own else [values] * count

        def most_of(count: int) -> list[int]:
            return [int(n) for n in one_each("max_new_tokens", max_new_tokens, own_numbers, count)]

        def stops_of(count: int) -> list[Sequence[str]]:
            return one_each("stop", stop, own_stops, count)

        return most_of, stops_of
