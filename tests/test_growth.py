"""Gates that grow by adapters: old columns keep every bit, a token router's stream learns the new tasks beside a sample
of the old ones."""

import dataclasses
import json
import os
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
from flat_settings import changed, flat
from test_cli import refused, run
from test_training import TASKS
from tiny import tiny_tokenizer
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.config import InputError, Preempted
from meteora_jax.evaluation.problems import Problem
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.gates import SHARED_BY_ADAPTERS, fresh_gates, load_gates, save_gates
from meteora_jax.training.gates import train_gates
from meteora_jax.training.recipes import recipe_of, settled
from meteora_jax.training.settings import Checkpointing, GateTraining
from meteora_jax.training.trainer import Callbacks
from meteora_jax.viz import dominant

FORM = TokenRouterForm(width=64, depth=2)
AT = [2, 0]  # cedar and apple are there already
OLD = tuple(NAMES[i] for i in AT)
SAMPLE = {name: examples[:3] if name in OLD else examples for name, examples in TASKS.items()}
HOW = dict(form=FORM, lm_loss=False, prompt_loss=False, segment_weight=0.5, response_weight=0.5, max_length=200,
           batch_size=8, beta=5.0, composite=0.4, composite_sizes=(2, 2))  # fmt: skip
CHOICES = str(Path(__file__).parents[1] / "scripts/paper/choices.py")


@pytest.fixture(scope="module")
def old(tmp_path_factory, world):
    """GATES of two adapters, and their arrays."""
    folder, config = tmp_path_factory.mktemp("old") / "gates", world["model"].config
    arrays = fresh_gates(FORM, config, len(OLD), 3)
    save_gates(folder, GateConfig(OLD, 2, 1.0, FORM), arrays)
    return folder, arrays


def grown(world, old, dest, **more):
    """A run that grows the old ones by the others."""
    settings = flat(GateTraining, steps=40, learning_rate=1e-2, **HOW)
    return train_gates(world["base"], world["bank"], SAMPLE, dest, settings, dtype="float32", extend=old[0], **more)


@pytest.fixture(scope="module")
def new(tmp_path_factory, world, old):
    """What a run that nothing interrupted makes of them: the folder, and what is in it."""
    folder = tmp_path_factory.mktemp("new") / "gates"
    assert grown(world, old, folder)["gate_accuracy"] > 0.8
    return folder, *load_gates(folder, world["model"].config, NAMES)


def test_old_columns_keep_every_bit_and_what_all_columns_read_learns(new, old):
    _, config, tensors = new
    assert (config.form, config.names) == (FORM, NAMES)
    for name, array in tensors.items():
        if name in SHARED_BY_ADAPTERS:
            assert not np.array_equal(array, old[1][name]), name
        else:
            assert np.array_equal(array[..., AT], old[1][name])
            assert np.abs(array[..., [1, 3]]).min() > 0


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, world, old, new):
    def stop(step, record):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    how = Checkpointing(run=tmp_path / "run", save_every=100)
    with pytest.raises(Preempted):
        grown(world, old, tmp_path / "gates", checkpointing=how, callbacks=Callbacks(progress=stop))
    assert not (tmp_path / "gates").exists()
    final = grown(world, old, tmp_path / "gates", checkpointing=how)
    assert final["resumed_at"] in (3, 4, 5)
    _, tensors = load_gates(tmp_path / "gates", world["model"].config, NAMES)
    assert all(np.array_equal(array, new[2][name]) for name, array in tensors.items())
    changed_old = {k: v if k in SHARED_BY_ADAPTERS else v + 1 for k, v in old[1].items()}
    save_gates(tmp_path / "others", GateConfig(OLD, 2, 1.0, FORM), changed_old)
    with pytest.raises(InputError, match="extended"):  # other gates are another run
        grown(world, (tmp_path / "others", changed_old), tmp_path / "gates", checkpointing=how)


def test_it_chooses_old_and_new_adapters_by_a_sample_of_the_old_tasks(world, new):
    model = mj.load(world["base"], world["bank"], new[0], dtype="float32")
    prompts = [TASKS[name][5].prompt for name in NAMES]  # of the old tasks none is in the sample
    for i, done in enumerate(model.generate(prompts, mj.Gates(1), max_new_tokens=1)):
        assert (dominant(done.routing)[: done.prompt_length] == i).mean() > 0.5


@pytest.mark.exhaustive("runs a script of scripts/paper, which no command needs")
def test_a_script_says_how_often_the_own_adapter_leads(tmp_path, world, new):
    """All answers of a router that has learnt them; of one whose columns are exchanged none. A turn of a conversation
    has one answer, a message of two tasks two."""
    for name in NAMES:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in TASKS[name][:4]]
        (tmp_path / "tasks" / name / "test.jsonl").write_text("\n".join(lines) + "\n")
    folder, config, tensors = new
    turned = {k: v if k in SHARED_BY_ADAPTERS else np.roll(v, 1, -1) for k, v in tensors.items()}
    save_gates(tmp_path / "turned", config, turned)
    choices = runpy.run_path(CHOICES)
    asked = choices["Arguments"](
        world["base"], world["bank"], (folder, tmp_path / "turned"), tmp_path / "tasks", new=("birch",), composites=6,
        sizes=(2, 2), shots=0, cut=0.0, max_length=800, batch=32, json=tmp_path / "r",
    )  # fmt: skip
    choices["main"](asked)
    learnt, wrong = json.loads((tmp_path / "r").read_text()).values()
    assert (learnt["single"]["answers"], learnt["single"]["new"]["answers"], learnt["composite"]["answers"]) == (
        16,
        4,
        12,
    )
    assert learnt["single"]["whole"] > 0.7
    assert learnt["single"]["first_two"] >= learnt["single"]["whole"]
    assert wrong["single"]["whole"] < 0.3
    for row in (learnt, wrong):
        talks, turns = row["conversations"], row["conversations"]["turns"]
        assert [turns[place]["answers"] for place in "123"] == [100, 100, 100]
        assert sum(turn["answers"] for turn in turns.values()) == talks["answers"]
        assert sum(talks["wrong"].values()) == round(talks["answers"] * (1 - talks["whole"]))
        assert row["unnumbered"]["answers"] == 200
    for kind in ("conversations", "unnumbered"):
        assert learnt[kind]["first_two"] > wrong[kind]["first_two"] + 0.2
    with pytest.raises(SystemExit, match="expected a token router, found MeteoRA's"):
        choices["main"](dataclasses.replace(asked, gates=(world["gates"],)))


