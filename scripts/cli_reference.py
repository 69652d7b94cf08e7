"""Writes docs/cli.md: what `--help` of every command says. tests/test_docs.py fails where the page is not current.

python scripts/cli_reference.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from meteora_jax.cli import ACTIONS, commands_for, main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 110
HEAD = """\
# Command line

What `meteora COMMAND --help` says of every command. `scripts/cli_reference.py` writes this page.

An error is one line that names file, key and reason. The exit status is 0 when done, 1 when the input was refused,
2 for wrong usage, 75 for a training that SIGTERM ended after saving (the same command goes on), 130 when interrupted,
141 where the reader of its output has gone (`meteora --help | head -1`).

`--json FILE` writes a command's report, whole or not at all; with `--json -` it is all that is on standard output.

`python -m meteora_jax.harness run --model meteora ...` runs the tasks of EleutherAI's lm-evaluation-harness with a
model of this project (install the extra `harness`); its options are the harness's own.
"""


def commands(union: Any = None) -> dict[tuple[str, ...], Any]:
    """{("train", "gates"): TrainGates, ...} in the order in which `meteora --help` lists them."""
    found: dict[tuple[str, ...], Any] = {}
    for entry in get_args(commands_for(["train", "gates"]) if union is None else union):
        assert get_origin(entry) is Annotated
        command, how = get_args(entry)[:2]
        if command in ACTIONS:
            found[how.name,] = command
        else:
            parts = commands(get_type_hints(command, include_extras=True)["what"])
            found |= {(how.name, *words): part for words, part in parts.items()}
    return found


def help_of(*words: str) -> str:
    """What `meteora WORDS --help` prints, without frames around it."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.__setitem__("COLUMNS", before)
    lines: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).splitlines():
        if not re.fullmatch(r" +-+ *", line):
            lines += textwrap.wrap(line, WIDTH) if not line.startswith(" ") else [line.rstrip()]
        elif re.fullmatch(r" \S.*", lines[-1]):  # below a title
            lines[-1] = f"{lines[-1].strip()}:"
        lines += [""] * (not line.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for words in commands():
        parts.append(f"## meteora {' '.join(words)}\n\n```text\n{help_of(*words)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
