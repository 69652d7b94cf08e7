"""Generation: ragged batches, sampling, stop strings, streaming, chat, and nothing compiled twice."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from extent import parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edit_json, tiny_tokenizer
from tokenizers import decoders

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.engine.request import Sampling
from meteora_jax.engine.sampling import SamplingRows, sample
from meteora_jax.engine.step import run_steps
from meteora_jax.padding import bucket
from meteora_jax.text import TextStream, check_text, load_tokenizer

ROWS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 90)), [200]]


@pytest.mark.parametrize(
    "router",
    parameters([None, mj.Gates(2), mj.Fixed("cedar")], [mj.Gates(2)], "test_retrieval mixes them in a ragged batch"),
)
def test_a_ragged_batch_equals_its_prompts(world, router):
    model = world["model"]
    together = model.generate(ROWS, router, max_new_tokens=20)
    for row, done in zip(ROWS, together, strict=True):
        (alone,) = model.generate([row], router, max_new_tokens=20)
        assert (done.token_ids, done.text, done.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        if router is not None:
            assert np.array_equal(done.routing.indices, alone.routing.indices)
            assert np.allclose(done.routing.weights, alone.routing.weights, atol=1e-4)


def test_cached_decoding_equals_recomputing(world):
    """Every generated token is the argmax of logits computed over the whole text so far, without a cache."""
    model = world["model"]
    for row, done in zip(ROWS, model.generate(ROWS, mj.Gates(2), max_new_tokens=12), strict=True):
        said = done.token_ids + list(model.config.eos_token_ids[:1]) * (done.finish_reason == "end")
        logits = np.asarray(model.logits([row + said], mj.Gates(2)))[0, len(row) - 1 : -1]
        assert np.argmax(logits, -1).tolist() == said


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}, {"stop": ("a", "e")}])
def test_streaming_equals_not_streaming(world, options):
    model = world["model"]
    whole = model.generate(ROWS, max_new_tokens=18, **options)
    texts, streamed = [""] * len(ROWS), None
    for piece in model.stream(ROWS, max_new_tokens=18, **options):
        if isinstance(piece, mj.Delta):
            texts[piece.index] += piece.text
        else:
            streamed = piece
    assert texts == [c.text for c in whole]
    for a, b in zip(streamed, whole, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert np.array_equal(a.routing.indices, b.routing.indices)


def test_a_second_call_compiles_nothing(world):
    model = world["model"]
    calls = [
        dict(prompts=ROWS, router=mj.Gates(2), temperature=0.7, top_k=5, top_p=0.9, seed=1, max_new_tokens=9),
        dict(prompts=[r[::-1] for r in ROWS], router=mj.Gates(2, 3.0), temperature=0.3, top_k=9, top_p=0.5, seed=8,
             max_new_tokens=11),
    ]  # fmt: skip
    model.generate(**calls[1])
    compiled = run_steps._cache_size()
    for call in calls:
        model.generate(**call)
    assert run_steps._cache_size() == compiled


def test_a_text_that_is_asked_several_times_is_encoded_once(world, monkeypatch):
    model, seen = world["model"], []
    encode = model.tokenizer

    def spy(text, **options):
        seen.append(text)
        return encode(text, **options)

    texts = ["a b c", "a", "a b c", [1, 2], "a b c"]
    whole = model.generate(texts, None, max_new_tokens=2)
    with monkeypatch.context() as patched:
        patched.setattr(model, "tokenizer", spy)
        requests, _ = model._requests(texts, None, 2, mj.Sampling(), (), False)
    assert seen == ["a b c", "a"]
    assert [list(r.prompt) for r in requests] == [
        text if isinstance(text, list) else model.encode(text) for text in texts
    ]
    assert whole[0].token_ids == whole[2].token_ids == whole[4].token_ids


def test_stop_string_ends_text_and_tokens(world):
    model = world["model"]
    (free,) = model.generate([ROWS[0]], max_new_tokens=30)
    middle = free.text[len(free.text) // 2 :][:2]
    (done,) = model.generate([ROWS[0]], max_new_tokens=30, stop=[middle])
    assert done.finish_reason == "stop"
    assert done.text == free.text[: free.text.index(middle)]
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert middle in model.decode(done.token_ids)
    assert middle not in model.decode(done.token_ids[:-1])


def test_one_text_is_one_stop_string(world):
    model = world["model"]
    (whole,) = model.generate([ROWS[0]], max_new_tokens=20)
    stop = whole.text[4:7]
    found = [model.generate([ROWS[0]], max_new_tokens=20, stop=given)[0] for given in (stop, [stop])]
    assert [c.text for c in found] == [whole.text[: whole.text.index(stop)]] * 2
    assert found[0].token_ids == found[1].token_ids


def test_an_end_token_ends_its_row_only(world):
    model = world["model"]
    first = int(np.argmax(np.asarray(model.logits([ROWS[1]], None))[0, -1]))
    free = model.generate(ROWS, None, max_new_tokens=10)
    ended = mj.Meteora(
        dataclasses.replace(model.config, eos_token_ids=(first,)),
        model.bank, model.gates, model.tokenizer, model.graph, model.weights,
    )  # fmt: skip
    done = ended.generate(ROWS, None, max_new_tokens=10)
    assert (done[1].token_ids, done[1].text, done[1].finish_reason) == ([], "", "end")
    for a, b in zip(done, free, strict=True):
        cut = b.token_ids.index(first) if first in b.token_ids else len(b.token_ids)
        assert a.token_ids == b.token_ids[:cut]


def test_seed_decides_a_sample(world):
    model = world["model"]

    def say(seed):
        return [c.token_ids for c in model.generate(ROWS, temperature=1.0, seed=seed, max_new_tokens=12)]

    assert say(1) == say(1)
    assert say(1) != say(2)
    twice = model.generate([ROWS[0]] * 2, temperature=1.0, max_new_tokens=12)
    assert twice[0].token_ids != twice[1].token_ids  # rows draw apart


def kept_by_numpy(logits, temperature, top_k, top_p):
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or None]
    p = np.exp(scaled[order] - scaled[order].max())
    p /= p.sum()
    if top_p is not None:
        order = order[: int(np.searchsorted(np.cumsum(p), top_p - 1e-9)) + 1]
    return set(order.tolist())


def draw(logits, count, how):
    """So many first tokens by the same settings, each a response of its own."""
    rows = SamplingRows.of([dataclasses.replace(how, index=i) for i in range(count)], len(logits))
    return np.asarray(sample(jnp.tile(logits[None], (count, 1)), jnp.zeros((count,), jnp.int32), rows))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([None, 0.1, 0.6, 0.95]),
)  # fmt: skip
def test_samples_stay_in_the_kept_set(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    drawn = draw(logits, 256, Sampling(temperature, top_k, top_p, seed))
    kept = kept_by_numpy(logits, temperature, top_k, top_p)
    assert set(np.asarray(drawn).tolist()) <= kept


def test_samples_follow_the_softmax():
    drawn = draw(np.log(np.asarray([0.5, 0.3, 0.15, 0.05], np.float32)), 20000, Sampling(1.0))
    assert np.allclose(np.bincount(drawn, minlength=4) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@pytest.mark.parametrize("how", [{"top_p": 1e-40}, {"temperature": 2e-38}, {"temperature": 1e40, "top_k": 1}], ids=str)
def test_numbers_that_float32_does_not_hold_are_no_other_ones(how):
    logits = np.random.default_rng(3).standard_normal(64).astype(np.float32) * 9
    assert set(draw(logits, 64, Sampling(**{"temperature": 1.0, **how})).tolist()) == {int(logits.argmax())}


def test_chat_uses_the_template(world):
    model = world["model"]
    messages = [{"role": "user", "content": "The quick brown fox"}]
    rendered = "<|im_start|>user\nThe quick brown fox<|im_end|>\n<|im_start|>assistant\n"
    assert model.encode(messages) == model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    (chat,) = model.generate([messages], max_new_tokens=5)
    (plain,) = model.generate([model.encode(messages)], max_new_tokens=5)
    assert chat.token_ids == plain.token_ids


TEMPLATES = {
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x": (
        "System role not supported"
    ),
    "{{ messages[0]['content'] + 1 }}": "can only concatenate str",
    "{{ messages[0].nothing.at_all }}": "has no attribute 'nothing'",
    "{% for m in %}": "Expected an expression",
    "{{ 1 / 0 }}": "division by zero",
    "{{ '\\ud83d' }}": "prompt 1: by the chat template: expected text that UTF-8 can hold",
}


def with_template(model, template):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_template_refuses_is_said_in_a_line(world, template):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    model = with_template(world["model"], template)
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=r"^prompt 1: [^\n]*$") as refusal:
            call(["plain text", chat], max_new_tokens=1)
        assert TEMPLATES[template] in str(refusal.value)
    with pytest.raises(InputError, match=r"^prompt: "):
        model.encode(chat)


def test_named_templates_need_a_default(world):
    chat = [{"role": "user", "content": "hi"}]
    named = {"default": "{{ messages[0]['content'] }}", "tool_use": "x"}
    assert with_template(world["model"], named).encode(chat) == world["model"].encode("hi")
    with pytest.raises(InputError, match=r"^prompt: expected messages .*no default specified[^\n]*$"):
        with_template(world["model"], {"rag": "x", "tool_use": "x"}).encode(chat)
    with pytest.raises(InputError, match=r"^prompt 0: expected a tokenizer with a chat template"):
        with_template(world["model"], None).generate([chat])


@pytest.mark.parametrize("known", [True, False], ids=["known class", "unknown class"])
def test_a_tokenizer_s_own_code_is_not_run(tmp_path, monkeypatch, known):
    """Neither run nor asked about, whether transformers could do without it or not."""
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n")
    changes = dict(auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    edit_json(tmp_path / "tokenizer_config.json", **changes, **({} if known else {"tokenizer_class": "Own"}))
    model = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(model))

    asked = []
    monkeypatch.setattr("builtins.input", lambda *given: asked.append(given) or "y")
    if known:
        assert load_tokenizer(tmp_path)("The")["input_ids"] == tiny_tokenizer()("The")["input_ids"]
    else:
        with pytest.raises(InputError, match=r"found ones that need code of their own, which is not run$"):
            load_tokenizer(tmp_path)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"added_tokens_decoder": {"a": 3}}', "\xff"])
def test_a_damaged_tokenizer_is_refused(tmp_path, file, text):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(text, encoding="latin-1")
    if (file, text) == ("tokenizer_config.json", '{"model": 3}'):
        return  # says nothing about a tokenizer
    with pytest.raises(InputError, match=r"^[^\n]*: expected a tokenizer's files, found none that load[^\n]*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (dict(prompts=[]), "at least one, found none"),
        (dict(prompts=[""]), "prompt 0: expected at least one token"),
        (dict(prompts=[[1], []]), "prompt 1: expected at least one token"),
        (dict(prompts=[[1] * 250]), "prompt 0: expected at most 192 tokens"),
        (dict(prompts=[[1, 320]]), "below 320, found 320"),
        (dict(prompts="one text"), "found a single text"),
        (dict(prompts=[[1]], temperature=-1.0), "temperature: expected"),
        (dict(prompts=[[1]], temperature=1.0, top_p=1.5), "top_p: expected"),
        (dict(prompts=[[1]], temperature=1.0, top_k=0), "top_k: expected"),
        (dict(prompts=[[1]], max_new_tokens=0), "max_new_tokens: expected"),
    ],
)
def test_bad_calls_are_refused(world, call, said):
    with pytest.raises(InputError) as refusal:
        world["model"].generate(**call)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_buckets_waste_at_most_half():
    for n in range(1, 3000):
        assert n <= bucket(n) <= max(16, n * 3 // 2)
    assert len({bucket(n) for n in range(1, 3000)}) <= 17


@pytest.mark.parametrize("together", [1, 100])
@pytest.mark.parametrize("before", ["So:", ""])
def test_a_character_that_is_cut_takes_no_other_one_with_it(before, together):
    """Tokens for single bytes, as LLaMA 2 writes characters that its vocabulary has not."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    said = "🙂é漢" * 6
    tokens = [*filter(None, [before]), *(f"<0x{byte:02X}>" for byte in said.encode())]
    for end in range(1, len(tokens) + 1):
        stream = TextStream(lambda ids: decoder.decode([tokens[i] for i in ids]), ())
        parts = [stream.push(range(at, min(at + together, end))) for at in range(0, end, together)]
        parts.append(stream.finish())
        written = (before + said).encode()[: len((before + said).encode()) - len(tokens) + end]
        whole = written.decode(errors="ignore")
        assert stream.text == "".join(parts)
        assert stream.text == whole + "\ufffd" * (len(written) - len(whole.encode()))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab 漢🙂é\n", max_size=20), st.lists(st.sampled_from(["ab", "b ", "漢", "aba"]), max_size=2),
       st.lists(st.integers(1, 4), min_size=20, max_size=20))  # fmt: skip
