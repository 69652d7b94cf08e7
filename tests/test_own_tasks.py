"""`meteora tasks check | split`: what is wrong is said together, an example is shown as training has it, and lines are
divided by the rule, whole or not at all."""

import hashlib
import json
import os

import pytest
from test_cli import refused, run
from worlds import NAMES

from meteora_jax.evaluation.tasks import SPLITS, load_split
from meteora_jax.training.sequences import encode

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many apples?"}]
ANSWER = {"role": "assistant", "content": "3 apples"}


def write(folder, settings=None, **splits):
    folder.mkdir(parents=True)
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        (folder / "task.json").write_text(json.dumps(settings))


def line(i, response="yes", **more):
    return {"prompt": f"Is it {i}?", "response": response, **more}


def test_an_example_is_shown_as_training_has_it(tmp_path, world, capsys):
    talk = {"messages": [*TALK, ANSWER]}
    write(tmp_path / "t" / "sums", train=[line(9), line(1)], test=[line(1), line(2, "no")])
    write(tmp_path / "t" / "talks", test=[talk])
    write(tmp_path / "t" / "composite_2_of_00", test=[line(1, tasks=["a", "b"], answers=["x", "y"])])
    tokenizer = world["model"].tokenizer
    report = tmp_path / "report.json"
    status, out, noted = run(
        capsys, "tasks", "check", tmp_path / "t", "--base", world["base"], "--json", report
    )  # fmt: skip
    assert status == 0
    told = json.loads(report.read_text())
    assert (told["problems"], [task["task"] for task in told["tasks"]]) == ([], ["sums", "talks"])
    for task in told["tasks"]:
        (example, *_) = load_split(tmp_path / "t", task["task"], "test")
        sequence = encode(example, 0, tokenizer, 2, prompt_loss=False)
        assert task["example"]["prompt"] == tokenizer.decode(sequence.tokens[~sequence.loss])
        assert task["example"]["response"] == tokenizer.decode(sequence.tokens[sequence.loss])
        assert task["longest"] >= len(sequence.tokens)
    assert "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n" in out
    assert "3 apples<|im_end|>" in out
    assert "exact, as most responses have at most 40 characters" in " ".join(out.replace("│", "").split())
    assert "note: sums, test: 1 of 2 prompts are in train as well" in noted
    assert "talks/train.jsonl: none, so it can be evaluated but not trained on" in noted
    status, out, _ = run(capsys, "tasks", "check", tmp_path / "t")
    assert status == 0
    assert "system: Be brief.\nuser: How many apples?" in out


def test_all_faults_are_said_together(tmp_path, world, capsys):
    tasks = tmp_path / "t"
    write(tasks / "good", {"metric": "contains"}, train=[line(1)], test=[line(2)])
    write(tasks / "ends", train=[{"messages": TALK}], test=[{"prompt": [*TALK, ANSWER], "response": "x"}])
    write(tasks / "no_test", train=[line(1)])
    write(tasks / "empty", train=[line(1)], test=[])
    write(tasks / "keyed", {"metrics": "exact"}, train=[line(1)], test=[line(2)])
    write(tasks / "unknown", {"metric": "f1"}, train=[line(1)], test=[line(2)])
    write(tasks / "labels", {"labels": ["yes", "maybe"]}, train=[line(1, "no")], test=[line(2)])
    write(tasks / "Good", train=[line(1)], test=[line(2)])
    write(tasks / "a+b", train=[line(1)], test=[line(2)])
    write(tasks / "oracle", train=[line(1)], test=[line(2)])
    write(tasks / "long", train=[line("so " * 400)], test=[line("so " * 400)])
    write(tasks / "nothing", train=[line(1)], test=[{"prompt": "", "response": "x"}, line(2)])
    write(tasks / "stray")
    status, _, noted = run(capsys, "tasks", "check", tasks, "--base", world["base"], "--json", tmp_path / "r.json")
    assert status == 1
    problems = json.loads((tmp_path / "r.json").read_text())["problems"]
    wrong = [said for said in noted.splitlines() if said.startswith("wrong: ")]
    assert wrong == [f"wrong: {problem}" for problem in problems]
    assert noted.splitlines()[-1] == f"error: {tasks}: expected nothing wrong, found the {len(problems)} faults above"
    for said in (
        "/ends/train.jsonl:1: messages: expected the assistant's answer at the end, found the user's message",
        "/ends/test.jsonl:1: prompt: expected a conversation that awaits the assistant, found one that it has answered",
        "/no_test/test.jsonl: expected test examples, found no file (meteora tasks split makes one)",
        "/empty/test.jsonl: expected test examples, found none",
        "/keyed/task.json: metrics: expected one of metric, labels, max_new_tokens, found another key",
        "/unknown/task.json: metric: expected exact, contains, ",
        "/labels/task.json: labels: expected responses of labels, found 'maybe', which none is",
        "/labels/train.jsonl:1: response: expected one of task.json's labels, found 'no'",
        "/Good: expected a name that differs from others by more than case, found good",
        "/a+b: expected a name without , + =, found +",
        "/oracle: expected a name of its own, found one that --systems or --only gives a meaning",
        "/long/test.jsonl:1: expected a prompt of at most 192 tokens, which leave room for an answer, found ",
        "/nothing/test.jsonl:1: expected a prompt of at least one token, found none",
        "/stray/test.jsonl: expected test examples, found no file",
    ):
        assert sum(said in problem for problem in problems) == 1, (said, problems)
    assert "long, train: 1 of 1 sequences exceed the base's context" in noted
    assert "nothing, test: 1 of 2 prompts are empty" in noted
    assert len(problems) == 15  # good differs from Good as well
    assert "expected a folder of TASK/train.jsonl" in refused(capsys, "tasks", "check", tmp_path / "nowhere")


