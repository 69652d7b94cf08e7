"""Background text: what files may hold, what the base writes by itself, what is refused."""

import json

import pytest
from test_cli import refused, run
from worlds import NAMES

from meteora_jax.config import InputError
from meteora_jax.examples import Example, as_text, of_messages, prompt_ids
from meteora_jax.io.gates import load_gates
from meteora_jax.training import background
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
    assert load_background(["self"], world["base"], dtype="float32", kept=tmp_path / "own.jsonl") == examples


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
