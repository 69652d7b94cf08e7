"""Tokens of log probabilities, their bytes and their places, beside the text that they make."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from gguf_files import sentencepiece_metadata
from served import serving
from tiny import EOS, tiny_tokenizer
from transformers import LlamaTokenizer
from worlds import make_world

from converters.gguf_tokenizer import build_tokenizer
from meteora_jax.serving.answers import chat_logprobs, text_logprobs
from meteora_jax.serving.spelling import Place, Spelling

TEXTS = ["The quick brown fox", "Ünïcödé, 漢字 and 🙂", " two  spaces\n", "漢", "Answer 言語 or no. 🙂🚀"]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return tiny_tokenizer()
    folder = tmp_path_factory.mktemp("pieces")
    build_tokenizer(sentencepiece_metadata(), "x", 480, 100).write(folder)
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(world):
    with serving(world["model"]) as found:
        yield found.client()


def told(tokenizer: Any, ids: list[int], place: Place | None = None) -> dict[str, Any]:
    likely = [(-1.0, [(token, -1.0)]) for token in ids]
    return text_logprobs(place or Place(Spelling(tokenizer)), ids, likely, 1)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_bytes_join_to_the_text(tokenizer, text):
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    said, found = decode(tokenizer, ids), told(tokenizer, ids)
    entries = chat_logprobs(Place(Spelling(tokenizer)), ids, [(-1.0, [(token, -1.0)]) for token in ids], 1)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == said
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert [list(best) for best in found["top_logprobs"]] == [[token] for token in found["tokens"]]
    for (at, end), token in zip(itertools.pairwise([*found["text_offset"], len(said)]), found["tokens"], strict=True):
        assert token.startswith("bytes:") or said[at:end] == token


@pytest.mark.parametrize("seed", range(3))
def test_a_token_begins_where_the_text_before_it_ends(tokenizer, seed):
    """Special tokens and broken characters among them; however they come."""
    special = [tokenizer.eos_token_id]
    parts = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("言語", "🚀", " Ünï")]
    broken = [tokenizer("言", add_special_tokens=False)["input_ids"][-2:-1], parts[1][-3:-1], parts[1][-1:]]
    word, ids = list(tokenizer("fox jumps", add_special_tokens=False)["input_ids"]), list(special)
    draws = np.random.default_rng(seed).integers(0, 7, 30)
    for draw in draws:
        ids += special if draw == 6 else [*parts, *broken][draw] + word
    # pieces' decoder takes back a character while the bytes of the next one are not all there
    certain = (len(decode(tokenizer, ids[:i]).rstrip("\ufffd")) for i in range(len(ids)))
    want = list(itertools.accumulate(certain, max))
    assert "\ufffd" in decode(tokenizer, ids)
    assert told(tokenizer, ids)["text_offset"] == want
    place = Place(Spelling(tokenizer))
    pieces = [told(tokenizer, ids[start : start + 4], place)["text_offset"] for start in range(0, len(ids), 4)]
    assert [at for piece in pieces for at in piece] == want


@pytest.mark.parametrize("begin", ["The", " The"])
def test_special_tokens_count_where_the_text_has_them(tokenizer, begin):
    end = tokenizer.eos_token
    text = f"{begin} quick{end}brown{end} fox"
    ids = list(tokenizer(text)["input_ids"])
    found = told(tokenizer, ids, Place(Spelling(tokenizer), 0, text))
    spelt = list(zip(found["tokens"], found["text_offset"], strict=True))
    if found["tokens"][0] != text[: len(found["tokens"][0])]:
        assert spelt.pop(0) == (tokenizer.bos_token, 0)  # the tokenizer's own
    assert "".join(token for token, _ in spelt) == text
    assert all(text.startswith(token, at) for token, at in spelt)


def test_a_stream_says_the_offsets_of_the_whole(client):
    how = dict(model="apple", prompt="Ünï", temperature=1.0, seed=3, max_tokens=40, logprobs=2)
    whole = client.completions.create(**how).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**how, stream=True)]
    assert [at for one in chunks for at in one.text_offset] == whole.text_offset
    assert [token for one in chunks for token in one.tokens] == whole.tokens
    assert any(token.startswith("bytes:") for token in whole.tokens)


def test_a_prompt_is_echoed_as_it_was_sent(client, world):
    prompt = f"The quick{EOS} brown"
    how = dict(model="apple", temperature=0, max_tokens=4, echo=True, logprobs=1)
    alone = client.completions.create(**(how | {"echo": False}), prompt=prompt).choices[0]
    both = client.completions.create(**how, prompt=[prompt, "A"])
    for said, sent in zip(both.choices, (prompt, "A"), strict=True):
        assert said.text.startswith(sent)
        assert said.logprobs.text_offset[len(world["model"].encode(sent))] == len(sent)
    assert both.choices[0].text == prompt + alone.text
    ids = client.completions.create(**how, prompt=world["model"].encode(prompt)).choices[0]
    assert ids.text == prompt.replace(EOS, "") + alone.text


@pytest.fixture(scope="module")
def pieces_client(tmp_path_factory):
    """Of a base whose decoder leaves out the space that a text begins with."""
    folder = tmp_path_factory.mktemp("pieces")
    world = make_world(folder, vocab_size=480)
    build_tokenizer(sentencepiece_metadata(), "x", 480, 100).write(folder)
    model = dataclasses.replace(world["model"], tokenizer=LlamaTokenizer.from_pretrained(folder))
    with serving(model) as found:
        yield found.client(), model


def test_a_completion_keeps_the_space_between_it_and_its_prompt(pieces_client):
    client, _ = pieces_client
    first = dict(model="apple", prompt="The quick", max_tokens=1, temperature=1.5, logprobs=1)
    seeds = [n for n in range(100) if client.completions.create(**first, seed=n).choices[0].text.startswith(" ")]
    assert len(seeds) > 2
    for seed in seeds[:4]:
        how = first | {"max_tokens": 8, "seed": seed}
        said = client.completions.create(**how).choices[0]
        found = said.logprobs
        both = client.completions.create(**how, echo=True).choices[0]
        assert both.text == "The quick" + said.text
        assert [at - len("The quick") for at in both.logprobs.text_offset[-len(found.tokens) :]] == found.text_offset
        assert "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)) == said.text
        assert said.text.startswith(found.tokens[0])
        if "\ufffd" not in said.text:
            assert "".join(found.tokens) == said.text
        stopped = client.completions.create(**how, stop=[found.tokens[0]]).choices[0]  # begins with that space
        assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_a_text_without_a_prompt_s_begins_itself(pieces_client):
    client, model = pieces_client
    how = dict(model="apple", prompt=[model.tokenizer.bos_token_id], max_tokens=6, temperature=1.0)
    texts = [client.completions.create(**how, seed=seed).choices[0].text for seed in range(8)]
    assert not any(text.startswith(" ") for text in texts)
