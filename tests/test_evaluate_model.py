"""`meteora evaluate` with a real (tiny) model: composites, other banks, any batch size, a real kill."""

import dataclasses
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from extent import parameters
from flax import nnx
from meshes import environment
from tiny import edit_json
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.cli.comparison import other_bank
from meteora_jax.evaluation.composite import COMPOSITES, default_path
from meteora_jax.evaluation.metrics import read_composite, score_composite
from meteora_jax.evaluation.tasks import Example, write_splits
from meteora_jax.model.layout import base_arrays, pack
from meteora_jax.routing import adapter_share
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates

METEORA = (sys.executable, str(Path(__file__).with_name("command.py")))
TASKS = ("winowhy", "object_counting")


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """The world's folders with a longer context, tasks, and a bank that holds cedar alone."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(world["base"], root / "base")
    edit_json(root / "base" / "config.json", max_position_embeddings=1024)
    converters.import_adapters(root / "cedar", root / "base", {"cedar": world["peft"]["cedar"]})
    for task in (*TASKS, *COMPOSITES[3]):
        examples = [Example(f"[INST] {task[:4]} {'so ' * (i % 5)}{i}? [/INST]\n", "ab"[i % 2]) for i in range(6)]
        write_splits(root / "tasks" / task, {"test": examples, "train": examples[:3]})
    main(["compose", str(root / "tasks"), "3", *FEW, "--base", str(root / "base"), "--max-new-tokens", "6"])
    return {"root": root, "base": root / "base", "bank": world["bank"], "gates": world["gates"]}


def arguments(folders, out, *options, systems="base,oracle,gates-top2,cedar"):
    given = [w for k in ("base", "bank", "gates") for w in (f"--{k}", str(folders[k]))]
    given += ["--tasks", str(folders["root"] / "tasks"), "--out", str(out), "--systems", systems]
    return ["evaluate", *given, "--max-new-tokens", "6", *options]


ROW = "composite_3_1_shot_count_5"
COMPOSITE = ("--composite", ROW)
FEW = ("--count", "5", "--shots", "1")


def records_of(out):
    return {(r["system"], r["id"]): r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def whole(folders):
    """A run that nobody interrupted, of composites and a task, with cedar from a bank and a PEFT folder of its own."""
    out = folders["root"] / "whole"
    banks = f"lora-b={folders['root'] / 'cedar'},lora-f={folders['root'] / 'peft'}"
    systems = f"base,oracle,gates-top2,cedar,{banks}"
    main(arguments(folders, out, *COMPOSITE, systems=systems))
    return out


@pytest.fixture(scope="module", autouse=True)
def peft_folder(folders, world):
    shutil.copytree(world["peft"]["cedar"], folders["root"] / "peft")


def test_composite_row_is_what_the_parts_say(folders, whole):
    (file,) = (folders["root"] / "tasks").glob("composite_3*/test.jsonl")
    assert file.parent.name == ROW
    problems = [json.loads(line) for line in file.read_text().splitlines()]
    table = json.loads((whole / "table.json").read_text())["tasks"]
    assert list(table) == [ROW]
    assert list(table[ROW]) == ["base", "gates-top2", "cedar", "lora-b", "lora-f"]
    model = mj.load(folders["base"], folders["bank"], folders["gates"], dtype="float32")
    routers = {"base": None, "gates-top2": Gates(2, 15.0), "cedar": Fixed("cedar")}
    records = records_of(whole)
    for system, router in routers.items():
        out = [model.generate([p["prompt"]], router, max_new_tokens=18, stop=["\n4."])[0] for p in problems]
        found = [records[system, f"{ROW}/test/{i}"] for i in range(5)]
        assert [r["answer"] for r in found] == [c.text for c in out]
        answers = [read_composite(c.text, 3) for c in out]
        assert [r["answers"] for r in found] == answers
        want = score_composite(COMPOSITES[3], answers, [p["answers"] for p in problems])
        assert table[ROW][system] == {**want, "asked": 15, "graded": 15}
        for r, c in zip(found, out, strict=True):
            assert ("routing" in r) == (router is not None)
            if router:
                shares = adapter_share(c.routing)[c.routing.prompt_length :].sum(0)
                shares /= max(shares.sum(), 1e-9)
                np.testing.assert_allclose([r["routing"].get(n, 0) for n in NAMES], shares, atol=1e-4)
    text = (whole / "table.md").read_text()
    assert f"| {ROW}, correct | 5 | 0 of 15 [0, 0] | not defined |" in text
    assert f"| {ROW}, ROUGE-L | 5 | " in text


@pytest.mark.parametrize("packed", [False, True])
def test_another_bank_has_the_base_of_a_model_prepared_for_a_gpu(folders, packed):
    model = mj.load(folders["base"], folders["bank"], folders["gates"], dtype="float32")
    graph, weights = pack(model.graph, model.weights) if packed else (model.graph, model.weights)
    assert any("PackedKernel" in str(type(x)) for _, x in nnx.to_flat_state(weights)) == packed
    arrays = base_arrays(graph, weights)
    ready = dataclasses.replace(model, graph=graph, weights=weights)
    other, _ = other_bank(ready, arrays, "one", folders["root"] / "cedar", folders["base"])
    alone = mj.load(folders["base"], folders["root"] / "cedar", dtype="float32")
    prompt = [[5, 6, 7, 8]]
    assert np.array_equal(other.logits(prompt, Fixed("cedar"))[0], alone.logits(prompt, Fixed("cedar"))[0])


@pytest.mark.exhaustive("the same programs for a second bank")
def test_an_adapter_in_a_bank_of_its_own_answers_as_in_the_large_one(whole):
    records = records_of(whole)
    for system in ("lora-b", "lora-f"):
        for i in range(5):
            other, same = records[system, f"{ROW}/test/{i}"], records["cedar", f"{ROW}/test/{i}"]
            assert other["answer"] == same["answer"]
            assert set(other["routing"]) <= {"cedar", "lora-f"}
    assert any(records["base", i]["answer"] != records["cedar", i]["answer"] for s, i in records if s == "cedar")


def test_the_numbers_do_not_depend_on_who_is_asked_beside(folders, whole, tmp_path):
    main(arguments(folders, tmp_path, "--limit", "2", *COMPOSITE))
    mine, theirs = records_of(tmp_path), records_of(whole)
    assert len(mine) == 6
    assert all(mine[key] == theirs[key] for key in mine)


@pytest.mark.exhaustive("killed at random moments; records cut short are in test_evaluation_rows")
def test_a_killed_process_goes_on_to_the_same_table(folders, tmp_path):
    options = ("--only", ",".join(TASKS), *COMPOSITE)
    systems = "base,gates-top1,gates-top2,cedar"
    main(arguments(folders, tmp_path / "whole", *options, systems=systems))
    command = arguments(folders, tmp_path / "killed", *options, systems=systems)
    chance = random.SystemRandom()
    lines, delay = chance.randrange(1, 40), chance.random() * 0.02
    process = subprocess.Popen([*METEORA, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / "records.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"the run ended before it was killed at line {lines} + {delay} s"
    kept = file.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert kept.count(b"\n") < 4 * 17
    main(command)
    assert file.read_bytes().startswith(kept)
    assert len(file.read_text().splitlines()) == len(records_of(tmp_path / "killed")) == 4 * 17
    assert records_of(tmp_path / "killed") == records_of(tmp_path / "whole")
    for name in ("table.json", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.exhaustive(
    "their routers are in test_evaluation_rows, a run in test_evaluate_retrieval, figures in test_retrieval"
)
def test_systems_that_retrieve_answer_as_generate_does(folders, world, tmp_path):
    named = dict(zip((*TASKS, "cedar"), ("apple", "birch", "cedar"), strict=True))
    converters.import_adapters(tmp_path / "bank", folders["base"], {n: world["peft"][p] for n, p in named.items()})
    index = mj.Index.build({name: [f"so it is about {name[:4]}", f"{name} once more"] for name in named})
    index.save(tmp_path / "index")
    model = mj.load(folders["base"], tmp_path / "bank", dtype="float32")
    compositions = ("selection", "mixture", "fusion")
    kinds = [*(f"retrieval-{how}-k2" for how in compositions), "retrieval-mixture-k1"]
    systems = ",".join(kind + hides for kind in kinds for hides in ("", "-unseen"))
    options = ["--index", str(tmp_path / "index"), "--only", ",".join(TASKS), "--limit", "2"]
    command = arguments(folders, tmp_path / "run", *options, systems=systems)
    command[command.index("--bank") + 1] = str(tmp_path / "bank")
    del command[command.index("--gates") : command.index("--gates") + 2]
    main(command)
    records = records_of(tmp_path / "run")
    assert len(records) == 8 * 4
    for (system, _), record in records.items():
        how, unseen = system.removeprefix("retrieval-").removesuffix("-unseen"), system.endswith("-unseen")
        how, _, k = how.partition("-k")
        k = int(k)
        router = mj.Retrieval(index, k, how, exclude=(record["task"],) if unseen else ())
        (said,) = model.generate([record["prompt"]], router, max_new_tokens=6)
        assert (record["answer"], list(record["retrieved"])) == (said.text, [n for n, _ in said.routing.retrieved])
        assert (record["task"] in record["retrieved"]) != unseen
        assert len(record["retrieved"]) == k
        assert set(record["routing"]) <= set(record["retrieved"])


@pytest.mark.exhaustive("a system more; routing within a set is in test_retrieval")
def test_gates_within_what_was_retrieved(folders, tmp_path):
    index = mj.Index.build({name: [f"so it is about {name}", f"{name} once more"] for name in NAMES})
    index.save(tmp_path / "index")
    options = ("--index", str(tmp_path / "index"), "--only", "winowhy")
    main(arguments(folders, tmp_path / "run", *options, systems="gates-within-top2,gates-within-top2-k4-t0.5"))
    model = mj.load(folders["base"], folders["bank"], folders["gates"], dtype="float32")
    routers = {
        "gates-within-top2": mj.GatesWithin(index, 3, 2, model.gates.temperature),
        "gates-within-top2-k4-t0.5": mj.GatesWithin(index, 4, 2, 0.5),
    }
    for (system, _), record in records_of(tmp_path / "run").items():
        router = routers[system]
        (said,) = model.generate([record["prompt"]], router, max_new_tokens=6)
        assert record["answer"] == said.text
        assert set(record["routing"]) <= set(record["retrieved"])


ALONE, TOGETHER = "-1 1 1", "1 4 1"


@pytest.mark.parametrize("mesh", parameters([ALONE, TOGETHER], [ALONE], "weights over both hosts: one engine for all"))
def test_two_hosts_of_two_devices_write_one_hosts_table(folders, whole, tmp_path, mesh):
    """And go on where one host left off: process 0 alone has the records. Each device answers its own problems, unless
    the weights lie on both hosts."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = environment(2)
    command = arguments(folders, tmp_path / "run", *COMPOSITE, "--mesh", *mesh.split())
    kept = (whole / "records.jsonl").read_text().splitlines(keepends=True)[:2]
    alone = tmp_path / "run" / "records.jsonl"
    alone.parent.mkdir()
    alone.write_text("".join(kept))
    running = [
        subprocess.Popen(
            [*METEORA, *command, "--distributed", address, "2", str(i)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(errors[-3000:] for _, errors in said)
    assert "composite_3" in said[0][0]
    assert "composite_3" not in said[1][0]  # beside what Gloo says
    mine, theirs = records_of(tmp_path / "run"), records_of(whole)
    assert len(mine) == 15 == len(alone.read_text().splitlines())
    assert {key: r["answer"] for key, r in mine.items()} == {key: theirs[key]["answer"] for key in mine}
    tables = [json.loads((out / "table.json").read_text())["tasks"][ROW] for out in (tmp_path / "run", whole)]
    assert tables[0] == {system: tables[1][system] for system in ("base", "gates-top2", "cedar")}


def test_a_composite_of_tasks_that_are_named(folders, tmp_path, capsys):
    """The composite of 3 by its tasks' names: the very same problems; in another order, a row of its own."""
    tasks, report = str(folders["root"] / "tasks"), tmp_path / "report.json"
    fits = ("--base", str(folders["base"]), "--max-new-tokens", "6")
    main(["compose", tasks, "+".join(COMPOSITES[3]), *FEW, *fits, "--json", str(report)])
    (drawn,) = json.loads(report.read_text())
    assert (drawn["file"], drawn["tasks"]) == (f"{tasks}/{ROW}/test.jsonl", list(COMPOSITES[3]))
    assert 0 < drawn["longest_prompt"] <= 1024 - 18
    assert f"5 problems of 3 tasks, the longest prompt of {drawn['longest_prompt']} tokens" in capsys.readouterr().out
    swapped = "+".join(COMPOSITES[3][::-1])
    main(["compose", tasks, swapped, *FEW, "--json", str(report)])
    (drawn,) = json.loads(report.read_text())
    assert drawn["longest_prompt"] is None
    main(arguments(folders, tmp_path / "run", "--composite", drawn["file"], systems="base,gates-top2-t1"))
    (row,) = {r["task"] for r in records_of(tmp_path / "run").values()}
    assert row.startswith("composite_3_of_")
    assert row == drawn["file"].split("/")[-2]
    main(["compose", tasks, swapped, *FEW, "--out", str(tmp_path / "mine.jsonl")])
    assert (tmp_path / "mine.jsonl").read_text() == (folders["root"] / "tasks" / row / "test.jsonl").read_text()
    main(arguments(folders, tmp_path / "other", "--composite", str(tmp_path / "mine.jsonl"), systems="base"))
    assert {r["task"] for r in records_of(tmp_path / "other").values()} == {"mine"}


def test_composites_that_were_written_are_asked_and_missing_ones_drawn(folders, tmp_path):
    """The usual 200 are too many for these tasks, so a shorter file stands in for what was written."""
    tasks = tmp_path / "tasks"
    shutil.copytree(folders["root"] / "tasks", tasks)
    shutil.copytree(tasks / ROW, tasks / "composite_3")
    command = arguments(folders, tmp_path / "run", "--composite", "3", "--limit", "2", systems="base")
    command[command.index("--tasks") + 1] = str(tasks)
    main(command)
    asked = records_of(tmp_path / "run").values()
    assert {(r["task"], r["prompt"]) for r in asked} < {
        ("composite_3", json.loads(line)["prompt"]) for line in (tasks / ROW / "test.jsonl").read_text().splitlines()
    }
    drawn = default_path(tasks, TASKS)
    command[command.index("--composite") + 1] = "+".join(TASKS)
    with pytest.raises(SystemExit):  # 36 different problems are all there are
        main(command)
    for task in TASKS:
        examples = [Example(f"[INST] {task[:4]} {i}? [/INST]\n", "a") for i in range(20)]
        write_splits(tasks / task, {"test": examples})
    command[command.index("--out") + 1] = str(tmp_path / "drawn")
    main(command)
    assert len(drawn.read_text().splitlines()) == 200
    assert {r["task"] for r in records_of(tmp_path / "drawn").values()} == {drawn.parent.name}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["4"], "composites: expected 3, 5, 10 or tasks joined by +, found '4'"),
        (["winowhy+nobody"], "nobody/test.jsonl: expected the test split of nobody, found no file"),
        (["3", "5", "--out", "x.jsonl"], "--out: expected one composite, found 2: 3, 5"),
        (["3", "--out", "x.json"], "x.json: expected a name that ends in .jsonl"),
        (["3", "--count", "0"], "--count: expected 1 or more, found 0"),
        (["3", "--shots", "-1"], "shots: expected 0 or more, found -1"),
        (["3", "--base", "nowhere"], "nowhere/config.json: expected a file, found none"),
        (["3", *FEW, "--base", "{base}", "--max-new-tokens", "340"], "expected test examples short enough"),
        (
            ["3", *FEW, "--seed", "1", "--out", "{row}"],
            "expected the problems of seed 1, count 5, shots 1, found others",
        ),
    ],
)
def test_refusals_of_compose(folders, capsys, words, said):
    row = folders["root"] / "tasks" / ROW / "test.jsonl"
    words = [word.format(base=folders["base"], row=row) for word in words]
    with pytest.raises(SystemExit) as refusal:
        main(["compose", str(folders["root"] / "tasks"), *words])
    assert refusal.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_long_prompts_can_be_left_out(folders, world, tmp_path):
    """Of tasks alone; a composite problem is as long as it is."""

    def count(text):
        return len(world["model"].encode(text))

    lines = (folders["root"] / "tasks" / "winowhy" / "test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    most = sorted(map(count, prompts))[2]
    options = ("--only", "winowhy", "--max-prompt", str(most), *COMPOSITE)
    main(arguments(folders, tmp_path / "run", *options, systems="base"))
    asked = records_of(tmp_path / "run").values()
    assert sum(r["task"] == ROW for r in asked) == 5
    found = {r["prompt"] for r in asked if r["task"] == "winowhy"}
    assert found == {p for p in prompts if count(p) <= most} != set(prompts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--composite", "4"], "--composite: expected 3, 5, 10, tasks joined by +, what meteora compose wrote"),
        (["--composite", "composite_3_seed_9"], "or .jsonl files, found 'composite_3_seed_9'"),
        (["--composite", "winowhy+nobody"], "expected the test split of nobody, found no file"),
        (["--composite", "winowhy+gsm8k"], "expected the test split of gsm8k"),
        (["--composite", "3", "--split", "train"], "--split: expected test with --composite 3"),
        (["--composite", "nowhere.jsonl"], "nowhere.jsonl: expected composite problems, found no file"),
        (
            ["--composite", "{file}"],
            "pair: gates-top2: expected a temperature (-tN, as gates-top2-t15), as MeteoRA has",
        ),
        (["--composite", "{file}", "--systems", "gates-top2-t9"], "pair/pair/0: expected at most 1012 tokens"),
        (["--composite", "{file},{file}"], "expected each name once, found twice: pair"),
        (["--only", "winowhy", "--systems", "gates-top5"], "gates-top5: expected at most 4"),
        (["--only", "winowhy", "--systems", "gates-top2-t0"], "gates-top2-t0: expected -tN, -unseen (in this order"),
        (["--only", "winowhy", "--systems", "elm="], "--systems: expected NAME=FOLDER, found 'elm='"),
        (["--only", "winowhy", "--systems", "elm={bank}"], "expected a bank of one adapter, found apple, birch"),
        (["--only", "winowhy", "--systems", "elm={file}"], "pair.jsonl: expected a BANK or PEFT folder, found none"),
        (["--only", "winowhy", "--systems", "elm,elm={bank}"], "expected a NAME that no other system has, found elm"),
        (["--only", "winowhy", "--limit", "0"], "--limit: expected 1 or more, found 0"),
        (["--only", "winowhy", "--systems", "retrieval-fusion"], "--systems: retrieval-fusion: expected --index"),
        (["--only", "winowhy", "--max-prompt", "2"], "--max-prompt: expected room for a problem of every row"),
        (["--only", ","], "expected at least one task, or a composite, found none"),
    ],
)
def test_refusals_come_before_anything_is_written(folders, tmp_path, capsys, options, said):
    problem = {"prompt": "long " * 1200, "response": "a@@@@\nb", "tasks": TASKS, "answers": ["a", "b"]}
    file = tmp_path / "pair.jsonl"
    file.write_text(json.dumps(problem) + "\n")
    options = [word.format(file=file, bank=folders["bank"]) for word in options]
    with pytest.raises(SystemExit) as refusal:
        main(arguments(folders, tmp_path / "run", *options, systems="gates-top2"))
    assert refusal.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_routers_of_a_bank_alone_answer_in_other_wordings(folders):
    out = folders["root"] / "others"
    options = "--base", str(folders["base"]), "--max-new-tokens", "6", "--wording", "lettered"
    main(["compose", str(folders["root"] / "tasks"), "3", *FEW, *options])
    row = "composite_3_lettered_1_shot_count_5"
    systems = "base,arrow-top2,spectr-top1,lag-top1,logo-k2,uniform"
    main(arguments(folders, out, "--composite", row, "--limit", "2", systems=systems))
    records = records_of(out)
    assert {system for system, _ in records} == {*systems.split(",")}
    assert len(records) == 2 * 6
    for (system, _), record in records.items():
        if system == "uniform":
            assert set(record["routing"]) == set(NAMES)
    assert "arrow-top2" in (out / "table.md").read_text()