def test_streamed_text_adds_up_and_is_never_taken_back(text, stops, cuts):
    tokens = list(text.encode())  # a tokenizer of single bytes: the hardest case for whole characters
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stops)
    said, start = "", 0
    for cut in cuts * 5:
        said += stream.push(tokens[start : start + cut])
        assert "\ufffd" not in said
        start += cut
    said += stream.finish()
    at = [i for i in (text.find(s) for s in stops) if i >= 0]
    ends = {text.find(s) + len(s): text.find(s) for s in stops if s in text}
    want = text[: ends[min(ends)]] if at else text
    # two stop strings may be completed by one token: the earlier start wins
    assert said == stream.text
    assert said == want or (len(stops) == 2 and said == text[: min(at)])


@pytest.mark.parametrize("pushed", [1, 3, 40])
def test_a_long_response_is_decoded_from_its_last_tokens_on(pushed):
    """By a decoder that leaves out special tokens and the first space, as SentencePiece's do; every piece is asked for
    with few tokens, and their text is that of all."""
    words = [" the", "", " fox", "es", ",", "", "", "\n", " 漢", "ab "]
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return "".join(words[i] for i in ids).removeprefix(" ")

    tokens = np.random.default_rng(0).integers(0, len(words), 400).tolist()
    stream = TextStream(decode, ())
    for start in range(0, 400, pushed):
        stream.push(tokens[start : start + pushed])
        assert stream.text == "".join(words[i] for i in tokens[: start + pushed]).removeprefix(" ")
    assert max(asked) <= 32 + pushed


