"""Lines of task data: text and conversations, what a model reads of them, lines in which nothing is to be learnt."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import load_split, load_splits, write_splits
from meteora_jax.examples import Example, as_text, end_token, parse_example
from meteora_jax.retriever.profiles import read_training_file
from meteora_jax.training.data import Mixture
from meteora_jax.training.sequences import NO_TASK, encode_all
from meteora_jax.training.settings import BankTraining
from meteora_jax.training.validation import split_validation

SYSTEM = {"role": "system", "content": "Count."}
TALK = [
    SYSTEM, {"role": "user", "content": "Two dogs"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and a cat?"},
]  # fmt: skip
ANSWER = {"role": "assistant", "content": "3"}


def parsed(record, where="t.jsonl:1"):
    return parse_example(json.dumps(record).encode(), where)


def test_a_conversation_s_last_message_is_the_response():
    example = parsed({"messages": [*TALK, ANSWER]})
    assert example == Example("Two dogs\nand a cat?", "3", messages=tuple(TALK))
    assert example == parsed({"prompt": TALK, "response": "3"})
    assert example.asked == TALK
    assert parsed({"prompt": "a", "response": "b", "id": 7}).asked == "a"
    assert example.key != parsed({"messages": [*TALK[1:], ANSWER]}).key


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": TALK}, "messages: expected the assistant's answer at the end, found the user's message"),
        ({"messages": [*TALK, ANSWER, ANSWER]}, "messages: expected a conversation that awaits the assistant, found"),
        ({"prompt": TALK[:3], "response": "3"}, "prompt: expected a conversation that awaits the assistant, found one"),
        ({"messages": [ANSWER]}, "messages: expected a message before the assistant's answer, found none"),
        ({"messages": []}, "messages: expected a list of messages, found []"),
        ({"messages": "hi"}, "messages: expected a list of messages, found 'hi'"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages: message 0: content: expected a text, found none"),
        ({"messages": [*TALK, ANSWER], "response": "3"}, "expected messages alone, found response beside them"),
        ({"prompt": [], "response": "3"}, "t.jsonl:1: prompt: expected a list of messages, found []"),
        ({"prompt": TALK, "response": 3}, "t.jsonl:1: response: expected a string, found 3"),
    ],
)  # fmt: skip
def test_a_line_in_which_nothing_is_to_be_answered_is_refused(record, said):
    with pytest.raises(InputError) as refused:
        parsed(record)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_bad_lines_of_all_tasks_are_said_together(tmp_path):
    write_splits(tmp_path / "a", {"train": [parsed({"messages": [*TALK, ANSWER]})]})
    assert load_split(tmp_path, "a", "train") == [Example("Two dogs\nand a cat?", "3", messages=tuple(TALK))]
    for name, lines in (("b", [{"messages": TALK}, {"prompt": 1, "response": ""}]), ("c", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as refused:
        load_splits(tmp_path, ["a", "b", "a", "c", "d"], "train")
    assert [problem.removeprefix(str(tmp_path))[:18] for problem in refused.value.problems] == [
        "/a: expected a tas", "/b/train.jsonl:1: ", "/b/train.jsonl:2: ", "/c/train.jsonl: ex", "/d/train.jsonl: ex",
    ]  # fmt: skip


def test_training_reads_messages_as_generation_does(world):
    """The tokens of a prompt are those of `model.encode`, in transformers' own rendering; response and end follow."""
    tokenizer = world["model"].tokenizer
    chat, text = parsed({"messages": [*TALK, ANSWER]}), Example("plain ", "so")
    first, second = encode_all([chat, text], 3, tokenizer, 2, prompt_loss=False)
    prompt = world["model"].encode(TALK)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")
    assert list(first.tokens) == [*prompt, *tokenizer("3")["input_ids"], 2]
    assert tokenizer.decode(first.tokens) == rendered + "3<|im_end|>"
    assert list(np.flatnonzero(first.loss)) == list(range(len(prompt), len(first.tokens)))
    assert tokenizer.decode(second.tokens[:-1]) == "plain so"


