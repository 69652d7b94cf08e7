"""Answers of a form: JSON schemas and regular expressions as masks over the next token, by llguidance."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.serving.errors import ApiError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LOG = logging.getLogger(__name__)
MOST_GRAMMAR = 100_000  # characters of a schema or an expression
# Free whitespace between JSON's parts lets small models write nothing else until their limit.
ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """What answers of one model may be bound to. The tokenizer is prepared at the first use (about a second)."""

    def __init__(self, tokenizer: Any, vocabulary: int, end: Sequence[int]):
        """tokenizer: transformers' own. vocabulary: of the model's logits. end: the tokens that end a response."""
        self._source, self.vocabulary, self.end = tokenizer, vocabulary, tuple(end)
        self._tokenizer: LLTokenizer | None = None

    @property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it.

        Raises:
            ApiError: there is none of a kind that it reads.
        """
        if self._tokenizer is None:
            from llguidance.hf import from_tokenizer

            if not self.end:
                raise ApiError(400, "response_format: expected a model with an end token, found one without")
            try:
                self._tokenizer = from_tokenizer(self._source, self.vocabulary, list(self.end))
            except Exception as e:  # the library raises several kinds at tokenizers it does not know
                LOG.warning("llguidance cannot read the tokenizer: %s", e)
                raise ApiError(400, "response_format: not supported with this model's tokenizer") from None
        return self._tokenizer

    def read(self, response_format: dict[str, Any] | None) -> str | None:
        """The grammar of a request's response_format; None: any text.

        Raises:
            ApiError: a format that is unknown, or a schema or an expression that cannot be followed.
        """
        kind = None if response_format is None else response_format.get("type")
        if response_format is None or kind == "text":
            return None
        from llguidance import LLMatcher

        grammar = ""
        try:
            if kind == "json_object":
                grammar = LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=ONE_LINE)
            elif kind == "json_schema":
                named = response_format.get("json_schema")
                named = {} if named is None else named
                if not isinstance(named, dict):
                    found = f"expected an object with a schema, found {named!r:.100}"
                    raise ApiError(400, f"response_format.json_schema: {found}", param="response_format")
                schema = named.get("schema", {"type": "object"})
                _limit(json.dumps(schema))
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=ONE_LINE)
            elif kind == "regex":
                expression = response_format.get("regex")
                if not isinstance(expression, str):
                    raise ApiError(400, "response_format.regex: expected a text", param="response_format")
                grammar = LLMatcher.grammar_from_regex(_limit(expression))
            else:
                expected = "expected text, json_object, json_schema or regex"
                raise ApiError(400, f"response_format.type: {expected}, found {kind!r:.100}", param="response_format")
            failed, said = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        except (ValueError, TypeError, RecursionError) as e:
            failed, said = True, [str(e)]
        if failed:
            problem = " ".join("; ".join(said).split())[:500]
            raise ApiError(400, f"response_format: cannot be followed: {problem}", param="response_format")
        return grammar

    def guide(self, grammar: str) -> GrammarGuide:
        """A guide for one response."""
        from llguidance import LLMatcher

        return GrammarGuide(LLMatcher(self.tokenizer, grammar, log_level=0), self.vocabulary, self.end)


def _limit(text: str) -> str:
    if len(text) > MOST_GRAMMAR:
        expected = f"expected at most {MOST_GRAMMAR} characters, found {len(text)}"
        raise ApiError(400, f"response_format: {expected}", param="response_format")
    return text


class GrammarGuide:
    """Follows one response through its grammar; after a `failure` only an end token may follow."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, end: Sequence[int]):
        self._matcher, self._seen, self._width = matcher, 0, -(-vocabulary // 32)
        self._ends = np.zeros((self._width,), np.uint32)
        for token in end:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self.failure = ""

    def allow(self, tokens: Sequence[int]) -> np.ndarray:
        """As `engine.request.Guide`."""
        try:
            fresh = list(tokens[self._seen :])
            self._seen = len(tokens)
            if fresh:
                self._matcher.consume_tokens(fresh)
            if self._matcher.is_error():
                raise InputError(self._matcher.get_error())
            if self._matcher.is_stopped():
                return self._ends
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._width]
            allowed = np.pad(bits, (0, self._width - len(bits)))
            if not allowed.any():
                raise InputError(self._matcher.get_error() or "no token may follow")
            return allowed
        except Exception as e:  # one answer's grammar must not end the others'
            self.failure = str(e) or type(e).__name__
            return self._ends
