"""Tokens and text: the tokenizer of a base, and text while its tokens arrive."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_json

Decode = Callable[[Sequence[int]], str]
WINDOW = 16  # tokens of a response that are decoded again to see what the next ones add
PARTS = 4  # bytes, and so tokens, that a character may be in
REPLACEMENT = "\ufffd"  # what a tokenizer prints for bytes that are not yet a whole character
TOKENIZER_FILES = (  # what of a BASE decides how text and messages become tokens
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# {model_type of config.json: {tokenizer_class of tokenizer_config.json, without "Fast": class that AutoTokenizer of
# transformers 5.3 to 5.24 chooses}}: bases, then encoders. The plain class does what tokenizer.json says, nothing more.
PLAIN = dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend"), "PreTrainedTokenizerFast")
CLASSES = {
    "llama": {**PLAIN, "LlamaTokenizer": "LlamaTokenizer"},
    "mistral": {**PLAIN, "LlamaTokenizer": "PreTrainedTokenizerFast"},
    "qwen2": {"Qwen2Tokenizer": "Qwen2Tokenizer"},
    "qwen3": {**PLAIN, "Qwen2Tokenizer": "Qwen2Tokenizer"},
    "bert": {"BertTokenizer": "BertTokenizer"},
    "roberta": {"RobertaTokenizer": "RobertaTokenizer"},
    "xlm-roberta": {"XLMRobertaTokenizer": "XLMRobertaTokenizer"},
    "mpnet": {"MPNetTokenizer": "MPNetTokenizer"},
    "t5": {"T5Tokenizer": "T5Tokenizer"},
}


def check_text(text: str, where: str) -> None:
    """Refuses what UTF-8 cannot hold: half of a character (a lone surrogate), which JSON can spell and files cannot.

    Raises:
        InputError: one line that begins with `where`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"{where}: expected text that UTF-8 can hold, found a lone surrogate at character {e.start}"
        ) from None


class TextStream:
    """The text of one response as its tokens arrive.

    Text is released once no later token can change it: an incomplete character, or a tail that may still
    become a stop string, waits. What `push` and `finish` return adds up to `text`.
    """

    def __init__(self, decode: Decode, stop: Sequence[str]):
        self._decode, self._stop = decode, tuple(s for s in stop if s)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._released = 0
        self._anchor, self._before, self._after = 0, "", ""

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens and returns the text that became certain; ignores what follows a stop string."""
        if not self._stop:
            self.tokens.extend(tokens)
            self._read()
        else:
            for token in tokens:  # one by one: the response ends with the token that completes the stop string
                if self.stopped:
                    break
                self.tokens.append(token)
                self._read()
                found = [at for at in (self.text.find(s) for s in self._stop) if at >= 0]
                if found:
                    self.text, self.stopped = self.text[: min(found)], True
        return self._release(len(self.text) if self.stopped else self._certain())

    def _read(self) -> None:
        """The text of all tokens, of which only the last are decoded: from an anchor on, whose own text is known.

        What decoders do at the beginning (a space that is left out) they do at the anchor too, so that its text is told
        from the whole's by what stood there when it was set: `text` is `before` and what is behind `after`.
        """
        self.text = self._of(len(self.tokens))
        if len(self.tokens) - self._anchor < 2 * WINDOW or self.text.endswith(REPLACEMENT):
            return
        anchor = len(self.tokens) - WINDOW
        after = self._decode(self.tokens[anchor:])
        if after.strip() and not after.startswith(REPLACEMENT):
            self._anchor, self._before, self._after = anchor, self.text, after

    def _of(self, end: int) -> str:
        """The text of the tokens before `end`, which is behind the anchor."""
        return self._before + self._decode(self.tokens[self._anchor : end])[len(self._after) :]

    def finish(self) -> str:
        """The rest, once no token will follow.

        Decoders of tokens for single bytes (LLaMA 2's) give up all bytes in a row where the last are no whole
        character; what stood before that one stays.
        """
        cut = self.text.endswith(REPLACEMENT) and not self.stopped
        for missing in range(1, PARTS) if cut else ():
            whole = self._of(max(len(self.tokens) - missing, self._anchor))
            if not whole.endswith(REPLACEMENT):
                if not (rest := self._decode(self.tokens[-missing:])).strip(REPLACEMENT):
                    self.text = whole + rest
                break
        return self._release(len(self.text))

    def _certain(self) -> int:
        end = len(self.text.rstrip(REPLACEMENT))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if self.text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return end

    def _release(self, end: int) -> str:
        start, self._released = self._released, max(self._released, end)
        return self.text[start : self._released]


def load_tokenizer(base: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in BASE; a tokenizer's own code is neither run nor asked about."""
    import transformers  # slow to import, and logits need no tokenizer

    try:
        kind = getattr(transformers, _class_name(Path(base)))
        return kind.from_pretrained(Path(base), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # what tokenizers and transformers raise at damaged files is of no one kind
        said = (
            "ones that need code of their own, which is not run" if "custom code" in str(e) else f"none that load ({e})"
        )
        raise InputError(f"{base}: expected a tokenizer's files, found {said}") from None


def tokenizer_digest(base: str | os.PathLike[str]) -> str:
    """SHA-256 of the tokenizer's files in BASE, its chat template among them. The files and not what they make of a
    text: some templates write the day's date.

    Raises:
        InputError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in (Path(base) / name for name in TOKENIZER_FILES):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror})") from None
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _class_name(base: Path) -> str:
    """The class of transformers that `AutoTokenizer` chooses for BASE; "AutoTokenizer" where it has to choose itself.

    AutoTokenizer imports the configurations of models, and they PyTorch where it is installed, which took 11 s on a
    machine with GPUs. The classes import no configurations, and from transformers 5.18 on no PyTorch.
    """
    try:
        family = read_json(base / "config.json")["model_type"]
        settings = read_json(base / "tokenizer_config.json")
        chosen = CLASSES[family][settings["tokenizer_class"].removesuffix("Fast")]
        if "auto_map" in settings or (family == "mistral" and find_spec("mistral_common")):
            return "AutoTokenizer"  # a class of one's own, or of Mistral's package
        if chosen == "LlamaTokenizer" and '"ByteLevel"' in (base / "tokenizer.json").read_text(encoding="utf-8"):
            return "AutoTokenizer"  # some versions of transformers choose another class for such a file
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return "AutoTokenizer"  # files are missing, or say something else: it knows, or says what is wrong
    return chosen
