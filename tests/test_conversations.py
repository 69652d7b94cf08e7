"""Conversations that change their task at every turn, and two tasks in one sentence: drawn, scored, asked."""

import collections
import itertools
import json
import shutil

import numpy as np
import pytest
from tiny import edit_json
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.evaluation import runner
from meteora_jax.evaluation.conversations import (
    GREETINGS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    draw_conversations,
    draw_unnumbered,
    load_conversations,
    says,
)
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.report import own_queries
from meteora_jax.evaluation.systems import Given, make_system
from meteora_jax.evaluation.table import markdown, tabulate
from meteora_jax.evaluation.tasks import Example, write_splits
from meteora_jax.routing.fixed import Fixed

VERBS = {"apple": "Peel", "birch": "Plant", "cedar": "Saw", "daisy": "Water"}
SYSTEM = {"role": "system", "content": "Say how often."}


def example(task: str, i: int) -> Example:
    """birch has conversations with a system message of their own, the others text."""
    text, response = f"{VERBS[task]} number {task[0]}{i}.", f"{task} {i}"
    if task != "birch":
        return Example(f"\n{text}\n", response)
    return Example(text, response, messages=(SYSTEM, {"role": "user", "content": text}))


EXAMPLES = {task: [example(task, i) for i in range(4)] for task in NAMES}
WANTED = {f"{VERBS[t]} number {t[0]}{i}.": (t, f"{t} {i}") for t in NAMES for i in range(4)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """TASKS whose holdout and train splits would be refused if anybody read them."""
    root = tmp_path_factory.mktemp("conversations") / "tasks"
    for task, own in EXAMPLES.items():
        write_splits(root / task, {"test": own})
        for split in ("train", "holdout"):
            (root / task / f"{split}.jsonl").write_text("not to be read")
    (root / "cedar" / "task.json").write_text('{"metric": "rougeL", "max_new_tokens": 5}')
    (root / "daisy" / "task.json").write_text('{"metric": "number"}')
    return root


def test_every_turn_is_another_task_after_right_answers():
    turns = draw_conversations(EXAMPLES, count=60, seed=3)
    assert turns == draw_conversations(EXAMPLES, count=60, seed=3)
    assert turns != draw_conversations(EXAMPLES, count=60, seed=4)
    talks = collections.defaultdict(list)
    for turn in turns:
        talks[turn.conversation].append(turn)
    assert len(talks) == 60
    assert {len(own) for own in talks.values()} == {3, 4, 5, 6}
    small = dict((*SMALL_TALK, *GREETINGS))
    systems, chats = 0, 0
    for own in talks.values():
        assert [t.place for t in own] == list(range(1, len(own) + 1))
        assert all(a.task != b.task for a, b in itertools.pairwise(own))
        assert len({t.task for t in own[:4]}) == min(4, len(own))
        before = ()
        for turn in own:
            assert turn.messages[: len(before)] == before
            asked = turn.messages[-1]["content"].removeprefix("Say how often.\n")
            assert WANTED[asked] == (turn.task, turn.response)
            before = (*turn.messages, {"role": "assistant", "content": turn.response})
        # read whole: a system prompt or none, then user and assistant in turns, each rightly answered
        body = list(before)
        if body[0]["role"] == "system":
            systems += 1
            assert body.pop(0)["content"] in SYSTEM_PROMPTS
        assert [m["role"] for m in body] == ["user", "assistant"] * (len(body) // 2)
        for said, answered in zip(body[::2], body[1::2], strict=True):
            text = said["content"].removeprefix("Say how often.\n")
            chats += text in small
            assert answered["content"] == (small[text] if text in small else WANTED[text][1])
    assert 10 < systems < 50
    assert chats > 30
    counts = collections.Counter(t.task for t in turns)
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_two_tasks_suffice_and_long_conversations_are_drawn_anew():
    two = {task: EXAMPLES[task] for task in ("apple", "cedar")}
    turns = draw_conversations(two, count=30)
    assert all(a.task != b.task for a, b in itertools.pairwise(turns) if a.conversation == b.conversation)
    few = draw_conversations(two, count=30, fits=lambda messages: len(messages) <= 7)
    assert max(len(t.messages) for t in few) <= 7
    with pytest.raises(InputError, match="expected tasks whose conversations leave room"):
        draw_conversations(two, fits=lambda messages: False)
    with pytest.raises(InputError, match="expected two tasks or more, found apple"):
        draw_conversations({"apple": EXAMPLES["apple"]})


def test_two_tasks_in_one_sentence_without_numbers():
    for text, (first, second), answers in draw_unnumbered(EXAMPLES, count=20):
        assert first != second
        halves = [half.replace("Say how often.\n", "").rstrip(".") + "." for half in text.split(", then ")]
        assert [WANTED[half] for half in halves] == list(zip((first, second), answers, strict=True))


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("It is 9, then PARIS!", "9", True),
        ("It is 19", "9", False),
        ("It is 9, then PARIS!", "Paris", True),
        ("", "", False),
        ("It is -9, then 2.5", "9", False),
        ("It is -9, then 2.5", "2", False),
        ("It is -9, then 2.5", "-9", True),
        ("I'd say B", "d", False),
    ],
)
def test_an_answer_says_whole_words(answer, response, right):
    assert says(answer, response) is right


