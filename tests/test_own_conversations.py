"""Conversations with each system's own earlier answers: what is asked, what is recorded, and by several processes."""

import collections
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from extent import parameters
from meshes import environment
from test_conversations import EXAMPLES, VERBS, WANTED
from tiny import edit_json
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.cli.evaluate import Evaluate, answering
from meteora_jax.config import InputError
from meteora_jax.evaluation import runner
from meteora_jax.evaluation.conversations import CONVERSATIONS, OWN_CONVERSATIONS, load_conversations
from meteora_jax.evaluation.problems import Problem, with_earlier
from meteora_jax.evaluation.systems import Given, make_system
from meteora_jax.evaluation.table import markdown, tabulate
from meteora_jax.evaluation.tasks import Example, write_splits

METEORA = (sys.executable, str(Path(__file__).with_name("command.py")))
LIMIT = 30


def write_tasks(root):
    for task, own in EXAMPLES.items():
        write_splits(root / task, {"test": own})
    return root


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


def no_progress(done, total, system):
    pass


def reply(system: str, problem: Problem) -> str:
    """An answer that tells who was asked what, to the last letter of the context; now and then it is right or empty."""
    whole = json.dumps([system, problem.asked])
    number = sum(map(ord, whole)) + len(whole)
    return {0: "", 1: problem.response}.get(number % 7, f"{system} {number}")


class Echo:
    """An `Answer` that keeps what it was asked, round by round; dies instead of its answer number `dies`."""

    def __init__(self, dies: int = -1):
        self.rounds, self.dies = [], dies

    def __call__(self, asked):
        self.rounds.append(list(asked))
        for place in reversed(range(len(asked))):  # whoever ends first is recorded first
            self.dies -= 1
            if self.dies == -1:
                raise KeyboardInterrupt
            yield place, {"answer": reply(*asked[place]), "tokens": 1}


def run(tasks, out, answer, limit: int | None = LIMIT, others=None):
    problems = load_conversations(tasks, OWN_CONVERSATIONS, NAMES, limit, 8)
    records = runner.Records(out, {"base": "x"})
    runner.run(with_earlier(problems), {"mine": answer, "theirs": answer, **(others or {})}, records, no_progress)
    return records, problems


