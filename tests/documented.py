"""Code of README and docs, taken out of their pages and run on tiny folders.

A page's blocks of bash and python run one after another in one folder, as a reader would type them, whatever is not
marked. Marks stand on the line above a block and show on no page:

    <!-- not run: why -->       its `meteora` lines are parsed, its Python is compiled, files that it names exist
    <!-- small: --steps 2 -->   these words stand behind every `meteora` line, where the last of an option counts
    <!-- slow: --steps 2 -->    the same with pytest --all, without as `not run`; other tests have the steps
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from extent import ALL
from tiny import tiny_llama, tiny_peft

import converters
from meteora_jax.cli import main, parse
from meteora_jax.config import InputError, read_json
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io import hf_config
from meteora_jax.io.gates import fresh_gates, save_gates

ROOT = Path(__file__).parents[1]
GENERATED = {"cli.md"}  # tests/test_docs.py compares it with what its script writes
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in GENERATED)]
LANGUAGES = {"bash", "python", "text", "json", "yaml"}
BLOCK = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>\S*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
DEMO = (
    "abstract_narrative_understanding", "disfl_qa", "goal_step_wikihow", "logical_deduction", "object_counting",
    "question_selection", "strategyqa", "winowhy",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of code. where: its page and line. not_run: why it is left out; None: it is run."""

    where: str
    language: str
    code: str
    not_run: str | None
    small: tuple[str, ...]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of bash and python; fails for a mark that says nothing, and for a language that is unknown here."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        where = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
        assert match["language"] in LANGUAGES, f"{where}: expected one of {sorted(LANGUAGES)}"
        kind, _, words = (match["mark"] or "").partition(": ")
        assert kind in ("", "not run", "small", "slow"), f"{where}: unknown mark {match['mark']!r}"
        assert kind in ("", "slow") or words.strip(), f"{where}: expected a reason or options behind the mark"
        for file in re.findall(r"tests/\w+\.py", words):
            assert (ROOT / file).exists(), f"{where}: {file} is no file of the project"
        if match["language"] in ("bash", "python"):
            why = words if kind == "not run" else "slow" if kind == "slow" and not ALL else None
            small = tuple(shlex.split(words)) if kind in ("small", "slow") else ()
            found.append(Block(where, match["language"], match["code"], why, small))
    return found


def commands_of(code: str) -> list[str]:
    """The commands of a bash block: lines, joined where a backslash or an open quotation mark continues them."""
    found, open_line = [], ""
    for line in code.replace("\\\n", "").splitlines():
        open_line += line
        try:
            shlex.split(open_line, comments=True)
        except ValueError:  # no closing quotation
            open_line += "\n"
            continue
        found += [open_line] if open_line.strip() else []
        open_line = ""
    assert not open_line, f"a quotation without an end: {open_line}"
    return found


def check_block(block: Block) -> None:
    """What can be said of a block without running it, in a folder that `make_folders` made: what `--extend` names is
    read with the options."""
    if block.language == "python":
        ast.parse(block.code)
        return
    for line in commands_of(block.code):
        words = shlex.split(line, comments=True)
        for word in words:
            if re.match(r"(\./)?(scripts|tests|docs)/[\w./-]+$", word):
                assert (ROOT / word).exists(), f"{block.where}: {word} is no file of the project"
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["meteora"] and words[1:2] not in (["--version"], ["--help"]):
            try:
                parse([w for w in words[1:] if w not in ("&", "&&")])
            except (SystemExit, InputError) as e:
                raise AssertionError(f"{block.where}: meteora does not take: {line}") from e


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Runs a block in a folder. names: what the page's Python has defined so far."""
    if block.language == "python":
        exec(compile(block.code, block.where, "exec"), names)
        return
    other: list[str] = []

    def shell(code: str) -> bytes:
        done = subprocess.run(["bash", "-euc", code], cwd=folder, capture_output=True)
        assert done.returncode == 0, f"{block.where}: {code}\n{done.stderr.decode()[-2000:]}"
        return done.stdout

    for line in [*commands_of(block.code), ""]:
        if line and not line.startswith("meteora "):
            assert "meteora " not in line.partition("#")[0], f"{block.where}: a meteora command needs its own line"
            other.append(line)
            continue
        if other:
            shell("\n".join(other))
            other = []
        if line:
            words = shell(f"printf '%s\\0' {line.removeprefix('meteora ')}\n").decode().split("\0")[:-1]
            status = status_of([*words, *block.small])
            assert not status, f"{block.where}: status {status}: {line}"


def status_of(words: list[str]) -> str | int | None:
    """The exit status of a `meteora` command; None: it returned."""
    try:
        main(words)
    except SystemExit as e:
        return e.code
    return None


def write_tasks(folder: Path) -> None:
    """TASKS with the demo's names: prompts and responses of a few words."""
    for t, name in enumerate(DEMO):
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 24), ("test", 4)):
            lines = [
                {"prompt": f"{name[:4]} {split} {i}?", "response": ("yes", "no", "two")[(i + t) % 3]}
                for i in range(count)
            ]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_folders(folder: Path) -> None:
    """What pages suppose to be there, tiny: the demo's base, bank, gates, tasks and PEFT adapters; a Hugging Face model
    `my-model` and PEFT adapters `my-adapters/poems` and `sums` of it."""
    _, source = tiny_llama(
        folder, num_hidden_layers=2, hidden_size=32, intermediate_size=48, max_position_embeddings=1024,
        folder="my-model",
    )  # fmt: skip
    demo = folder / "runs" / "demo"
    demo.mkdir(parents=True)
    converters.import_base(source, demo / "base")
    small = dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    adapters = folder / "scripts" / "demo" / "adapters"
    peft = {name: tiny_peft(adapters, source, name, seed=i, **small) for i, name in enumerate(DEMO)}
    for i, name in enumerate(("poems", "sums")):
        tiny_peft(folder / "my-adapters", source, name, seed=9 + i, **small)
    converters.import_adapters(demo / "bank", demo / "base", peft)
    config = hf_config.from_hf(read_json(demo / "base" / "config.json"))
    form = TokenRouterForm(32, 2)
    for gates in (demo / "gates", folder / "runs" / "try" / "gates"):  # the second: add-adapter.md makes it
        save_gates(gates, GateConfig(DEMO, 2, 1.0, form), fresh_gates(form, config, len(DEMO), seed=0))
    write_tasks(folder / "runs" / "tasks")
