"""Sequences of a run: composites, mixtures, packing, what is not used, and where the data go on."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import TASKS, compiled_losses
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.evaluation.wordings import format_prompt
from meteora_jax.examples import turn_messages
from meteora_jax.training.data import Batches, Mixture, collate, plan
from meteora_jax.training.sequences import NO_TASK, SYSTEM_PROMPTS, Tokenized, compose, converse, takes
from meteora_jax.training.unused import TRIED, shared_prefix, unused


def test_composite_sequences_label_every_part(world):
    tokenizer = world["model"].tokenizer
    parts = [(TASKS[n][0], i) for i, n in enumerate(NAMES[:3])]
    s = compose(parts, tokenizer, 2, prompt_loss=False)
    answers = "".join(f"{i}. {example.response}\n" for i, (example, _) in enumerate(parts, 1))
    assert tokenizer.decode(s.tokens[:-1]) == format_prompt([example for example, _ in parts]) + answers
    for i, (example, task) in enumerate(parts, 1):
        own = tokenizer.decode(s.tokens[s.tasks == task])
        assert own == f"{example.prompt}({i})\n\n{i}. {example.response}\n"
    prompt = format_prompt([example for example, _ in parts])
    assert list(s.tokens[: len(tokenizer(prompt)["input_ids"])]) == tokenizer(prompt)["input_ids"]
    assert s.tasks[-1] == NO_TASK
    assert s.tokens[-1] == 2
    assert tokenizer.decode(s.tokens[s.loss]).startswith("1. ")
    # behind worked examples each part's tokens are its own in them, too, and headings nobody's
    worked = [[TASKS[n][k] for n in NAMES[:3]] for k in (1, 2)]
    s = compose(parts, tokenizer, 2, prompt_loss=False, shots=worked)
    prompt = format_prompt([example for example, _ in parts], worked)
    assert tokenizer.decode(s.tokens[:-1]) == prompt + answers
    for i, (example, task) in enumerate(parts, 1):
        own = "".join(f"{shot[i - 1].prompt}\n{i}. {shot[i - 1].response}\n" for shot in worked)
        end = "\n" if i == len(parts) else "\n\n"
        assert tokenizer.decode(s.tokens[s.tasks == task]) == f"{own}{example.prompt}{end}{i}. {example.response}\n"
    left = tokenizer.decode(s.tokens[s.tasks == NO_TASK][:-1])
    heading = "Following the example above, generate answers to the questions below:"
    assert left == f"\nExample 1:\n\n\n\nExample 2:\n\n\n\n{heading}\n\n"
    assert tokenizer.decode(s.tokens[s.loss]).startswith("1. ")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_conversations_label_every_turn(world, system):
    """What a turn's task owns is its messages and what the template writes before its answer; the whole is what the
    chat template makes of the messages."""
    tokenizer = world["model"].tokenizer
    chat = Example("apple", "red", messages=({"role": "system", "content": "Fruit."}, {"role": "user", "content": "?"}))
    parts = [(TASKS[NAMES[0]][0], 0), (chat, 3), (TASKS[NAMES[1]][1], 1)]
    s = converse(parts, tokenizer, 2, prompt_loss=False, system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answer in ((parts[0][0].prompt.strip(), parts[0][0].response), ("Fruit.\n?", "red"),
                         (parts[2][0].prompt.strip(), parts[2][0].response)):  # fmt: skip
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.strip()}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    read = tokenizer.decode(s.tokens[:-1])
    assert whole.startswith(read)
    assert read.endswith(messages[-1]["content"])
    one = [{"role": "user", "content": "@@"}]
    between = tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True).split("@@")[1]
    for (_, task), question, answer in zip(parts, messages[-6::2], messages[-5::2], strict=True):
        own = tokenizer.decode(s.tokens[:-1][s.tasks[:-1] == task])
        assert own == question["content"] + between + answer["content"]
    assert tokenizer.decode(s.tokens[:-1][s.loss[:-1]]) == "".join(m["content"] for m in messages[-5::2])
    assert (s.tokens[-1], s.tasks[-1], s.loss[-1], s.loss[0]) == (2, 1, True, False)


@pytest.mark.parametrize("template", ["own", "stripped", "unstripped"])
@pytest.mark.parametrize("answers", [["a"], ["is", "a"], ["assistant", "user", "s"], ["im_start", "\n|>"], ["a", "a"]])
def test_short_answers_are_not_looked_for_in_the_template_s_words(world, template, answers):
    tokenizer = copy.deepcopy(world["model"].tokenizer)
    if template != "own":
        content = "message['content'] | trim" if template == "stripped" else "message['content']"
        start, end = "'<|start|>' + message['role'] + ': '", "'</s>\\n'"
        tokenizer.chat_template = (
            f"{{% for message in messages %}}{{{{ {start} + ({content}) + {end} }}}}{{% endfor %}}"
        )
    parts = [(Example("", answer, messages=({"role": "user", "content": f" Which is it, user {i}? "},)), i)
             for i, answer in enumerate(answers)]  # fmt: skip
    s = converse(parts, tokenizer, 2, prompt_loss=False)
    said = [answer.strip() for answer in answers]
    learnt = tokenizer.decode(s.tokens[:-1][s.loss[:-1]])
    assert learnt.replace(" ", "") == "".join(said)  # the space before an answer is part of its first token
    messages: list[Any] = []
    for (example, _), answer in zip(parts, said, strict=True):
        messages += [*turn_messages(example), {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    read = tokenizer.decode(s.tokens[:-1])
    assert whole.startswith(read)
    assert read.endswith(said[-1])
    assert len(read) > len(whole) - 20  # all but what stands behind the last answer


def test_conversations_are_drawn_where_the_template_takes_them(world):
    labels, tokenizer = {name: i for i, name in enumerate(NAMES)}, copy.deepcopy(world["model"].tokenizer)
    how = dict(prompt_loss=False, composite=1.0, composite_sizes=(2, 3), conversations=1.0, max_length=4096)

    def drawn() -> list[str]:
        mixture = Mixture(TASKS, labels, tokenizer, 2, **how)
        chosen, rng = mixture.chosen(), np.random.default_rng(0)
        return [tokenizer.decode(mixture.draw_composite(chosen, rng, 4096).tokens) for _ in range(24)]

    before = tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False).split("@@")[0]
    turns = {text.count(before) for text in drawn()}
    assert {1, 2, 3} <= turns
    assert max(turns) <= len(NAMES)
    assert any(prompt in text for text in drawn() for prompt in SYSTEM_PROMPTS)
    asks = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = asks + tokenizer.chat_template
    assert takes.__wrapped__(tokenizer, "user", "assistant")
    assert not takes.__wrapped__(tokenizer, "system", "user", "assistant")
    silent = tokenizer.chat_template.replace("message.content", "'?'").replace("message['content']", "'?'")
    assert silent != tokenizer.chat_template
    tokenizer.chat_template = silent
    assert not takes.__wrapped__(tokenizer, "user", "assistant")
    tokenizer.chat_template = None
    takes.cache_clear()
    assert all("1. " in text and before not in text for text in drawn())


def test_composites_of_several_sizes_and_shots_are_drawn(world):
    labels = {name: i for i, name in enumerate(NAMES)}
    how = dict(max_length=2000, prompt_loss=False, composite=1.0, composite_sizes=(2, 4), composite_shots=2)
    mixture = Mixture(TASKS, labels, world["model"].tokenizer, 2, **how)
    chosen, rng = mixture.chosen(), np.random.default_rng(0)
    drawn = [mixture.draw_composite(chosen, rng, 2000) for _ in range(60)]
    assert {len(set(s.tasks[s.loss]) - {NO_TASK}) for s in drawn} == {2, 3, 4}
    texts = [world["model"].tokenizer.decode(s.tokens) for s in drawn]
    assert {text.count("Example ") for text in texts} == {0, 1, 2}
    with pytest.raises(InputError, match="composite_sizes: expected two numbers from 1 on, found 4 and 2"):
        dataclasses.replace(mixture, composite_sizes=(4, 2))


def mixture(world, tasks=TASKS, **settings):
    labels = {n: i for i, n in enumerate(NAMES)}
    return Mixture(tasks, labels, world["model"].tokenizer, 2, **{"max_length": 64, "prompt_loss": True, **settings})


def batches(mixture, batch_size=4, packing=True, multiple=1, shards=1):
    chosen = mixture.chosen()
    return Batches(
        mixture, chosen, plan(mixture, chosen, batch_size, packing=packing, multiple=multiple, shards=shards)
    )


def unpacked(batch):
    """The sequences of a batch, one by one."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            own = batch.segments[row] == segment
            assert np.array_equal(batch.positions[row, own], np.arange(own.sum()))
            yield Tokenized(batch.tokens[row, own], batch.loss[row, own], batch.tasks[row, own])