def test_turns_are_scored_by_their_own_task_s_metric(tasks, tmp_path):
    turns = load_conversations(tasks, "conversations", NAMES, 60, 8)
    pairs = load_conversations(tasks, "unnumbered", NAMES, 10, 8)
    assert len(turns) == 60
    assert {p.asks: p.max_new_tokens for p in turns} == {"apple": None, "birch": None, "cedar": 5, "daisy": None}
    assert {p.max_new_tokens for p in pairs} == {16}

    def answer(asked):
        """Right in apple and cedar; daisy says the right number alone; of two tasks only the first."""
        said = []
        for _, p in asked:
            if p.tasks:
                said.append(f"{p.answers[0]}, I think.")
            else:
                right = {"daisy": f"so {p.response[-1]}", "birch": "no"}.get(p.asks, p.response)
                said.append(right)
        return enumerate({"answer": a, "tokens": 1} for a in said)

    problems = [*turns, *pairs]
    records = runner.Records(tmp_path / "run", {"base": "x"})
    runner.run(problems, {"mine": answer}, records, lambda done, total, system: None, {("mine", "nothing")})
    table = tabulate(problems, ["mine"], records.answers)
    cell, both = table["tasks"]["conversations"]["mine"], table["tasks"]["unnumbered"]["mine"]
    count = collections.Counter(p.asks for p in turns)
    assert cell["graded"] == 60 - count["cedar"]  # which has no right and wrong
    assert cell["correct"] == count["apple"] + count["daisy"]
    assert cell["rougeL"] == 1.0
    assert (cell["asked"], cell["attempted"]) == (60, 60)
    for turn, (correct, graded) in cell["turns"].items():
        here = [p for p in turns if str(p.turn) == turn]
        assert graded == sum(p.asks != "cedar" for p in here)
        assert correct == sum(p.asks in ("apple", "daisy") for p in here)
    assert (both["correct"], both["graded"]) == (10, 20)
    low, high = table["intervals"]["tasks"]["conversations"]["mine"]["correct"]
    assert low < cell["correct"] / cell["graded"] < high
    text = markdown(table, ["mine"])
    assert f"| conversations, correct | 60 | {cell['correct']} of {cell['graded']} [" in text
    assert f"| conversations, turn 1 | 60 | {cell['turns']['1'][0]:g} of {cell['turns']['1'][1]} |" in text
    assert "daisy: number" in text
    record = records.done["mine", turns[0].id]
    assert (record["asks"], record["turn"], record["messages"][-1]) == (
        turns[0].asks,
        turns[0].turn,
        turns[0].messages[-1],
    )


