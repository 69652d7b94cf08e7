# pyright: strict
"""A user's file: everything public, as pyright's strict mode sees it from outside (./scripts/test.sh checks it).

Nothing here is run. What a call returns is assigned to its declared type, so that a signature that lost its type fails.
"""

from collections.abc import Iterator

import jax
import numpy as np

import meteora_jax as mj


def load() -> mj.Meteora:
    model = mj.load("base", bank="bank", gates="gates", mesh=None, dtype="bfloat16", adapter_slots="auto")
    names: tuple[str, ...] = model.adapter_names
    dtype: str = model.dtype
    print(mj.__version__, names, dtype)
    return model.add_adapter("folder", "name").remove_adapter("name")


def routers(index: mj.Index) -> list[mj.RouterArgument]:
    return [
        None, "gates", mj.Gates(top_k=2, temperature=1.0, within=("a", "b")), mj.Fixed("a"), mj.Fixed({"a": 0.5}),
        mj.Retrieval(index, k=3, compose="mixture"), mj.GatesWithin(index, k=3, top_k=2), mj.Arrow(top_k=2),
        mj.TaskRetrieval(index, {"a": ("a",)}, k=1), mj.Spectr(2, 0.5), mj.Lag(1, k=4), mj.Logo(k=3), mj.Phatgoose(),
        [mj.Fixed("a"), None, "base"],
    ]  # fmt: skip


def generate(model: mj.Meteora) -> None:
    out: list[mj.Completion] = model.generate(["a", [{"role": "user", "content": "b"}], [1, 2]], stop="\n")
    text: str = out[0].text
    ids: list[int] = out[0].token_ids
    trace: mj.RoutingTrace | None = out[0].routing
    if trace is not None:
        shape: tuple[int, ...] = trace.indices.shape
        heaviest: float = float(np.max(trace.weights))
        print(text, ids, shape, heaviest, trace.tokens[0], trace.adapter_names[0])
    pieces: Iterator[mj.Delta | list[mj.Completion]] = model.stream(["a"], mj.Arrow(2))
    for piece in pieces:
        print(piece.text if isinstance(piece, mj.Delta) else piece[0].finish_reason)
    for place, done in model.completions(["a"], max_new_tokens=[4]):
        print(place + 1, done.logprobs)
    logits: jax.Array = model.logits([[1, 2], [3]], router=mj.Fixed("a"))
    more: jax.Array = model.logits(np.ones((1, 4), np.int32))
    seconds: float = mj.warm_up(model, [64], progress=None)
    print(logits.shape, more.dtype, seconds, model.decode(model.encode("a")))


def serve(model: mj.Meteora) -> mj.Completion:
    engine = mj.Engine(model, max_tokens=256)
    pending: mj.Pending = engine.submit("a", sampling=mj.Sampling(0.7, top_p=0.9, seed=1), logprobs=2)
    words: list[str] = list(pending.stream())
    while engine.step():
        pending.cancel()
    print(words)
    return pending.result()


def look_up() -> mj.Index:
    try:
        index = mj.Index.build({"a": ["one"], "b": ["two"]})
        index.save("index")
        names, similarities = mj.Index.load("index").query(["three"], k=1)
        best: str = names[0][0]
        print(best, float(similarities[0, 0]), index.threshold)
    except mj.InputError as e:
        problems: tuple[str, ...] = e.problems
        print(problems)
        raise
    return index


class Always:
    """A router of one's own, as docs/write-router.md has them."""

    needs_gates = False

    def bind(self, routers: object, names: tuple[str, ...]) -> mj.Routing:
        return mj.Routing(np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1, 1), np.float32))


OWN: mj.Router = Always()