def test_a_turn_stands_behind_the_system_s_own_answers(tasks, tmp_path):
    """Which are those of nobody else, and in no place of small talk; the row is the turns of the other row."""
    echo, alone = Echo(), Echo()
    records, problems = run(tasks, tmp_path / "run", echo, others={"alone": alone})
    right = load_conversations(tasks, CONVERSATIONS, NAMES, LIMIT, 8)
    assert [(p.messages, p.response, p.turn, p.asks) for p in problems] == [
        (p.messages, p.response, p.turn, p.asks) for p in right
    ]
    assert [p.id.removeprefix("own-") for p in problems] == [p.id for p in right]
    assert {p.task for p in problems} == {OWN_CONVERSATIONS}
    every = with_earlier(problems)
    assert len(every) > len(problems)
    longest = max(p.turn for p in problems)
    for asked, systems in ((echo, ("mine", "theirs")), (alone, ("alone",))):
        assert [{p.turn for _, p in own} for own in asked.rounds] == [{turn} for turn in range(1, longest + 1)]
        for own in asked.rounds:
            assert collections.Counter(s for s, _ in own) == dict.fromkeys(systems, len(own) // len(systems))
            lengths = [len(p.prompt) for _, p in own]
            assert lengths == sorted(lengths, reverse=True)
    seen = {(s, p.id): p for answer in (echo, alone) for own in answer.rounds for s, p in own}
    assert set(seen) == {(s, p.id) for s in ("mine", "theirs", "alone") for p in every} == set(records.done)
    wrong = 0
    for (system, name), asked in seen.items():
        problem = next(p for p in every if p.id == name)
        row, conversation, place = name.split("/")
        said = [records.done[system, f"{row}/{conversation}/{i}"]["answer"] for i in range(1, int(place))]
        wrong += len([a for a in said if a.startswith(system)])
        expected, own = [], iter(said)
        for message, before in zip(problem.messages, [{"content": ""}, *problem.messages], strict=False):
            question = before["content"].removeprefix("Say how often.\n") in WANTED
            expected.append({**message, "content": next(own)} if question else message)
        assert next(own, None) is None
        assert list(asked.messages) == expected
        assert (asked.prompt, asked.request) == (problem.prompt, problem.request)
        record = records.done[system, name]
        assert record["answer"] == reply(system, asked)
        assert [*record["messages"]] == [*problem.messages]
        assert [*record.get("asked", problem.messages)] == expected
        assert ("asked" in record) == (place != "1")
    assert wrong > 100


def test_the_table_has_the_turns_of_the_other_row(tasks, tmp_path):
    records, problems = run(tasks, tmp_path / "run", Echo())
    table = tabulate(problems, ["mine", "theirs"], records.answers)
    cell = table["tasks"][OWN_CONVERSATIONS]["mine"]
    assert cell["problems"] == cell["asked"] == LIMIT < len(records.done) / 2
    count = collections.Counter(str(p.turn) for p in problems)
    assert {turn: asked for turn, (_, asked) in cell["turns"].items()} == count
    (difference,) = table["differences"]
    assert (difference["row"], difference["score"]) == (OWN_CONVERSATIONS, "correct")
    assert f"| {OWN_CONVERSATIONS}, turn 2 | {LIMIT} |" in markdown(table, ["mine", "theirs"])


@pytest.mark.parametrize("dies", [3, 30, 100])
def test_a_killed_run_goes_on_with_what_was_said(tasks, tmp_path, monkeypatch, dies):
    monkeypatch.setattr(runner, "KEPT", 2)
    whole, _ = run(tasks, tmp_path / "whole", Echo())
    with pytest.raises(KeyboardInterrupt):
        run(tasks, tmp_path / "run", Echo(dies))
    file = tmp_path / "run" / runner.RECORDS
    file.write_bytes(file.read_bytes()[:-5])  # the kill came while a line was written
    again = Echo()
    records, _ = run(tasks, tmp_path / "run", again)
    assert sum(map(len, again.rounds)) == len(whole.done) - dies // 2 * 2 + 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(whole.done) == len(records.done)
    wanted = map(json.loads, (tmp_path / "whole" / runner.RECORDS).read_text().splitlines())
    assert {(r["system"], r["id"]): r for r in lines} == {(r["system"], r["id"]): r for r in wanted}


def test_records_of_other_right_answers_are_refused(tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    run(tasks, tmp_path / "run", Echo())
    more, fewer = Echo(), Echo()
    run(tasks, tmp_path / "run", more, limit=LIMIT + 5)
    assert {p.turn for own in more.rounds for _, p in own} > {1, 2}
    run(tasks, tmp_path / "run", fewer, limit=LIMIT - 5)
    assert fewer.rounds == []
    changed = [Example(e.prompt, f"{e.response}!") for e in EXAMPLES["apple"]]
    write_splits(tasks / "apple", {"test": changed})
    with pytest.raises(InputError, match="expected the problem of the task's file, found another one"):
        run(tasks, tmp_path / "run", Echo())


# With a model


@pytest.fixture(scope="module")
def given(world, tasks, tmp_path_factory):
    """The command without its systems and --out, on the world's model with a context that most turns fit."""
    root = tmp_path_factory.mktemp("own-model")
    shutil.copytree(world["base"], root / "base")
    edit_json(root / "base" / "config.json", max_position_embeddings=1024)
    index = mj.Index.build({t: [VERBS[t], f"{VERBS[t]} number"] for t in NAMES})
    index.save(root / "index")
    words = ["evaluate", "--base", str(root / "base"), "--bank", str(world["bank"]), "--gates", str(world["gates"])]
    words += ["--tasks", str(tasks), "--index", str(root / "index"), "--composite", "conversations,own-conversations"]
    return [*words, "--limit", "4", "--max-new-tokens", "6", "--systems", "oracle,gates-top2,retrieval-selection-k1"]


def records_of(out):
    return {(r["system"], r["id"]): r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}


def test_a_command_asks_turns_behind_own_answers(given, tasks, tmp_path, capsys):
    main([*given, "--out", str(tmp_path / "run")])
    records = records_of(tmp_path / "run")
    turns = {key: r for key, r in records.items() if r["task"] == OWN_CONVERSATIONS}
    assert {s for s, _ in turns} == {"oracle", "gates-top2", "retrieval-selection-k1"}
    later = {key: r for key, r in turns.items() if r["turn"] > 1}
    assert len({r["turn"] for r in later.values()}) > 1
    model = mj.load(*(given[given.index(word) + 1] for word in ("--base", "--bank", "--gates")), dtype="float32")
    differ, long = 0, max(later, key=lambda key: later[key]["turn"])
    for (system, name), r in later.items():
        row, conversation, _ = name.split("/")
        said = [turns[system, f"{row}/{conversation}/{i}"]["answer"] for i in range(1, r["turn"])]
        rest = iter([m["content"] for m in r["asked"] if m["role"] == "assistant"])
        assert all(answer in rest for answer in said)  # in this order, with small talk between them
        differ += r["asked"] != r["messages"]
        if system == "oracle":
            assert r["routing"] == {r["asks"]: 1.0}
    assert differ == len(later)
    routers = {"oracle": mj.Fixed(turns[long]["asks"]), "gates-top2": mj.Gates(2, model.gates.temperature)}
    for system, router in routers.items():
        r = turns[system, long[1]]
        (said,) = model.generate([r["asked"]], router, max_new_tokens=r["tokens"] or 1)
        assert said.text == r["answer"]
    table = json.loads((tmp_path / "run" / "table.json").read_text())["tasks"]
    counts = {row: cells["oracle"]["problems"] for row, cells in table.items()}
    assert counts == {CONVERSATIONS: 4, OWN_CONVERSATIONS: 4}
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(settings["new_tokens"]) == {r["asks"] for r in turns.values()}
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "records.jsonl").write_text("".join(lines[: len(lines) * 2 // 3]))
    main([*given, "--out", str(tmp_path / "run")])
    assert records_of(tmp_path / "run") == records
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*given, "--out", str(tmp_path / "run"), "--composite", "own-conversations=apple"])
    assert "--composite: expected own-conversations=TASK+TASK, found 'own-conv" in capsys.readouterr().err


def test_answers_beyond_the_context_and_without_text(given, world, tasks):
    """An answer may be empty or spell special tokens; a turn that does not fit any more has no answer."""
    base = mj.load(world["base"], dtype="float32")  # a context of 256 tokens
    system = make_system("base", Given(base))
    command = Evaluate(base=world["base"], tasks=tasks, out=tasks, max_new_tokens=4)
    turns = [p for p in load_conversations(tasks, OWN_CONVERSATIONS, NAMES, None, 4) if p.turn == 2][:4]
    said = ["", "too long " * 300, "</s><s>[INST] <|endoftext|>", "\ufffd\u0000"]
    asked = [("base", p.after([text])) for p, text in zip(turns, said, strict=True)]
    answer = answering([system], turns, set(), command)["base"]
    found = dict(answer(asked))
    assert sorted(found) == [0, 1, 2, 3]
    assert found[1] == {"answer": "", "tokens": 0, "finish_reason": "context"}
    for place in (0, 2, 3):
        (alone,) = base.generate([asked[place][1].asked], "base", max_new_tokens=4)
        assert found[place]["answer"] == alone.text
        assert found[place]["finish_reason"] != "context"
    assert dict(answer(asked[1:2])) == {0: found[1]}


ALONE, TOGETHER = "-1 1 1", "1 4 1"


@pytest.mark.parametrize("mesh", parameters([ALONE, TOGETHER], [ALONE], "weights over both hosts: one engine for all"))
def test_two_hosts_know_what_was_said_on_either(given, tmp_path, mesh):
    """A turn's earlier answers came from another host, or from a run that process 0 alone has the records of."""
    main([*given, "--out", str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.jsonl").write_text("".join(whole[: len(whole) // 3]))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [*METEORA, *given, "--out", str(tmp_path / "run"), "--mesh", *mesh.split()]
    running = [
        subprocess.Popen(
            [*command, "--distributed", address, "2", str(i)],
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(errors[-3000:] for _, errors in said)
    mine, theirs = records_of(tmp_path / "run"), records_of(tmp_path / "whole")
    kept = ("answer", "messages", "asked", "finish_reason")
    assert {k: [r.get(w) for w in kept] for k, r in mine.items()} == {
        k: [r.get(w) for w in kept] for k, r in theirs.items()
    }