def test_one_fault_is_one_line(tmp_path, world, capsys):
    write(tmp_path / "t" / "talks", train=[line(1)], test=[{"messages": [*TALK, ANSWER]}])
    tokenizer = world["model"].tokenizer
    said = refused(capsys, "tasks", "check", tmp_path / "nowhere")
    assert said.count("\n") <= 1
    template, tokenizer_files = "{{ raise_exception('no system') }}", tmp_path / "base"
    tokenizer_files.mkdir()
    for file in world["base"].iterdir():
        if file.suffix != ".safetensors":
            (tokenizer_files / file.name).write_bytes(file.read_bytes())
    template_file = tokenizer_files / "chat_template.jinja"
    assert template_file.read_text() == tokenizer.chat_template
    template_file.write_text(template)
    status, _, noted = run(capsys, "tasks", "check", tmp_path / "t", "--base", tokenizer_files)
    assert status == 1
    errors = [text for text in noted.splitlines() if not text.startswith("note")]
    assert len(errors) == 1
    assert "talks/test.jsonl:1: expected messages that the chat template takes, found its refusal" in errors[0]


def digit(text):
    return hashlib.sha256(text.strip().encode()).hexdigest()[0]


def rule(text):
    return "test" if digit(text) in "de" else "holdout" if digit(text) == "f" else "train"