def test_what_routers_get_of_a_turn(world):
    turn = Problem("conversations/0/2", "conversations", "a\nb", "c", asks="birch", turn=2,
                   messages=({"role": "user", "content": "a"}, {"role": "user", "content": "b"}))  # fmt: skip
    pair = Problem("unnumbered/0", "unnumbered", "a, then b", "", ("apple", "birch"), ("x", "y"), numbered=False)
    given = Given(world["model"])
    assert make_system("oracle", given).route(turn) == Fixed("birch")
    assert make_system("gates-top2-unseen", given).route(turn).within == ("apple", "cedar", "daisy")
    assert make_system("gates-top2", given).route(pair).temperature == world["model"].gates.temperature
    index = mj.Index.build({name: [name] for name in NAMES})
    assert [(q.text, q.adapter) for q in own_queries([turn, pair], index)] == [("b", "birch")]


def test_conversations_are_asked_by_a_command(tasks, world, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(world["base"], base)
    edit_json(base / "config.json", max_position_embeddings=1024)
    index = mj.Index.build({t: [VERBS[t], f"{VERBS[t]} number"] for t in NAMES})
    index.save(tmp_path / "index")
    given = ["evaluate", "--base", str(base), *(w for k in ("bank", "gates") for w in (f"--{k}", str(world[k])))]
    given += ["--tasks", str(tasks), "--index", str(tmp_path / "index"), "--out", str(tmp_path / "run")]
    given += ["--limit", "2", "--max-new-tokens", "2", "--max-prompt", "1000"]
    systems = ["--systems", "oracle,retrieval-selection-k1"]
    main([*given, "--composite", "conversations,unnumbered", *systems])
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    records = {(r["system"], r["id"]): r for r in map(json.loads, lines)}
    turns = [r for r in records.values() if r["task"] == "conversations"]
    assert collections.Counter(r["system"] for r in records.values()) == {
        "oracle": 2, "retrieval-selection-k1": 4,
    }  # fmt: skip
    for r in (r for r in turns if r["system"] == "oracle"):
        assert r["routing"] == {r["asks"]: 1.0}
    for r in (r for r in turns if r["system"] == "retrieval-selection-k1"):
        names, similarities = index.query([r["messages"][-1]["content"]], k=1)
        assert names == [(r["asks"],)]
        assert r["retrieved"] == {r["asks"]: round(float(similarities[0, 0]), 4)}
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert set(table["tasks"]) == {"conversations", "unnumbered"}
    assert set(table["tasks"]["unnumbered"]) == {"retrieval-selection-k1"}
    assert np.isclose(table["retrieval"]["iid"]["1"], 100)
    for words, said in (
        (["conversations=apple"], "--composite: expected conversations=TASK+TASK, found 'conversations=apple'"),
        (["conversations", "--split", "train"], "--split: expected test with --composite conversations, found train"),
    ):
        with pytest.raises(SystemExit) as refusal:
            main([*given, *systems, "--composite", *words])
        assert refusal.value.code == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["conversations", "own-conversations", "unnumbered"])
def test_a_base_alone_is_asked_the_tasks_that_are_named(what, tasks, world, tmp_path, capsys):
    given = ["evaluate", "--base", str(world["base"]), "--tasks", str(tasks), "--systems", "base", "--limit", "1"]
    given += ["--max-new-tokens", "2", "--out", str(tmp_path / "run"), "--composite"]
    with pytest.raises(SystemExit) as refusal:
        main([*given, what])
    assert refusal.value.code == 1
    assert f"--composite: expected {what}=TASK+TASK with fewer than two adapters" in capsys.readouterr().err
    base = tmp_path / "base"
    shutil.copytree(world["base"], base)
    edit_json(base / "config.json", max_position_embeddings=1024)
    given[2] = str(base)
    main([*given, f"{what}={NAMES[0]}+{NAMES[1]}"])
    assert set(json.loads((tmp_path / "run" / "table.json").read_text())["tasks"]) == {what}
