"""Background text: what files may hold, what the base writes by itself, what is refused.

Run as a script it is one of two hosts.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from meshes import environment
from test_cli import refused, run
from test_training_mesh import free_port, together
from worlds import NAMES

from meteora_jax.config import InputError
from meteora_jax.examples import Example, as_text, of_messages, prompt_ids
from meteora_jax.io.gates import load_gates
from meteora_jax.sharding import initialize_distributed
from meteora_jax.training import background, gates
from meteora_jax.training.background import NULL, in_frames, load_background, read_background, with_background


def written(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_files_of_every_kind(tmp_path, world):
    tokenizer = world["model"].tokenizer
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    file = written(
        tmp_path / "a.jsonl", {"prompt": "One\n", "response": "two"}, {"prompt": "A system prompt for all"},
        {"messages": chat}, {"messages": [*chat, {"role": "assistant", "content": "Hello"}]},
    )  # fmt: skip
    plain, shared, asked, answered = read_background(file, tokenizer)
    assert (plain, shared) == (Example("One\n", "two"), Example("A system prompt for all", ""))
    assert (asked.response, answered.response, asked.messages) == ("", "Hello", answered.messages)
    (own,) = prompt_ids([asked], tokenizer)  # as training reads it: what a caller's messages become
    assert own == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    text = written(tmp_path / "a.txt", "To be or not to be\n", "\n", "Word\n")
    assert read_background(text, tokenizer) == [Example("To be or not", " to be"), Example("Word", "")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{}\n", r'a.jsonl:1: expected {"prompt": ...} or {"messages": \[...\]}'),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl:1: prompt: expected a string, found 3"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "expected some before the assistant's"),
        ("a.jsonl", '{"messages": "x"}\n', "expected a list of messages"),
        ("a.jsonl", "", "a.jsonl: expected background text, found none"),
        ("a.txt", "\n \n", "a.txt: expected background text, found none"),
        ("a.txt", None, "a.txt: expected a file of background text, or 'self'"),
    ],
)
def test_what_is_no_background_is_refused(tmp_path, world, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_background(tmp_path / name, world["model"].tokenizer)


def test_the_base_writes_by_itself_and_what_it_wrote_is_kept(tmp_path, world, monkeypatch):
    monkeypatch.setattr(background, "ROWS", 16)
    examples = load_background(["self"], world["base"], dtype="float32", kept=tmp_path / "own.jsonl", count=3)
    assert len(examples) == 3
    before = world["model"].tokenizer.apply_chat_template([{"role": "user", "content": "|"}], tokenize=False)
    for example in examples:
        assert as_text(example, world["model"].tokenizer).prompt.startswith(before.partition("|")[0][:5])
    monkeypatch.setattr(background, "write_background", None)  # not asked again
    assert load_background(["self"], world["base"], dtype="float32", kept=tmp_path / "own.jsonl", count=3) == examples
    assert read_background(tmp_path / "own.jsonl", world["model"].tokenizer) == examples  # as a file of one's own


def by_seed(base, count, *, dtype, seed=0, mesh=None):
    """Stands for what the base writes."""
    return [Example(f"{dtype} {seed} {i}", "x") for i in range(count)]


def test_what_another_run_s_base_wrote_is_not_taken(tmp_path, world, monkeypatch):
    monkeypatch.setattr(background, "write_background", by_seed)
    base, kept = tmp_path / "base", tmp_path / "run" / "background.jsonl"
    shutil.copytree(world["base"], base)

    def first(**how):
        how = {"dtype": "float32", "seed": 0, "count": 2} | how
        return load_background(["self"], base, kept=kept, **how)[0].prompt

    assert first() == "float32 0 0"
    assert first(seed=1) == "float32 1 0"
    assert first(seed=1, dtype="bfloat16") == "bfloat16 1 0"
    assert len(load_background(["self"], base, dtype="bfloat16", seed=1, kept=kept, count=3)) == 3
    written(kept, {"prompt": "by an earlier version", "response": ""})
    assert first() == "float32 0 0"
    for file in ("chat_template.jinja", "config.json"):
        kept.write_text(kept.read_text().replace("float32 0 0", "old"))
        assert first() == "old"
        if file == "config.json":
            config = json.loads((base / file).read_text())
            (base / file).write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        else:
            (base / file).write_text((base / file).read_text() + " ")
        assert first() == "float32 0 0"
    (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True)  # which say whose they are
    assert first(seed=1) == "float32 0 0"
    written(kept, {"prompt": "by an earlier version", "response": ""})
    assert first() == "by an earlier version"


def test_hosts_without_a_disk_in_common_take_the_first_one_s(tmp_path, world, monkeypatch):
    monkeypatch.setattr(background, "write_background", by_seed)
    load_background(["self"], world["base"], dtype="float32", kept=tmp_path / "0" / "own.jsonl", count=3)
    load_background(["self"], world["base"], dtype="float32", seed=1, kept=tmp_path / "1" / "own.jsonl", count=3)
    address = f"127.0.0.1:{free_port()}"
    together(
        [[sys.executable, __file__, address, str(i), str(world["base"]), str(tmp_path)] for i in range(2)],
        environment(1),
    )
    assert [(tmp_path / str(i) / "found").read_text() for i in range(2)] == ["float32 0 0"] * 2


def one_host(address: str, index: str, base: str, folder: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize_distributed(address, 2, int(index))
    own = Path(folder) / index
    examples = load_background(["self"], base, dtype="float32", kept=own / "own.jsonl", count=3)
    (own / "found").write_text(examples[0].prompt)


def test_only_the_run_that_has_the_folder_removes_what_the_base_wrote(tmp_path, capsys, world, monkeypatch):
    monkeypatch.setattr(background, "write_background", by_seed)
    run_folder = tmp_path / "g-run"
    run_folder.mkdir()
    kept = written(run_folder / "background.jsonl", {"prompt": "of the run at work", "response": ""})
    for name in NAMES:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        written(tmp_path / "tasks" / name / "train.jsonl", {"prompt": f"{name}\n", "response": "x"})
    command = ["train", "gates", "--base", world["base"], "--bank", world["bank"], "--tasks", tmp_path / "tasks",
               "--out", tmp_path / "g", "--background", "self", "--no-resume"]  # fmt: skip
    code = (
        "import fcntl, sys; held = open(sys.argv[1], 'a'); fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True); input()"
    )
    holder = [sys.executable, "-c", code, str(run_folder / ".lock")]
    other = subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert "expected no other process to train here" in refused(capsys, *command)
        assert "of the run at work" in kept.read_text()
    finally:
        other.communicate("")

    def train(*given, background, **how):
        assert subprocess.run(holder, capture_output=True).returncode == 1  # the folder is this run's already
        raise InputError(background[0].prompt)

    monkeypatch.setattr(gates, "train_gates", train)
    assert refused(capsys, *command).endswith(" 0 0")
    assert "of the run at work" not in kept.read_text()


def test_it_is_read_in_the_frames_that_tasks_share_too(world):
    """Of text, each with its own; of messages the chat template's with its system prompt; none of a single task's."""
    tokenizer = world["model"].tokenizer

    def asked(said):
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": said}]

    tasks = {name: [Example(f"[INST] {name}: of {i}? [/INST]\n", "x") for i in range(9)] for name in NAMES[:2]}
    tasks |= {name: [of_messages(asked(f"{name} {i}"), "x", "", "") for i in range(9)] for name in NAMES[2:]}
    tasks["alone"] = [Example(f"### Add 1 to {i}\n###", "x") for i in range(9)]
    background = [Example("The sea?\n", "calm"), of_messages([{"role": "user", "content": "Hi"}], "Hello", "", "")]
    background += [Example("[INST] Who? [/INST]\n", ""), Example("Why?", "")]
    found = in_frames(background, tasks, tokenizer)
    assert found[:4] == background
    chat = as_text(of_messages(asked("Hi"), "", "", ""), tokenizer).prompt
    assert found[4:] == [
        Example("[INST] The sea? [/INST]\n", "calm"), Example(chat, "Hello"),
        Example(chat.replace("Hi", "Why?"), ""),
    ]  # fmt: skip
    assert in_frames(background, {"alone": tasks["alone"]}, tokenizer) == background


def test_background_is_so_large_a_share():
    assert with_background({"a": (), "b": (), NULL: ()}, 0.2) == {"a": 0.4, "b": 0.4, NULL: 0.2}


def test_from_the_command_line(tmp_path, capsys, world, monkeypatch):
    monkeypatch.setattr(background, "write_background", by_seed)
    for name in NAMES:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        written(
            tmp_path / "tasks" / name / "train.jsonl", *[{"prompt": f"{name} {i}\n", "response": "x"} for i in range(8)]
        )
    general = written(tmp_path / "general.txt", "To be or not to be\n", "The sea is calm\n")
    options = ["--base", world["base"], "--bank", world["bank"], "--tasks", tmp_path / "tasks", "--steps", 2,
               "--max-length", 200]  # fmt: skip
    status, _, _ = run(capsys, "train", "gates", *options, "--out", tmp_path / "g", "--background", general, "self")
    assert status == 0
    assert len((tmp_path / "g-run" / "background.jsonl").read_text().splitlines()) == background.COUNT
    assert load_gates(tmp_path / "g", world["model"].config, NAMES)[0].null
    line = refused(capsys, "train", "gates", *options, "--out", tmp_path / "x", "--background", tmp_path / "none.txt")
    assert "none.txt" in line
    status, out, _ = run(capsys, "inspect", tmp_path / "g")
    assert status == 0
    assert "null choice" in out


if __name__ == "__main__":
    one_host(*sys.argv[1:])