LOPSIDED = {**TASKS, "apple": TASKS["apple"] * 50, "birch": [*TASKS["birch"], Example("x" * 900, "y")]}


@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_is_balanced_or_as_it_comes_and_drops_what_is_too_long(world, packing):
    def shares(**settings):
        stream = batches(mixture(world, LOPSIDED, **settings), packing=packing)
        seen = [s.tasks[0] for _ in range(80) for s in unpacked(next(stream))]
        return np.bincount(seen, minlength=4) / len(seen)

    assert np.abs(shares() - 0.25).max() < 0.02
    assert np.abs(shares(mixture="natural") - np.asarray([1000, 20, 20, 20]) / 1060).max() < 0.04
    assert np.abs(shares(mixture="natural", samples_per_task=20) - 0.25).max() < 0.06


def test_what_is_not_used_is_counted_by_task(world):
    tasks = {
        **TASKS,
        "apple": [*TASKS["apple"], Example("x" * 900, "y"), Example("y" * 900, "y")],
        "birch": [*TASKS["birch"], Example("How many?", " \n"), Example("How many pears?", "")],
        "cedar": [*TASKS["cedar"], Example("", "")],  # its end token is the first, which nothing predicts
    }
    roomy, rng = mixture(world, tasks, max_length=400), np.random.default_rng(0)
    fitting = roomy.chosen()
    lengths = [len(roomy.composite_of(fitting, rng).tokens) for _ in range(200)]
    limit = int(np.median(lengths))
    settings = mixture(world, tasks, composite=0.2, max_length=limit)
    lost = unused(settings, settings.chosen())
    assert lost.examples == {"apple": 22, "birch": 22, "cedar": 21, "daisy": 20}
    assert (lost.max_length, lost.too_long) == (limit, {"apple": 2})
    assert lost.empty == {"birch": 2, "cedar": 1}
    assert lost.unpredicted == {"cedar": 1}
    assert abs(lost.composites / TRIED - np.mean(np.asarray(lengths) > limit)) < 0.2
    talks = dataclasses.replace(settings, conversations=1.0)  # which have lengths of their own
    lengths = [len(roomy.conversation_of(fitting, rng).tokens) for _ in range(200)]
    limit = int(np.median(lengths))
    talks = dataclasses.replace(talks, max_length=limit)
    share = float(np.mean([len(roomy.composite_of(fitting, rng).tokens) > limit for _ in range(200)]))
    found = unused(talks, fitting).composites / TRIED
    assert abs(found - 0.5) < 0.2
    assert abs(share - 0.5) > 0.3
    few = mixture(world, tasks, samples_per_task=5)
    lost = unused(few, few.chosen())
    assert set(lost.examples.values()) == {5}  # the rest are left out by choice
    assert lost.composites == 0