def test_a_response_ends_with_the_token_that_ends_a_turn_if_generation_stops_there(world):
    tokenizer, config = world["model"].tokenizer, world["model"].config
    assert tokenizer.eos_token_id == 2
    for stops, end in (((0, 2), 2), ((2,), 2), ((0, 7), 0)):
        assert end_token("base", dataclasses.replace(config, eos_token_ids=stops), tokenizer) == end
    with pytest.raises(InputError, match=r"^base: eos_token_id: expected an end token, found none"):
        end_token("base", dataclasses.replace(config, eos_token_ids=()), tokenizer)


def test_a_tokenizer_without_a_template_and_one_that_refuses_are_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match=r"^t\.jsonl:1: expected messages that the chat template takes, .*no system"):
        encode_all([parsed({"messages": [*TALK, ANSWER]})], 0, tokenizer, 2, prompt_loss=False)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"^t\.jsonl:1: expected a tokenizer with a chat template for messages"):
        encode_all([parsed({"messages": [*TALK, ANSWER]})], 0, tokenizer, 2, prompt_loss=False)


def test_a_first_token_that_tokenizer_and_template_both_write_stands_once_in_a_composite():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    example = parsed({"messages": [*TALK, ANSWER]})
    assert as_text(example, tokenizer).prompt.startswith("<|im_start|>system")  # here it begins every message
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    assert as_text(example, tokenizer).prompt.startswith("<|endoftext|><|im_start|>")  # the tokenizer does not write it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = as_text(example, tokenizer)
    assert plain.prompt.startswith("<|im_start|>system")
    chat, text = encode_all([example, plain], 0, tokenizer, 2, prompt_loss=False)
    assert list(chat.tokens) == list(text.tokens)
    assert list(chat.tokens).count(0) == 1


def test_composites_of_conversations_keep_their_template_and_their_owners(world):
    tokenizer = world["model"].tokenizer
    system = {"role": "system", "content": "You are brief. " * 20}
    tasks = {
        "chat": [parsed({"messages": [system, {"role": "user", "content": f"Is it {i}?"}, ANSWER]}) for i in range(4)],
        "text": [Example(f"number {i}", str(i)) for i in range(4)],
    }
    how = dict(max_length=4000, prompt_loss=False, composite=1.0, composite_sizes=(2, 2))
    for cut in (0.0, 1.0):
        mixture = Mixture(tasks, {"chat": 0, "text": 1}, tokenizer, 2, **how, composite_cut=cut)
        s = mixture.draw_composite(mixture.chosen(), np.random.default_rng(0), 4000)
        whole = tokenizer.decode(s.tokens)
        own = tokenizer.decode(s.tokens[s.tasks == 0])
        assert own.startswith("<|im_start|>system\nYou are brief.")
        assert "<|im_start|>user\nIs it " in own  # what is cut is the text of the messages, never the template
        assert "<|im_start|>assistant\n(" in own
        assert ("You are brief. " * 20 in own) == (cut == 0)
        assert "number" in tokenizer.decode(s.tokens[s.tasks == 1])
        assert tokenizer.decode(s.tokens[s.tasks == NO_TASK]) == "<|im_end|>"
        assert tokenizer.decode(s.tokens[s.loss]).startswith("1. ")
        assert whole.endswith("<|im_end|>")


def test_a_profile_is_what_the_user_says_as_a_request_is(tmp_path, world):
    write_splits(tmp_path, {"train": [parsed({"messages": [*TALK, ANSWER]}), Example("plain", "so")]})
    assert read_training_file(tmp_path / "train.jsonl") == ["and a cat?", "plain"]
    assert world["model"].request_text(TALK) == "and a cat?"
    assert world["model"].request_text(TALK, "all") == "Two dogs\nand a cat?"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: messages: expected the assistant's answer at the end"):
        read_training_file(tmp_path / "bad.jsonl")


def test_conversations_of_one_question_and_other_systems_are_different_prompts(world):
    def talk(i):
        return parsed({"messages": [{"role": "system", "content": f"Add {i}."}, TALK[1], ANSWER]})

    settings = BankTraining()
    tasks = {"sums": [talk(i) for i in range(40)]}
    training, split = split_validation(tasks, settings, world["model"].tokenizer, 2, 500)
    assert len(training["sums"]) + len(split["sums"]) == 40
