"""Request-level routing: compositions equal a float64 transcription, and a mixed batch equals its requests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from extent import ALL, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import LlamaForCausalLM
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.routing import NO_ADAPTER, Routing
from meteora_jax.routing.retrieval import Composed
from pallas_kernels.routed_lora import LoraBank, routed_lora

ROWS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 60))]
PROFILES = {
    "apple": ["Translate to German: the house is red", "Translate to German: I am hungry"],
    "birch": ["What a film! Is this positive or negative?", "I fell asleep. Is this positive or negative?"],
    "cedar": ["How many apples are 3 apples and 4 apples?", "How many pears are 2 pears and 9 pears?"],
    "daisy": ["Write a poem about the moon in June", "Write a poem about old socks"],
}
PROMPTS = ["Translate to German: my cat", "Dull. Is this positive?", "Write a poem about how many plums there are"]


@pytest.fixture(scope="module")
def index() -> mj.Index:
    return mj.Index.build(PROFILES)


def composed_float64(x, a, b, scale, chosen, weights, fused):
    """DESIGN.md's three lines for one request. x [T, I], a [A, R, I], b [A, R, O]."""
    if fused:
        mean_a = sum(w * a[i] for i, w in zip(chosen, weights, strict=True))
        mean_b = sum(w * scale[i] * b[i] for i, w in zip(chosen, weights, strict=True))
        return (x @ mean_a.T) @ mean_b
    return sum(w * scale[i] * ((x @ a[i].T) @ b[i]) for i, w in zip(chosen, weights, strict=True))


SIZES = st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(1, 5))  # adapters a request, of a bank; rank
FEW_SIZES = st.sampled_from([(1, 9, 1), (2, 3, 5), (4, 4, 2)])  # each is a program
composed = jax.jit(routed_lora)