def test_lines_are_divided_by_the_digest_of_their_own_input(tmp_path, capsys):
    lines = [line(i % 100, str(i), id=i) for i in range(150)]
    talks = [{"messages": [TALK[0], {"role": "user", "content": f"{i}?"}, ANSWER]} for i in range(100)]
    for name, own in (("sums", lines), ("talks", talks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in own))
    sources = [f"{name}={tmp_path / name}.jsonl" for name in ("sums", "talks")]
    write(tmp_path / "t" / "sums", {"metric": "contains"})
    (tmp_path / "t" / "sums" / "notes").symlink_to("../elsewhere/notes")  # kept, wherever it points
    status, out, _ = run(capsys, "tasks", "split", tmp_path / "t", *sources, "--json", tmp_path / "counts.json")
    assert status == 0
    assert "sums" in out
    counts = json.loads((tmp_path / "counts.json").read_text())
    for name, own, text in (
        ("sums", lines, lambda x: x["prompt"]),
        ("talks", talks, lambda x: x["messages"][1]["content"]),
    ):
        for split in SPLITS:
            found = (tmp_path / "t" / name / f"{split}.jsonl").read_text()
            assert found == "".join(json.dumps(x) + "\n" for x in own if rule(text(x)) == split)
            assert next(c[split] for c in counts if c["task"] == name) == found.count("\n")
    assert (tmp_path / "t" / "sums" / "task.json").is_file()
    assert os.readlink(tmp_path / "t" / "sums" / "notes") == "../elsewhere/notes"
    before = {p: p.read_bytes() for p in (tmp_path / "t").rglob("*") if p.is_file()}
    said = refused(capsys, "tasks", "split", tmp_path / "t", sources[0], f"new={tmp_path / 'sums.jsonl'}")
    assert "sums: expected no train, test or holdout yet, found train.jsonl, test.jsonl, holdout.jsonl" in said
    assert {p: p.read_bytes() for p in (tmp_path / "t").rglob("*") if p.is_file()} == before
    status, _, _ = run(capsys, "tasks", "split", tmp_path / "u", sources[0], "--input", "response")
    assert status == 0
    held = (tmp_path / "u" / "sums" / "holdout.jsonl").read_text().splitlines()
    assert {rule(json.loads(x)["response"]) for x in held} == {"holdout"}


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        ([line(1)], [], "expected lines that the split rule puts into train and test, found "),
        ([line(1), {"prompt": "x"}], [], "all.jsonl:2: response: expected a string, found only the keys"),
        (
            [line(i) for i in range(50)],
            ["--input", "question"],
            "all.jsonl:1: question: expected a text, the",
        ),
        ([line(i) for i in range(50)], ["sums=b.jsonl"], "files: sums: expected once, found twice"),
        ([line(i) for i in range(50)], ["SUMS={file}"], "expected a name that differs from others by more than case"),
        ([line(i) for i in range(50)], ["a+b={file}"], "a+b: expected a name without , + =, found +"),
        ([line(i) for i in range(50)], ["a/b={file}"], "a/b: expected a task's name, found a path or a hidden one"),
        ([line(i) for i in range(50)], ["nowhere"], "files: expected NAME=FILE, found 'nowhere'"),
        ([line(i) for i in range(50)], ["x=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_divided_is_refused_and_nothing_is_written(tmp_path, capsys, lines, words, said):
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = [word.format(file=file) for word in words]
    assert said in refused(capsys, "tasks", "split", tmp_path / "t", f"sums={file}", *words)
    assert not (tmp_path / "t").exists()


@pytest.fixture
def talks(tmp_path):
    """TASKS of conversations, one an adapter of the world's bank."""
    for name in NAMES:
        system = {"role": "system", "content": f"{name}."}
        own = [[system, {"role": "user", "content": f"{name} {i}"}] for i in range(6)]
        lines = [{"messages": [*talk, {"role": "assistant", "content": f"{i}"}]} for i, talk in enumerate(own)]
        write(tmp_path / "t" / name, train=lines, test=lines[:2])
    return tmp_path / "t"


@pytest.mark.exhaustive("two whole trainings more; their sequences are in test_examples")
def test_gates_and_an_adapter_are_trained_on_conversations(tmp_path, talks, world, capsys):
    data = ["--base", world["base"], "--tasks", talks, "--steps", 2, "--batch-size", 2, "--max-length", 256]
    how = ["--composite", 0.5, "--json", tmp_path / "r.json"]
    status, _, noted = run(
        capsys, "train", "gates", *data, *how, "--bank", world["bank"], "--out", tmp_path / "gates"
    )  # fmt: skip
    assert status == 0, noted
    lost = json.loads((tmp_path / "r.json").read_text())["unused"]
    assert lost["examples"] == dict.fromkeys(NAMES, 6)
    assert lost["too_long"] == {}
    one = ["--task", "apple", "--name", "fig", "--out", tmp_path / "fig", "--rank", 2]
    assert run(capsys, "train", "adapter", *data, *how, *one)[0] == 0


def test_an_index_and_composites_are_made_of_conversations(tmp_path, talks, world, capsys):
    line = refused(capsys, "train", "adapter", "--base", world["base"], "--tasks", talks, "--out", tmp_path / "x",
                   "--task", "apple", "apple", "--name", "x")  # fmt: skip
    assert "apple: expected a task once, found it twice" in line
    assert run(capsys, "index", "build", tmp_path / "index", "--tasks", talks)[0] == 0
    status, _, _ = run(capsys, "index", "evaluate", tmp_path / "index", talks, "--json", tmp_path / "i.json")
    assert status == 0
    assert json.loads((tmp_path / "i.json").read_text())["wordings"]["own"]["iid"]["1"] == 100
    compose, how = ["compose", talks], ["--count", 2, "--shots", 0, "--max-new-tokens", 4]
    line = refused(capsys, *compose, "apple+birch", *how)
    assert "expected a base whose tokenizer has a chat template (--base) for the conversations of apple, birch" in line
    line = refused(capsys, *compose, "apple+elm", *how, "--base", world["base"])
    assert "expected the test split of elm, found no file" in line
    assert run(capsys, *compose, "apple+birch", *how, "--base", world["base"])[0] == 0
    (file,) = talks.glob("composite_2_of_*_template_*/test.jsonl")
    problem = json.loads(file.read_text().splitlines()[0])
    assert problem["prompt"].count("<|im_start|>assistant\n") == 2
    assert problem["prompt"].endswith("<|im_start|>assistant\n(2)\n\n")


@pytest.mark.parametrize("target", ["../../elsewhere.jsonl", "data/train.jsonl"])
def test_nothing_is_written_through_a_link_that_leads_nowhere(tmp_path, capsys, target):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(50)))
    (tmp_path / "t" / "sums").mkdir(parents=True)
    (tmp_path / "t" / "sums" / "train.jsonl").symlink_to(target)
    said = refused(capsys, "tasks", "split", tmp_path / "t", f"sums={tmp_path / 'all.jsonl'}")
    assert "sums: expected no train, test or holdout yet, found train.jsonl, which are left as they are" in said
    assert not (tmp_path / "elsewhere.jsonl").exists()


def test_what_cannot_be_copied_beside_the_lines_is_named(tmp_path, capsys):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(50)))
    (tmp_path / "t" / "sums").mkdir(parents=True)
    os.mkfifo(tmp_path / "t" / "sums" / "pipe")
    said = refused(capsys, "tasks", "split", tmp_path / "t", f"sums={tmp_path / 'all.jsonl'}")
    assert f"error: {tmp_path}/t/sums/pipe: cannot be copied (" in said
    assert os.listdir(tmp_path / "t" / "sums") == ["pipe"]
