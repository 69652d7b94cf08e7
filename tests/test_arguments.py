"""What callers pass: every public function refuses the wrong kind in one line that names the argument.

The calls run in a process of their own, where nothing checks annotations before the functions themselves do.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax.numpy as jnp, numpy as np
import meteora_jax as mj

base, bank, gates, calls = json.load(sys.stdin)
model = mj.load(base, bank, gates, dtype="float32")
index = mj.Index.build({name: [f"about {name}"] for name in model.adapter_names})
user = {"role": "user", "content": "hi"}


def ask(**options):
    return model.generate([[1]], **{"max_new_tokens": 1, **options})


said = []
for call in calls:
    try:
        result = eval(call)
        said.append(["nothing", repr(result)[:200]])
    except Exception as e:
        said.append([type(e).__name__, str(e)])
json.dump(said, sys.stdout)
"""

REFUSED = {
    # what a step could not take any more
    'mj.Sampling(1.0, index=2**40)': "index: expected at most 2147483647, found 1099511627776",
    'mj.Engine(model).submit([5], router=None, logprobs=10**6)': "logprobs: expected at most 320, found 1000000",
    # what a check would have read to its end
    'ask(stop=(text for text in ["a"]))': "stop: expected a list of texts, found <gen",
    'mj.Engine(model).submit([5], router=None, stop=iter(["a"]))': "stop: expected a list of texts, found <list",
    'mj.Gates(within=(name for name in ["apple", "cedar"]))': "Gates: within: expected a list of texts, found <gen",
    'mj.Logo(2, within=map(str, ["apple", "cedar"]))': "within: expected a list of texts, found <map",
    'mj.Retrieval(index, 1, exclude=iter(["apple"]))': "exclude: expected a list of texts, found <list",
    # prompts
    'model.generate(None)': "prompts: expected a list of prompts, found None",
    'model.generate(3)': "prompts: expected a list of prompts, found 3",
    'model.generate("hi")': "prompts: expected a list of prompts, found a single text",
    'model.generate(b"hi")': "prompts: expected a list of prompts, found b'hi'",
    'model.generate(user)': "prompts: expected a list of prompts, found {'role'",
    'model.generate([user])': "prompts: expected a list of prompts, found the messages of one: put them into a list",
    'model.generate([1, 2])': "prompts: expected a list of prompts, found the token ids of one: put them into a list",
    'model.generate(np.arange(3))': "found the token ids of one",
    'model.generate(np.int32(3))': "prompts: expected a list of prompts, found",
    'model.generate([3.5])': "prompt 0: expected a text, a list of messages or a list of token ids, found 3.5",
    'model.generate(["hi", None])': "prompt 1: expected a text, a list of messages",
    'model.generate([[1], [True]])': "prompt 1: expected a text, a list of messages",
    'model.generate([[1, 2.0]])': "prompt 0: expected a text",
    'model.generate([[1, "a"]])': "prompt 0: expected a text",
    'model.generate([[user, "a"]])': "prompt 0: expected a text",
    'model.generate(np.zeros((1, 2)))': "prompt 0: expected a text",
    'model.generate(np.zeros((1, 2, 3), int))': "prompt 0: expected a text",
    'model.generate([[{"role": "user"}]])': "prompt 0: message 0: content: expected a text, found none",
    'model.generate([[user, {"content": "x"}]])': "prompt 0: message 1: role: expected a text, found none",
    'model.generate([[{"role": "user", "content": ["x"]}]])': "prompt 0: message 0: content: expected a text, found [",
    'model.generate([[{"role": "user", "content": None}], [{}]])': "expected a text, found None; prompt 1: message 0",
    'model.generate(["ok", "hi \\ud83d"])': "prompt 1: expected text that UTF-8 can hold, found a lone surrogate at",
    'model.generate([[{"role": "user", "content": "\\ude00"}]])': "prompt 0: message 0: content: expected text that",
    'model.generate([[-1]])': "prompt 0: expected token ids from 0 and below 320, found -1",
    'model.stream([3.5])': "prompt 0: expected a text",
    'model.stream([""])': "prompt 0: expected at least one token",
    'model.encode(3)': "prompt: expected a text, a list of messages",
    'model.encode("\\ud83d")': "prompt: expected text that UTF-8 can hold",
    'model.request_text([{"role": "user"}])': "prompt: message 0: content",
    'model.request_text("\\ud83d")': "prompt: expected text that UTF-8 can hold",
    'model.decode("hi")': "token_ids: row 0: expected a list of token ids, found 'hi'",
    'model.decode([1, 5000])': "token_ids: expected token ids from 0 and below 320, found 5000",
    'model.decode([-1])': "found -1",
    # logits
    'model.logits([1, 2, 3])': "token_ids: expected rows of token ids, found the token ids of one: put",
    'model.logits(np.arange(3))': "found the token ids of one",
    'model.logits(None)': "token_ids: expected rows of token ids, found None",
    'model.logits("hi")': "token_ids: expected rows of token ids, found a single text",
    'model.logits(["hi"])': "token_ids: row 0: expected a list of token ids, found 'hi'",
    'model.logits([[1], [1.5]])': "token_ids: row 1: expected a list of token ids, found [1.5]",
    'model.logits(jnp.ones((1, 3)))': "token_ids: row 0: expected a list of token ids",
    'model.logits(np.ones((1, 3), bool))': "token_ids: row 0: expected a list of token ids",
    'model.logits(np.ones((1, 2, 3), int))': "token_ids: row 0: expected a list of token ids",
    'model.logits([])': "expected at least one, found none",
    'model.logits([[]])': "prompt 0: expected at least one token, found none",
    'model.logits(np.zeros((0, 3), int))': "expected at least one, found none",
    'model.logits([[1]], router="apple")': "router: expected Gates, Fixed",
    # options
    'ask(max_new_tokens="3")': "max_new_tokens: expected a whole number, found '3'",
    'ask(max_new_tokens=2.5)': "max_new_tokens: expected a whole number, found 2.5",
    'ask(max_new_tokens=True)': "max_new_tokens: expected a whole number, found True",
    'ask(max_new_tokens=None)': "max_new_tokens: expected a whole number, found None",
    'ask(max_new_tokens=0)': "max_new_tokens: expected at least 1, found 0",
    'ask(temperature="hot")': "temperature: expected 0 or a positive number, found 'hot'",
    'ask(temperature=None)': "temperature: expected",
    'ask(temperature=float("nan"))': "temperature: expected",
    'ask(seed=1.5)': "seed: expected a whole number, found 1.5",
    'ask(seed=None)': "seed: expected a whole number, found None",
    'ask(seed=2**40)': "seed: expected at most 2147483647",
    'ask(top_k=0)': "top_k: expected at least 1, found 0",
    'ask(top_k=1.5)': "top_k: expected a whole number, found 1.5",
    'ask(top_k=2**40)': "top_k: expected at most",
    'ask(top_p="half")': "top_p: expected a number in (0, 1], found 'half'",
    'ask(top_p=True)': "top_p: expected a number in (0, 1], found True",
    'ask(temperature="hot", top_k=0)': "found 'hot'; top_k: expected at least 1",
    'ask(stop=3)': "stop: expected a list of texts, found 3",
    'ask(stop=None)': "stop: expected a list of texts, found None",
    'ask(stop=["a", 3])': "stop 1: expected a text, found 3",
    'ask(stop={"a": 1})': "stop: expected a list of texts",
    'mj.Engine(model).submit([5], router=None, stop=["x", ""])': "stop: expected texts that can end a response",
    'ask(stop="")': "stop: expected texts that can end a response, found ''",
    'list(model.completions(["a", "b"], stop=[["x"], [""]]))': "stop: expected texts that can end a response",
    'ask(routing=3)': "routing: expected true, false or 'response', found 3",
    'model.generate(["a"], max_new_tokens=[4, 5])': "max_new_tokens: expected one for each of 1 prompts, found 2",
    'list(model.completions(["a", "b"], stop=[["x"]]))': "stop: expected one for each of 2 prompts, found 1",
    'mj.warm_up(model, batch_sizes=3)': "warm_up: batch_sizes: expected a list of whole numbers, found 3",
    # adapters
    'model.add_adapter(3, "new")': "add_adapter: path: expected a path, found 3",
    'model.add_adapter("x", 3)': "add_adapter: name 0: expected a text, found 3",
    'model.remove_adapter(3)': "remove_adapter: name: expected an adapter's (apple, birch, cedar, daisy), found 3",
    # routers
    'ask(router=3)': "Arrow, Spectr, Lag, Phatgoose, Logo, None or a list of them, found 3",
    'ask(router="elm")': "found 'elm'; or 'gates', 'base', 'gates if loaded'",
    'ask(router="apple")': "or 'gates', 'base', 'gates if loaded'; the adapter of this name is mj.Fixed('apple')",
    'model.stream(["a"], ["apple"])': "the adapter of this name is mj.Fixed('apple')",
    'ask(router=object())': "router: expected Gates, Fixed",
    'ask(router=[3])': "router: expected Gates, Fixed",
    'ask(router=mj.Gates)': "router: expected Gates, Fixed",
    'ask(router={"apple": 1.0})': "router: expected Gates, Fixed",
    'ask(router=mj.Fixed("elm"))': "Fixed: adapter: expected one of apple",
    'mj.Gates(top_k="2")': "Gates: top_k: expected a whole number, found '2'",
    'mj.Gates(top_k=True)': "Gates: top_k: expected a whole number",
    'mj.Gates(temperature=0)': "Gates: temperature: expected a positive number, found 0",
    'mj.Gates(temperature="1")': "Gates: temperature: expected a positive number, found '1'",
    'mj.Gates(within="apple")': "Gates: within: expected a list of texts, found 'apple'",
    'mj.Gates(within=3)': "Gates: within: expected a list of texts, found 3",
    'mj.Fixed(3)': "Fixed: adapters: expected a name or {name: weight}, found 3",
    'mj.Fixed(None)': "Fixed: adapters: expected a name or {name: weight}, found None",
    'mj.Fixed(["apple", "birch"])': "Fixed: adapters: expected a name or {name: weight}",
    'mj.Fixed({})': "Fixed: adapters: expected a name or {name: weight}, found {}",
    'mj.Fixed({"a": "x"})': "Fixed: a: expected a finite weight, found 'x'",
    'mj.Fixed({"a": True})': "Fixed: a: expected a finite weight, found True",
    'mj.Fixed({"a": float("nan")})': "Fixed: a: expected a finite weight, found nan",
    'mj.Fixed({"a": 1e300})': "Fixed: a: expected a finite weight, found 1e+300",
    'mj.Fixed({3: 0.5})': "Fixed: adapters: expected names, found 3",
    'mj.Retrieval(index, k=0)': "Retrieval: k: expected at least 1, found 0",
    'mj.Retrieval(index, k="3")': "Retrieval: k: expected a whole number, found '3'",
    'mj.Retrieval("index")': "Retrieval: index: expected an Index, found 'index'",
    'mj.Retrieval(index, compose="blend")': "compose: expected one of selection, mixture, fusion, found 'blend'",
    'mj.Retrieval(index, compose=None)': "Retrieval: compose: expected one of",
    'mj.Retrieval(index, weights=[1])': "Retrieval: weights: expected one of uniform, similarity, found [1]",
    'mj.Retrieval(index, exclude="apple")': "Retrieval: exclude: expected a list of texts, found 'apple'",
    'mj.Retrieval(index, read="first")': "Retrieval: read: expected one of last, all, weighted, found 'first'",
    'mj.GatesWithin(None)': "GatesWithin: index: expected an Index, found None",
    'mj.GatesWithin(index, k=1.5)': "GatesWithin: k: expected a whole number, found 1.5",
    'mj.GatesWithin(index, top_k=0, temperature=-1)': "top_k: expected at least 1, found 0; GatesWithin: temperature",
    # folders
    'mj.load(3)': "base: expected a path, found 3",
    'mj.load(None)': "base: expected a path, found None",
    'mj.load("a\\0b")': "base: expected a path",
    'mj.load("\\ud83d")': "base: expected a path",
    'mj.load("nowhere")': "nowhere/config.json: expected a file, found none",
    'mj.load(base, bank=3)': "bank: expected a path, found 3",
    'mj.load(base, bank, gates=3)': "gates: expected a path, found 3",
    'mj.load(base, gates=gates)': "expected a bank beside them",
    'mj.load(base, dtype=3)': "dtype: expected one of float32, bfloat16, float16, found 3",
    'mj.load(base, dtype="int8")': "dtype: expected one of float32, bfloat16, float16, found 'int8'",
    'mj.load(base, dtype=np.zeros(2))': "dtype: expected one of",
    'mj.load(base, mesh=3)': "mesh: expected one of sharding.make_mesh, or None, found 3",
    'mj.load(3, dtype=4)': "base: expected a path, found 3; dtype: expected one of",
}  # fmt: skip

