"""Tool calls in what a model wrote, in the two notations that chat templates teach."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, Literal

from meteora_jax.serving.errors import ApiError

Notation = Literal["tags", "json"]
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def notation_of(template: Any) -> Notation:
    """How a chat template has its model write calls: between <tool_call> tags (Hermes, Qwen), or as an object that is
    the whole answer (Llama 3).

    Raises:
        ApiError: the template defines no tools, or another notation.
    """
    text = template if isinstance(template, str) else ""
    if "tools" in text and "<tool_call>" in text:
        return "tags"
    if "tools" in text and '"parameters"' in text and '"name"' in text:
        return "json"
    raise ApiError(400, "tools: this model's chat template defines none that are understood", param="tools")


def read_calls(text: str, notation: Notation, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """What was said beside the calls, and the calls in OpenAI's form. A text that is no call of a known tool stays a
    text."""
    if notation == "tags":
        found = [_call(body, names) for body in TAGGED.findall(text)]
        calls = [call for call in found if call is not None]
        if not calls or len(calls) != len(found):
            return text, []
        return TAGGED.sub("", text).strip(), calls
    call = _call(text.strip().removeprefix("<|python_tag|>"), names)
    return ("", [call]) if call is not None else (text, [])


def _call(body: str, names: set[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        arguments = {} if arguments is None else arguments
        # NaN and numbers beyond a float's are no JSON, though Python reads them
        written = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        )
    except (ValueError, RecursionError):
        return None
    function = {"name": value["name"], "arguments": written}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
