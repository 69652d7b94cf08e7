"""Retrieval of tasks: adapters ranked by their loss on a task's examples, as transformers has it, and composed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from hooked import routed_logits
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.evaluation import ranking
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.ranking import rank_adapters
from meteora_jax.evaluation.systems import Given, make_system
from meteora_jax.examples import Example
from meteora_jax.retriever.ranking import read_part, read_ranking, write_part, write_ranking
from meteora_jax.routing.retrieval import NOBODY
from meteora_jax.routing.task_retrieval import default_retrieval

TASKS = {  # none has the name of an adapter
    "sums": [("How many are 3 and 4?", "7"), ("How many are 2 and 9?", "11"), ("How many are 1 and 1?", "2")],
    "moods": [("What a film! Good or bad?", "good"), ("I fell asleep. Good or bad?", "bad"), ("Fine. Good?", "yes")],
}


@pytest.fixture(scope="module")
def ranked(world, tmp_path_factory):
    """An index of two tasks, ranked by the command."""
    root = tmp_path_factory.mktemp("tasks")
    for task, examples in TASKS.items():
        (root / "tasks" / task).mkdir(parents=True)
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in examples]
        (root / "tasks" / task / "train.jsonl").write_text("\n".join(lines))
    main(["index", "build", str(root / "index"), "--tasks", str(root / "tasks")])
    main([
        "index", "rank", str(root / "index"), "--base", str(world["base"]), "--bank", str(world["bank"]), "--tasks",
        str(root / "tasks"), "--limit", "2",
    ])  # fmt: skip
    return root / "index"


def test_losses_are_transformers_own(world, ranked):
    losses = json.loads((ranked / "ranking.json").read_text())["losses"]
    assert losses.keys() == TASKS.keys()
    model = world["model"]
    rows = []
    for prompt, response in TASKS["moods"][:2]:
        first = model.encode(prompt)
        rows.append((first + list(model.tokenizer(response, add_special_tokens=False)["input_ids"]), len(first)))
    for i, name in enumerate(NAMES):
        weights = torch.eye(4, dtype=torch.float64)[i]
        logits = routed_logits(
            world["hf_folder"], world["peft"], lambda x, _, w=weights: w.expand(len(x), 4), [row for row, _ in rows]
        )
        each = [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(z[first - 1 : -1]), torch.tensor(row[first:]), reduction="none"
            )
            for z, (row, first) in zip(logits, rows, strict=True)
        ]
        assert losses["moods"][name] == pytest.approx(torch.cat(each).mean().item(), abs=1e-4)
    assert read_ranking(ranked)["moods"] == tuple(sorted(NAMES, key=losses["moods"].get))


def test_nothing_predicts_the_first_token_of_a_response_without_a_prompt(world):
    model = world["model"]
    ids = model.encode("a good day")
    losses = rank_adapters(model, {"moods": [Example("", "a good day")]})["moods"]
    logprobs = jax.nn.log_softmax(model.logits([ids], router=mj.Fixed("apple"))[0])
    wanted = -np.mean([float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))])
    assert losses["apple"] == pytest.approx(wanted, abs=1e-4)


def test_losses_of_small_batches_are_the_same(world, monkeypatch):
    examples = {"moods": [Example(prompt * n, response * n) for n, (prompt, response) in enumerate(TASKS["moods"], 1)]}
    together = rank_adapters(world["model"], examples)["moods"]
    monkeypatch.setattr(ranking, "TOKENS", 1)  # a row at a time
    alone = rank_adapters(world["model"], examples)["moods"]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({*alone.values()}) == len(NAMES)


def test_a_prompt_that_fills_the_context_adds_no_tokens(world, monkeypatch):
    monkeypatch.setattr(ranking, "_losses", lambda model, rows, router: np.array([3.0, 0.0][: len(rows)] + [0.0] * 8))
    rows = [([1, 2, 3, 4, 5], 2), ([1, 2, 3], 9)]  # three tokens of a response, and none
    assert ranking._loss(world["model"], rows, mj.Fixed("apple")) == 1.0


def test_a_stopped_ranking_goes_on(world, ranked, tmp_path, monkeypatch, capsys):
    shutil.copytree(ranked, tmp_path / "index")
    (tmp_path / "index" / "ranking.json").unlink()
    words = ["index", "rank", str(tmp_path / "index"), "--base", str(world["base"]), "--bank", str(world["bank"])]
    words += ["--tasks", str(ranked.parent / "tasks"), "--limit"]
    loss, asked, dies = ranking._loss, [], [True]

    def counted(model, rows, router):
        asked.append(router)
        if dies[0] and len(asked) == len(NAMES) + 2:
            raise KeyboardInterrupt
        return loss(model, rows, router)

    monkeypatch.setattr(ranking, "_loss", counted)
    with pytest.raises(SystemExit, match="130"):
        main([*words, "2"])
    assert not (tmp_path / "index" / "ranking.json").exists()
    mj.Index.load(tmp_path / "index")
    asked.clear()
    dies[0] = False
    main([*words, "2"])
    assert len(asked) == len(NAMES), "the second task's alone"
    assert "1 of 2 tasks were ranked before" in capsys.readouterr().err
    whole, again = (json.loads((folder / "ranking.json").read_text()) for folder in (ranked, tmp_path / "index"))
    assert again == whole
    assert not (tmp_path / "index" / ".ranking.partial").exists()
    write_part(tmp_path / "index", {"moods": {"apple": 1.0}}, {"tasks": "of other examples"})
    assert read_part(tmp_path / "index", {"tasks": "of other examples"})
    asked.clear()
    main([*words, "2"])  # from the beginning
    assert len(asked) == 2 * len(NAMES)
    assert json.loads((tmp_path / "index" / "ranking.json").read_text()) == whole


def test_losses_that_rank_nothing_are_refused(world, monkeypatch):
    silent = {"moods": [Example("Good or bad?", "good")], "songs": [Example("x " * 2000, "y")]}
    with pytest.raises(
        InputError, match="songs: expected examples whose prompts leave room for a response in the cont"
    ):
        rank_adapters(world["model"], silent)
    monkeypatch.setattr(ranking, "_loss", lambda model, rows, router: float("nan"))
    with pytest.raises(InputError, match="moods: expected finite losses, found nan with apple, birch, cedar, daisy"):
        rank_adapters(world["model"], {"moods": silent["moods"]})


def test_tasks_bring_their_best_adapters(ranked):
    index = mj.Index.load(ranked)
    ranking = {"sums": ("cedar", "apple", "birch"), "moods": ("cedar", "birch", "apple")}
    found = (("moods", 0.9), ("sums", 0.5))
    shares = np.exp(np.array([0.9, 0.5]) / 0.2)
    router = mj.TaskRetrieval(index, ranking, 2, min_similarity=None)
    assert dict(router.router(found).adapters) == pytest.approx({"cedar": 1.0}), "one adapter of both adds up"
    router = mj.TaskRetrieval(index, ranking, 2, exclude=("cedar",), min_similarity=None)
    expected = dict(zip(("birch", "apple"), shares / shares.sum(), strict=True))
    assert dict(router.router(found).adapters) == pytest.approx(expected)
    assert mj.TaskRetrieval(index, ranking, min_similarity=2.0).router(found) is NOBODY


def test_a_tasks_own_adapter_answers_alone():
    index = mj.Index.build({"apple": ["How many are 3 and 4?"], "moods": ["Good or bad?"], "cedar": ["Is it green?"]})
    ranking = {"apple": ("cedar", "apple"), "moods": ("birch", "apple"), "cedar": ("cedar", "birch")}
    router = mj.TaskRetrieval(index, ranking, 3, min_similarity=None)
    found = (("apple", 0.9), ("moods", 0.8), ("cedar", 0.1))
    assert router.router(found).adapters == (("apple", 1.0),), "whatever serves its examples as well by chance"
    assert router.router((found[2], found[0], found[1])).adapters == (("cedar", 1.0),)
    mixed = dict(router.router((found[1], found[0], found[2])).adapters)
    assert mixed.keys() == {"birch", "cedar"}, "a task without its own: all three by what serves them best"
    hidden = dataclasses.replace(router, exclude=("apple",))
    assert dict(hidden.router(found).adapters).keys() == {"cedar", "birch"}
    assert router.router((("apple", 0.2),)).adapters == (("apple", 1.0),)


def test_a_task_whose_adapters_are_all_excluded_is_not_found(world, ranked):
    index = mj.Index.load(ranked)
    ranking = {"sums": ("cedar",), "moods": ("cedar", "birch")}
    router = mj.TaskRetrieval(index, ranking, 2, exclude=("cedar",), min_similarity=None)
    (composed,), (found,) = world["model"].look_up([router], 1, lambda: ["How many are 5 and 6?"])
    assert [task for task, _ in found] == ["moods"]
    assert composed.named() == ("birch",)


def test_what_retrieves_by_default(ranked):
    index, ranking = mj.Index.load(ranked), read_ranking(ranked)
    alone, by_task = default_retrieval(index, None), default_retrieval(index, ranking)
    assert isinstance(alone, mj.Retrieval)
    assert alone.router((("apple", 1e3),)).adapters == (("apple", 1.0),)
    assert index.threshold is not None
    assert alone.router((("apple", index.threshold - 1e-3),)) is NOBODY
    assert isinstance(by_task, mj.TaskRetrieval)
    assert by_task.k == len(ranking) == 2
    below = (index.threshold or 0.0) - 1e-3
    assert by_task.router((("sums", below),)) is NOBODY, "a request that is nobody's stays the base's"
    few = default_retrieval(index, ranking, most=1)
    assert isinstance(few, mj.TaskRetrieval)
    assert few.k == 1, "as many as slots hold"
    joined = default_retrieval(index, {"sums": ranking["sums"]})
    assert joined.ranking == {"sums": ranking["sums"], "moods": ("moods",)}
    later = default_retrieval(index, ranking, names=("sums", "apple"))
    assert later.ranking == {"sums": ("sums", *ranking["sums"]), "moods": ranking["moods"]}
    assert later.router((("sums", 1e3),)).adapters == (("sums", 1.0),)


def test_generate_takes_the_ranking_of_the_index(world, ranked, tmp_path, capsys):
    asked, out = "How many are 5 and 6?", tmp_path / "out.json"
    command = ["generate", asked, "--base", world["base"], "--bank", world["bank"], "--index", ranked, "--json", out]
    command = [*map(str, command), "--max-new-tokens", "3"]
    main(command)
    router = default_retrieval(mj.Index.load(ranked), read_ranking(ranked))
    (want,) = world["model"].generate([asked], router, max_new_tokens=3)
    (wrote,) = json.loads(out.read_text())
    assert (wrote["token_ids"], wrote["retrieved"]) == (want.token_ids, dict(want.routing.retrieved))
    with pytest.raises(SystemExit):  # named: adapters, which the tasks of this index are not
        main([*command, "--retrieve", "1"])
    assert "expected adapters of the bank, found 'sums'" in capsys.readouterr().err


def test_slots_hold_what_is_retrieved_by_default(world, ranked, tmp_path):
    index, out, asked = tmp_path / "index", tmp_path / "out.json", "How many are 5 and 6?"
    shutil.copytree(ranked, index)
    write_ranking(index, {"sums": {"apple": 0.1}, "moods": {"birch": 0.1}})  # together more than the one slot
    command = ["generate", asked, "--base", world["base"], "--bank", world["bank"], "--index", index, "--json", out]
    main([*map(str, command), "--adapter-slots", "1", "--max-new-tokens", "3"])
    (want,) = world["model"].generate([asked], mj.Fixed("apple"), max_new_tokens=3)
    assert json.loads(out.read_text())[0]["token_ids"] == want.token_ids


def test_a_model_answers_by_it(world, ranked):
    router = mj.TaskRetrieval.load(ranked, k=1)
    asked = ["How many are 5 and 6?"]
    _, (found,) = world["model"].look_up(router, 1, lambda: asked)
    assert found[0][0] == "sums"
    best = router.ranking["sums"][0]
    (ours,) = world["model"].generate(asked, router, max_new_tokens=3, routing=False)
    (theirs,) = world["model"].generate(asked, mj.Fixed(best), max_new_tokens=3, routing=False)
    assert ours.token_ids == theirs.token_ids


def test_it_is_a_system(world, ranked):
    ranking = read_ranking(ranked)
    given = Given(world["model"], index=mj.Index.load(ranked), ranking=ranking)
    route = make_system("task-retrieval-k2-unseen", given).route
    router = route(Problem("apple/test/0", "apple", "hello", "so"))
    assert (router.k, router.exclude, router.ranking) == (2, ("apple",), ranking)
    with pytest.raises(InputError, match="meteora index rank"):
        make_system("task-retrieval", Given(world["model"], index=given.index))


def test_what_is_wrong_is_refused(ranked, tmp_path):
    index = mj.Index.load(ranked)
    with pytest.raises(InputError, match="every task, found none of moods"):
        mj.TaskRetrieval(index, {"sums": ("apple",)})
    index.save(tmp_path / "index")
    with pytest.raises(InputError, match=r"ranking\.json of `meteora index rank`"):
        mj.TaskRetrieval.load(tmp_path / "index")
    (tmp_path / "index" / "ranking.json").write_text('{"losses": {"sums": {}}}')
    with pytest.raises(InputError, match=r"ranking\.json: expected losses"):
        read_ranking(tmp_path / "index")