ACCEPTED = {
    'ask(stop="a")[0].finish_reason in ("length", "end", "stop")': "True",
    'model.generate(np.ones((1, 3), np.int64), max_new_tokens=1)[0].prompt_length': "3",
    'model.generate([jnp.ones(3, int)], max_new_tokens=1)[0].prompt_length': "3",
    'model.generate(([np.int32(1)], "The"), max_new_tokens=np.int64(1))[0].prompt_length': "1",
    'model.generate((p for p in ["The"]), max_new_tokens=1)[0].prompt_length > 0': "True",
    'model.logits(jnp.ones((2, 3), int)).shape': "(2, 3, 320)",
    'model.logits([[jnp.int32(1)], (2, 3)]).shape': "(2, 2, 320)",
    'model.request_text([5, 6]) == model.decode(np.asarray([5, 6]))': "True",
    'mj.Fixed({"a": np.float32(0.5), "b": 1}).weights()["b"]': "1.0",
    'mj.Gates(np.int64(2), 1, ["apple", "birch"]).top_k': "np.int64(2)",
}  # fmt: skip


@pytest.fixture(scope="module")
def said(world):
    """{call: (the exception's type, its message; or "nothing" and what came back)}."""
    calls = [*REFUSED, *ACCEPTED]
    given = json.dumps([*(str(world[kind]) for kind in ("base", "bank", "gates")), calls])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("call", REFUSED)
def test_what_is_refused_is_named_in_a_line(said, call):
    kind, message = said[call]
    assert kind == "InputError", message
    assert REFUSED[call] in message
    assert "\n" not in message


@pytest.mark.parametrize("call", ACCEPTED)
def test_what_means_the_same_is_taken(said, call):
    assert said[call] == ["nothing", ACCEPTED[call]]