@settings(max_examples=examples(12, 40), deadline=None)
@given(SIZES if ALL else FEW_SIZES, st.integers(0, 2**31))
def test_compositions_equal_the_formula(sizes, seed):
    rng, (chosen, adapters, rank) = np.random.default_rng(seed), sizes
    chosen, inner, splits = min(chosen, adapters), 12, (6, 4)
    x = rng.standard_normal((3, 5, inner))
    a, b = rng.standard_normal((2, adapters, rank, inner)), rng.standard_normal((adapters, rank, sum(splits)))
    a[:, 0, rank // 2 :] = b[0, rank // 2 :] = 0  # a smaller rank, padded
    scale = rng.uniform(0.5, 2, (2, adapters))
    scale[1, -1] = 0  # an adapter that does not touch the second projection
    indices = np.stack([rng.permutation(adapters)[:chosen] for _ in range(3)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (3, chosen))
    indices[2], weights[2] = NO_ADAPTER, 0.0  # a request without adapters
    fused = np.asarray([True, False, bool(seed % 2)])

    def f32(z: np.ndarray) -> jax.Array:
        return jnp.asarray(np.asarray(z, np.float32))

    bank, base = LoraBank(f32(a), f32(b), f32(scale), splits), jnp.zeros((3, 5, sum(splits)))
    request = Routing(jnp.asarray(indices[:, None, None]), f32(weights[:, None, None]), fused=jnp.asarray(fused))
    ours = np.asarray(composed(f32(x), bank, request, base))
    columns = np.split(b, [6], axis=2)
    for row in range(2):
        args = (indices[row], weights[row], fused[row])
        want = [composed_float64(x[row], a[p], columns[p], scale[p], *args) for p in range(2)]
        assert np.abs(ours[row] - np.concatenate(want, 1)).max() <= 1e-5 * max(1, *(np.abs(w).max() for w in want))
    assert np.abs(ours[2]).max() == 0
    # the same requests in a batch that holds token-level choices as well: axes T and P are written out

    def wide(z: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(z[:, None, None], (3, 5, 2, chosen)))

    routing = Routing(wide(indices), wide(weights.astype(np.float32)), fused=jnp.asarray(fused))
    assert np.abs(np.asarray(composed(f32(x), bank, routing, base)) - ours).max() <= 1e-4


def test_a_request_s_adapters_cost_the_same_in_any_bank():
    def operations(adapters: int) -> float:
        shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731

        def update(x, a, b, scale, i, w):
            return routed_lora(x, LoraBank(a, b, scale, (48, 16)), Routing(i, w), jnp.zeros((4, 3, 64)))

        arguments = (
            shape(4, 3, 32), shape(2, adapters, 8, 32), shape(adapters, 8, 64), shape(2, adapters),
            shape(4, 1, 1, 3, dtype=jnp.int32), shape(4, 1, 1, 3),
        )  # fmt: skip
        costs = jax.jit(update).lower(*arguments).compile().cost_analysis()
        return costs["flops"]

    assert operations(400) == operations(20)


def torch_composed_logits(world, row, adapters, fused) -> np.ndarray:
    """The whole model in float64 with hooks on transformers' own layers; adapters: ((name, weight), ...)."""
    hf = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()
    model = PeftModel.from_pretrained(hf, world["peft"][NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(world["peft"][name], name)
    matrices = {}  # (layer, projection, adapter) -> A [r, I], scale * B [O, r]
    for key, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer, projection = int(key.split("layers.")[1].split(".")[0]), key.split(".")[-1]
            for name in module.lora_A:
                pair = module.lora_A[name].weight, module.lora_B[name].weight * module.scaling[name]
                matrices[layer, projection, name] = tuple(m.detach().double() for m in pair)
    bare = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()

    def hook(layer, projection):
        def add(module, inputs, output):
            x = inputs[0]
            here = [(matrices[layer, projection, n], w) for n, w in adapters if (layer, projection, n) in matrices]
            if not fused:
                return output + sum((w * (x @ a.T) @ b.T for (a, b), w in here), torch.zeros_like(output))
            rank = max((a.shape[0] for (a, _), _ in here), default=0)
            pad = torch.nn.functional.pad
            mean_a = sum(w * pad(a, (0, 0, 0, rank - a.shape[0])) for (a, _), w in here)
            mean_b = sum(w * pad(b, (0, rank - b.shape[1])) for (_, b), w in here)
            return output + (x @ mean_a.T) @ mean_b.T if here else output

        return add

    for i, layer in enumerate(bare.model.layers):
        for projection in PROJECTIONS:
            block = layer.mlp if projection in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
            getattr(block, projection).register_forward_hook(hook(i, projection))
    with torch.no_grad():
        return bare(torch.tensor([row])).logits[0].numpy()


@pytest.mark.parametrize("compose", ["selection", "mixture", "fusion"])
@pytest.mark.parametrize("weights", ["uniform", "similarity"])
def test_the_model_equals_a_float64_transcription(world, index, compose, weights):
    """Banks of mixed ranks and targets."""
    router = mj.Retrieval(index, k=3, compose=compose, weights=weights, min_similarity=None)
    model = world["model"]
    found = index.query([model.decode(row) for row in ROWS], k=3)
    ours = np.asarray(model.logits(ROWS, router))
    for b, (row, logits) in enumerate(zip(ROWS, ours, strict=True)):
        similarities = found.similarities[b].astype(np.float64)
        shares = np.full(3, 1 / 3)
        if weights == "similarity" and (similarities > 0).any():
            shares = np.maximum(similarities, 0) / np.maximum(similarities, 0).sum()
        adapters = tuple(zip(found.names[b], shares, strict=True))
        adapters = ((found.names[b][0], 1.0),) if compose == "selection" else adapters
        want = torch_composed_logits(world, row, adapters, compose == "fusion")
        assert np.abs(logits[: len(row)] - want).max() <= 2e-4


def test_a_heterogeneous_batch_equals_its_requests(world, index):
    """Own k, own composition, some with gates, one named adapter, some with none."""
    routers = [
        mj.Retrieval(index, k=3, compose="mixture"),
        None,
        mj.Retrieval(index, k=2, compose="fusion"),
        mj.GatesWithin(index, k=3, top_k=2, temperature=4.0),
        mj.Fixed("birch"),
    ]
    if ALL:  # other numbers of adapters, each a program more
        routers += [
            mj.Gates(2),
            mj.Retrieval(index, k=1, compose="selection"),
            mj.Retrieval(index, k=4, compose="fusion", weights="similarity"),
            mj.Retrieval(index, k=2, exclude=("apple",)),
        ]
    prompts = [PROMPTS[i % 3] for i in range(len(routers))]
    model = world["model"]
    together = model.generate(prompts, routers, max_new_tokens=6)
    logits = np.asarray(model.logits([model.encode(p) for p in prompts], routers))
    for b, (prompt, router) in enumerate(zip(prompts, routers, strict=True)):
        (alone,) = model.generate([prompt], router, max_new_tokens=6)
        assert alone.token_ids == together[b].token_ids
        if router is not None:
            assert together[b].routing.retrieved == alone.routing.retrieved
        ids = model.encode(prompt)
        own = np.asarray(model.logits([ids], [router]))[0]
        assert np.abs(logits[b, : len(ids)] - own[: len(ids)]).max() <= 2e-4


def test_the_trace_shows_adapters_and_similarities(world, index):
    done = world["model"].generate(PROMPTS, mj.Retrieval(index, k=2), max_new_tokens=3)
    found = index.query(PROMPTS, k=2)
    assert [c.routing.retrieved[0][0] for c in done] == ["apple", "birch", "daisy"]
    for c, names, similarities in zip(done, *found, strict=True):
        assert c.routing.retrieved == tuple(zip(names, map(float, similarities), strict=True))
        assert (c.routing.indices[0] == [NAMES.index(n) for n in names]).all()
        assert np.allclose(c.routing.weights[0], 0.5)


def test_messages_are_retrieved_by_what_the_user_says(world, index):
    chat = [{"role": "system", "content": PROMPTS[1]}, {"role": "user", "content": PROMPTS[0]}]
    (done,) = world["model"].generate([chat], mj.Retrieval(index, k=1), max_new_tokens=2)
    assert done.routing.retrieved[0][0] == "apple"


def talk(*said: str) -> list[dict[str, str]]:
    """A conversation whose user says these; the assistant answers, and a system prompt stands before."""
    turns = [{"role": "user", "content": text} for text in said]
    between = [m for turn in turns for m in (turn, {"role": "assistant", "content": PROMPTS[1]})][:-1]
    return [{"role": "system", "content": PROMPTS[1]}, *between]


SWITCH = talk(PROMPTS[0], "Thanks", PROMPTS[2], "  ")  # apple's first, daisy's last; the blank one says nothing


@pytest.mark.parametrize("router", [mj.Retrieval, mj.GatesWithin])
def test_the_last_user_message_is_looked_up_of_a_conversation(world, index, router):
    model = world["model"]
    prompts = [talk(PROMPTS[0]), talk(PROMPTS[0], "Thanks"), SWITCH, PROMPTS[0]]
    asked = [PROMPTS[0], "Thanks", PROMPTS[2], PROMPTS[0]]
    found = index.query(asked, k=2)
    done = model.generate(prompts, router(index, k=2, min_similarity=None), max_new_tokens=2)
    for c, names, similarities in zip(done, *found, strict=True):
        assert c.routing.retrieved == tuple(zip(names, map(float, similarities), strict=True))
    assert done[2].routing.retrieved[0][0] == "daisy"
    engine = mj.Engine(model, max_tokens=128, max_rows=2, blocks=64)  # nothing runs
    assert (
        engine.submit(SWITCH, router(index, k=2, min_similarity=None), max_new_tokens=2)._retrieved
        == done[2].routing.retrieved
    )


def test_all_and_weighted_readings_of_a_conversation(world, index):
    """One batch of all three; weighted by hand: the last message's similarities, 1/2 and 1/4 of those before."""
    model = world["model"]
    routers = [mj.Retrieval(index, k=4, min_similarity=None, read=read) for read in ("last", "all", "weighted")]
    _, (last, joined, weighted) = model.look_up(routers, 3, lambda: [model.request_texts(SWITCH)] * 3)
    said = [PROMPTS[0], "Thanks", PROMPTS[2]]
    assert [dict(last)[n] for n in NAMES] == index.scores(said[2:])[0].tolist()
    assert [dict(joined)[n] for n in NAMES] == index.scores(["\n".join(said)])[0].tolist()
    want = np.asarray([1, 2, 4]) / 4 @ index.scores(said).astype(np.float64)
    assert np.allclose([dict(weighted)[n] for n in NAMES], want, atol=1e-6)
    assert len({last, joined, weighted}) == 3
    # text is looked up as it is, whatever is read of conversations
    _, texts = model.look_up(routers, 3, lambda: [model.request_texts(PROMPTS[0])] * 3)
    assert texts[0] == texts[1] == texts[2]


def test_a_conversation_in_which_the_user_says_nothing_is_refused(world, index):
    with pytest.raises(InputError, match="expected a text, found ''"):
        world["model"].generate([SWITCH[:1]], mj.Retrieval(index), max_new_tokens=2)


def test_excluded_adapters_never_act(world, index):
    routers = [mj.Retrieval(index, k=2, exclude=("apple",)), mj.GatesWithin(index, k=2, exclude=("apple",))]
    for c in world["model"].generate([PROMPTS[0]] * 2, routers, max_new_tokens=3):
        assert "apple" not in [n for n, _ in c.routing.retrieved]
        assert NAMES.index("apple") not in c.routing.indices


def test_prompts_of_one_batch_may_have_different_numbers_of_adapters_left(world, index):
    few = mj.Retrieval(index, k=3, exclude=("apple", "birch"), min_similarity=None)
    _, found = world["model"].look_up([few, mj.Retrieval(index, k=3)], 2, lambda: PROMPTS[:2])
    assert [len(own) for own in found] == [2, 3]


def test_gates_choose_only_within_what_was_retrieved(world, index):
    model = world["model"]
    (done,) = model.generate([PROMPTS[0]], mj.GatesWithin(index, k=3, top_k=2), max_new_tokens=4)
    allowed = {NAMES.index(n) for n, _ in done.routing.retrieved}
    fed = done.routing.indices[: done.routing.prompt_length]
    assert len(allowed) == 3
    assert set(np.unique(fed)) <= allowed
    # as if the bank held nothing else: the excluded gate columns at minus infinity
    everything = tuple(NAMES)
    free, all_within = (np.asarray(model.logits(ROWS, mj.Gates(2, 1.0, w))) for w in (None, everything))
    assert np.abs(free - all_within).max() <= 1e-6
    narrowed = np.asarray(model.logits(ROWS, mj.Gates(1, 1.0, within=("cedar",))))
    assert np.abs(narrowed - np.asarray(model.logits(ROWS, mj.Fixed("cedar")))).max() <= 1e-4


def test_weights_by_similarity(index):
    found = (("apple", 0.6), ("birch", 0.3), ("cedar", -0.1))
    assert mj.Retrieval(index, weights="similarity").router(found).adapters == (
        ("apple", pytest.approx(2 / 3)), ("birch", pytest.approx(1 / 3)), ("cedar", 0.0),
    )  # fmt: skip
    below = tuple((name, -1.0) for name, _ in found)
    router = mj.Retrieval(index, weights="similarity", min_similarity=None)
    assert [w for _, w in router.router(below).adapters] == [pytest.approx(1 / 3)] * 3
    assert mj.Retrieval(index, compose="selection").router(found) == Composed((("apple", 1.0),), False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda i: mj.Retrieval(i, compose="blend"), "found 'blend'"),
        (lambda i: mj.Retrieval(i, weights="random"), "found 'random'"),
        (lambda i: mj.Retrieval(i, k=0), "k: expected at least 1"),
        (lambda i: mj.GatesWithin(i, k=1, top_k=2), "k: expected at least 2"),
        (lambda i: mj.Retrieval(i, k=4, exclude=tuple(PROFILES)), "expected an adapter that text 0 may have"),
        (lambda i: [mj.Retrieval(i)], "found 1"),
        (lambda i: mj.Gates(1, 1.0, ("elm",)), "found 'elm'"),
        (lambda i: mj.Gates(2, 1.0, ("apple",)), "within: expected at least 2"),
        (lambda i: mj.Retrieval(mj.Index.build({"elm": ["Any text"]}), k=1), "adapters of the bank, found 'elm'"),
    ],
)
def test_bad_retrievals_are_refused(world, index, make, said):
    with pytest.raises(InputError, match="expected") as refusal:
        world["model"].logits(ROWS, make(index))
    assert said in str(refusal.value)


def test_retrieval_needs_a_bank(world, index):
    with pytest.raises(InputError, match="expected a bank"):
        mj.load(world["base"], dtype="float32").logits(ROWS, mj.Retrieval(index))
    without = dataclasses.replace(world["model"], gates=None)
    with pytest.raises(InputError, match="expected trained gates"):
        without.logits(ROWS, mj.GatesWithin(index))
