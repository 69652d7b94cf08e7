"""Background text: what files may hold, what the base writes by itself, what is refused."""

import json

import pytest
from test_cli import refused, run
from worlds import NAMES

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.io.gates import load_gates
from meteora_jax.training import background
from meteora_jax.training.background import NULL, load_background, read_background, with_background


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
    assert (asked.response, answered.response, asked.prompt) == ("", "Hello", answered.prompt)
    own = tokenizer(asked.prompt)["input_ids"]  # as training reads it: what a caller's messages become
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
        assert example.prompt.startswith(before.partition("|")[0].removeprefix("<|bos|>")[:5])
    monkeypatch.setattr(background, "write_background", None)  # not asked again
    assert load_background(["self"], world["base"], dtype="float32", kept=tmp_path / "own.jsonl") == examples


def test_background_is_so_large_a_share():
    assert with_background({"a": (), "b": (), NULL: ()}, 0.2) == {"a": 0.4, "b": 0.4, NULL: 0.2}


def test_from_the_command_line(tmp_path, capsys, world):
    for name in NAMES:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        written(
            tmp_path / "tasks" / name / "train.jsonl", *[{"prompt": f"{name} {i}\n", "response": "x"} for i in range(8)]
        )
    general = written(tmp_path / "general.txt", "To be or not to be\n", "The sea is calm\n")
    options = ["--base", world["base"], "--bank", world["bank"], "--tasks", tmp_path / "tasks", "--steps", 2,
               "--max-length", 200]  # fmt: skip
    status, _, _ = run(capsys, "train", "gates", *options, "--out", tmp_path / "g", "--background", general)
    assert status == 0
    assert load_gates(tmp_path / "g", world["model"].config, NAMES)[0].null
    line = refused(capsys, "train", "gates", *options, "--out", tmp_path / "x", "--background", tmp_path / "none.txt")
    assert "none.txt" in line
    status, out, _ = run(capsys, "inspect", tmp_path / "g")
    assert status == 0
    assert "null choice" in out