def test_the_prefix_that_all_tasks_share():
    def rows(*texts):
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

    assert shared_prefix({"a": rows("sys x1", "sys y1"), "b": rows("sys z", "sys w")}) == 4
    assert shared_prefix({"a": rows("sys x1", "sys y1", "odd"), "b": rows("sys z", "sys w", "")}) == 4
    assert shared_prefix({"a": rows("sys x", "sys y"), "b": rows("other", "more")}) == 0
    assert shared_prefix({"a": rows("same", "same"), "b": rows("same", "same")}) == 4
    assert shared_prefix({"a": rows("alone", "alone")}) == 0


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_has_one_shape_and_holds_the_sequences_asked_for(world, packing):
    stream = batches(mixture(world, composite=0.5, max_length=200), batch_size=12, packing=packing, multiple=2)
    some = [next(stream) for _ in range(30)]
    assert len({b.tokens.shape for b in some}) == 1
    assert len(some[0].tokens) % 2 == 0
    sequences = [list(unpacked(b)) for b in some]
    assert 9 <= np.mean([len(s) for s in sequences]) <= 16
    mixed = [len(np.unique(s.tasks[s.tasks != NO_TASK])) == 3 for parts in sequences for s in parts]
    assert 0.4 < np.mean(mixed) < 0.6
    if packing:
        assert np.mean([(b.segments > 0).mean() for b in some]) > 0.6


def test_packing_gives_the_terms_of_padding(world):
    """Gradients of packed rows are compared with torch's, sequence by sequence, in test_training_mesh."""
    model = world["model"]
    packed = next(batches(mixture(world, composite=0.3, max_length=200), batch_size=8))
    assert packed.segments.max() > 1

    def terms(batch):
        batch, rows = jax.tree.map(jnp.asarray, batch), len(batch.tokens)
        return compiled_losses(model, batch, model.bind([mj.Gates(2)] * rows, rows), 1.0)

    a, b = terms(packed), terms(collate(list(unpacked(packed))))
    for key in ("lm", "gate", "gate_accuracy", "hits", "judged", "entropy", "load"):
        assert np.allclose(getattr(a, key), getattr(b, key), atol=1e-5), key
    assert np.isclose(float(jnp.sum(a.judged)), 1)
    assert np.allclose(jnp.sum(a.load, -1), 1, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_the_data_go_on_where_their_position_says(world, packing):
    settings = mixture(world, composite=0.3, max_length=200)
    stream = batches(settings, packing=packing, multiple=2, shards=2)
    for _ in range(5):
        next(stream)
    position = stream.position()
    expected = [next(stream) for _ in range(4)]
    again = batches(settings, packing=packing, multiple=2, shards=2)
    again.seek(position)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)
    # each host draws its own shards, and together they are the whole
    chosen = settings.chosen()
    layout = plan(settings, chosen, 4, packing=packing, multiple=2, shards=2)
    first, second = (next(Batches(settings, chosen, layout, [i])) for i in range(2))
    whole = next(Batches(settings, chosen, layout))
    half = layout.rows // 2
    assert np.array_equal(np.concatenate([first.tokens[:half], second.tokens[half:]]), whole.tokens)
    assert not first.segments[half:].any()