@pytest.mark.parametrize("text", ["", "hi", "\x00", "\ufffd", "\U0001f642", "漢字"])
def test_text_that_utf8_holds_is_let_through(text):
    check_text(text, "prompt 0")


@pytest.mark.parametrize(("text", "at"), [("hi \ud83d", 3), ("\ude42", 0), ("\ud83d\ude42", 0), ("🙂\udc80x", 1)])
def test_half_a_character_is_refused_where_it_stands(text, at):
    with pytest.raises(InputError, match=rf"^prompt 7: expected text that UTF-8 can hold, .* at character {at}$"):
        check_text(text, "prompt 7")


def test_the_device_makes_many_tokens_between_two_looks_of_the_host(world):
    model = dataclasses.replace(world["model"])
    model.generate([ROWS[0]], None, max_new_tokens=1)
    counters = model._engines.holding([]).counters
    before = counters.dispatches
    (done,) = model.generate([ROWS[0]], None, max_new_tokens=20)
    assert len(done.token_ids) == 20
    assert counters.dispatches - before == 1 + 5  # the prompt; then 8 and 8 steps, and 3 of one


def test_an_engine_takes_token_ids_as_generate_does(world):
    model = world["model"]
    (alone,) = model.generate([ROWS[0]], max_new_tokens=5)
    engine = mj.Engine(model, max_tokens=64, blocks=64, max_rows=4)
    assert engine.submit(ROWS[0], max_new_tokens=5).result().token_ids == alone.token_ids
