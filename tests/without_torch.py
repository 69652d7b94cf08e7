"""Imported by programs that tests start: they find no torch, as where only meteora_jax is installed.

transformers, which reads tokenizers, then imports what needs none: a program begins five seconds of a core sooner.
"""

import sys

sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  (Python's own way to say that there is none)