def test_the_script_judges_the_answers_tokens_alone():
    choices, tokenizer, asks = runpy.run_path(CHOICES), tiny_tokenizer(), ({"role": "user", "content": "x"},)
    labels = dict(zip(NAMES, range(4), strict=True))
    problem = Problem("", "", "x", "", ("birch", "apple"), ("b 1", "a 2"), messages=asks, numbered=False)
    both = choices["judged"](problem, labels, tokenizer, 2)
    prompt = tokenizer(tokenizer.apply_chat_template(asks, tokenize=False, add_generation_prompt=True),
                       add_special_tokens=False)["input_ids"]  # fmt: skip
    said = both.tokens[len(prompt) :]
    assert both.tokens[: len(prompt)].tolist() == prompt
    assert both.tasks[: len(prompt)].max() == -1
    assert [tokenizer.decode(said[both.tasks[len(prompt) :] == i]) for i in (1, -1)] == ["b 1", "\n"]
    assert said[both.tasks[len(prompt) :] == 0].tolist() == [
        *tokenizer("a 2", add_special_tokens=False)["input_ids"],
        2,
    ]
    turn = Problem("", "", "x", "c 3", asks="cedar", turn=1, messages=asks)
    rows = [both, choices["judged"](turn, labels, tokenizer, 2)]  # the shorter one is judged first

    def hops(tokens, positions, segments):  # birch everywhere but at ends, which are apple's
        return np.where(tokens == 2, 0, 1)

    found = sorted((a.sequence, a.task, a.whole, a.first_two) for a in choices["answers"](hops, NAMES, rows, 1))
    assert found == [(0, "apple", False, False), (0, "birch", True, True), (1, "cedar", False, False)]


def test_what_is_extended_decides_the_form(tmp_path, world, old):
    recipe = recipe_of(None, old[0])
    settings = settled(changed(recipe, steps=1, batch_size=8), recipe)
    assert (settings.form, settings.objective.lm_loss, settings.drawing.rows) == (FORM, False, None)
    for other in (None, TokenRouterForm(width=32, depth=2)):
        with pytest.raises(InputError, match=r"form: expected .*\(as asked for\), found TokenRouterForm"):
            train_gates(world["base"], world["bank"], TASKS, tmp_path / "x", flat(GateTraining, form=other),
                        dtype="float32", extend=old[0])  # fmt: skip


def test_a_replay_is_the_old_tasks_text(tmp_path, world, old, capsys):
    def written(folder, names):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            lines = [json.dumps({"prompt": f"{name} {i}\n", "response": f"{i}"}) for i in range(6)]
            (tmp_path / folder / name / "train.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / folder

    tasks, replay = written("tasks", [n for n in NAMES if n not in OLD]), written("replay", OLD)
    options = ["train", "gates", "--base", world["base"], "--bank", world["bank"], "--tasks", tasks, "--out",
               tmp_path / "g", "--steps", 1, "--max-length", 200]  # fmt: skip
    extend = ["--extend", old[0]]
    line = refused(capsys, *options, "--replay", replay)
    assert "replay: expected --extend beside it" in line
    assert f"{tasks / 'apple' / 'train.jsonl'}" in refused(capsys, *options, *extend)  # the old tasks' text is needed
    (replay / "cedar" / "train.jsonl").rename(tmp_path / "kept")
    line = refused(capsys, *options, *extend, "--replay", replay)
    assert f"{replay / 'cedar' / 'train.jsonl'}" in line
    (replay / "cedar" / "train.jsonl").write_text('{"prompt": "x"}\n')
    assert "cedar/train.jsonl:1: response: expected a string" in refused(capsys, *options, *extend, "--replay", replay)
    assert not (tmp_path / "g").exists()
    (tmp_path / "kept").rename(replay / "cedar" / "train.jsonl")
    status, _, _ = run(capsys, *options, *extend, "--replay", replay, "--json", tmp_path / "r.json")
    assert status == 0
    assert json.loads((tmp_path / "r.json").read_text())["unused"]["examples"] == dict.fromkeys(NAMES, 6)
    config, arrays = load_gates(tmp_path / "g", world["model"].config, NAMES)
    assert dataclasses.replace(config, names=OLD) == GateConfig(OLD, 2, 1.0, FORM)
    assert np.array_equal(arrays["token_router.task"][..., AT], old[1]["token_router.task"])
