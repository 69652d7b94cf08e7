"""Gate training: its loss and gradients equal a float64 transcription, and it learns what it is shown."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flat_settings import flat
from flax import nnx
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io import hf_config
from meteora_jax.io.bank import load_bank
from meteora_jax.io.gates import load_gates, save_gates
from meteora_jax.routing.gates import GateParam
from meteora_jax.training import trainer
from meteora_jax.training.adapter import fresh_adapter, train_adapter
from meteora_jax.training.data import collate
from meteora_jax.training.gate_loss import GateLoss
from meteora_jax.training.gates import train_gates
from meteora_jax.training.sequences import NO_TASK, encode
from meteora_jax.training.settings import AdapterTraining, Checkpointing, GateTraining, Objective
from meteora_jax.training.step import make_step
from meteora_jax.training.watch import flops_per_pair, flops_per_token

WORDS = ("How many apples?", "Which sentence follows", "The lazy dog", "漢字 bytes")
TASKS = {
    name: [Example(f"[INST] {word} number {i} [/INST]\n", f"{word} {i}") for i in range(20)]
    for name, word in zip(
        NAMES, ("How many apples?", "Which sentence follows", "The lazy dog", "漢字 bytes"), strict=True
    )
}


def some_batch(tokenizer):
    parts = [encode(TASKS[n][i], i, tokenizer, 2, prompt_loss=i % 2 == 0) for i, n in enumerate(NAMES)]
    return jax.tree.map(jnp.asarray, collate(parts))


def losses_of(llama, batch, router, beta, remat=False, shared_prefix=0):
    return GateLoss(Objective(beta=beta)).over(llama, batch, shared_prefix)(llama, batch, router, remat)


def compiled_losses(model, batch, router, beta, shared_prefix=0):
    """One program: by themselves the operations are hundreds."""
    run = jax.jit(lambda w, b, r: losses_of(nnx.merge(model.graph, w), b, r, beta, shared_prefix=shared_prefix))
    return run(model.weights, batch, router)


def bound(model, top_k=2):
    return model.bind([mj.Gates(top_k)] * 4, 4)


def all_logits(routings):
    """The gates' logits of a layer, [B, T, P, A]."""
    return jnp.concatenate([r.logits for r in routings], axis=2)


def test_loss_equals_its_definition(world):
    """LM term: mean negative log-probability of the predicted tokens. Gate term: the same of the gates' logits.

    What is recomputed for gradients is in test_training_mesh.
    """
    model = world["model"]
    batch = some_batch(model.tokenizer)
    losses = compiled_losses(model, batch, bound(model), 50.0)
    lm, count, gate, hits, judged = 0.0, 0, 0.0, 0, 0
    for row in range(4):
        n = int((np.asarray(batch.positions[row]) >= 0).sum())
        tokens = np.asarray(batch.tokens[row, :n]).tolist()
        logits = np.asarray(model.logits([tokens], mj.Gates(2)), np.float64)[0]
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        for t in range(1, n):
            if batch.loss[row, t]:
                lm, count = lm - logp[t - 1, tokens[t]], count + 1
    assert np.isclose(float(losses.lm), lm / count, atol=1e-5)

    @jax.jit
    def observed(weights, batch, router):
        llama = nnx.merge(model.graph, weights)
        return llama(batch.tokens, batch.positions, router, observe=all_logits).observed

    g = np.asarray(observed(model.weights, batch, bound(model)), np.float64)  # [L, B, T, P, A]
    for row in range(4):
        n = int((np.asarray(batch.positions[row]) >= 0).sum())
        x = g[:, row, :n]
        logp = x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        gate -= logp[..., row].sum()
        hits += (x.argmax(-1) == row).sum()
        judged += x[..., 0].size
    assert np.isclose(float(losses.gate), gate / judged, atol=1e-5)
    assert np.isclose(float(jnp.mean(losses.gate_accuracy)), hits / judged, atol=1e-6)
    assert np.isclose(float(losses.loss), float(losses.lm) + 50 * float(losses.gate), rtol=1e-6)


@pytest.mark.exhaustive("test_training_mesh compares with torch's gradients")
def test_gradients_equal_finite_differences(world):
    """With every adapter chosen, so that the loss is smooth."""
    model = world["model"]
    batch = some_batch(model.tokenizer)
    graph, gates, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)

    def loss(gates):
        return losses_of(nnx.merge(graph, gates, frozen), batch, bound(model, 4), 1.0, remat=True).loss

    grads = jax.jit(jax.grad(loss))(gates)
    leaves, tree = jax.tree.flatten(gates)
    key = jax.random.key(0)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        key, sub = jax.random.split(key)
        direction = jax.random.normal(sub, grad.shape) / np.sqrt(grad.size)

        def at(step: float, leaf: int, direction: jax.Array) -> float:
            return float(loss(tree.unflatten([x + step * direction if j == leaf else x for j, x in enumerate(leaves)])))

        difference = (at(5e-3, i, direction) - at(-5e-3, i, direction)) / 1e-2
        assert np.isclose(float(jnp.sum(grad * direction)), difference, rtol=0.05, atol=2e-3)


@pytest.mark.exhaustive("test_training_data packs, which pads too, and compares with padding")
def test_padding_changes_no_loss(world):
    model = world["model"]
    tokenizer = model.tokenizer
    short = encode(TASKS["apple"][0], 0, tokenizer, 2, prompt_loss=True)
    long = encode(Example("[INST] " + "The quick brown fox " * 12, "yes"), 1, tokenizer, 2, prompt_loss=True)
    llama = nnx.merge(model.graph, model.weights)

    def terms(sequences):
        batch = jax.tree.map(jnp.asarray, collate(sequences))
        router = model.bind([mj.Gates(2)] * len(sequences), len(sequences))
        return losses_of(llama, batch, router, 1.0)

    alone, other, both = terms([short]), terms([long]), terms([short, long])
    predicted = [int(s.loss.sum()) for s in (short, long)]
    assert np.isclose(float(both.lm), np.average([alone.lm, other.lm], weights=predicted), atol=1e-5)
    judged = [len(short.tokens), len(long.tokens)]
    assert np.isclose(float(both.gate), np.average([alone.gate, other.gate], weights=judged), atol=1e-5)


def test_training_routes_each_task_to_its_adapter(tmp_path, world):
    settings = flat(GateTraining, steps=60, batch_size=8, learning_rate=5e-2, composite=0.25, max_length=200)
    final = train_gates(
        world["base"],
        world["bank"],
        TASKS,
        tmp_path / "gates",
        settings,
        dtype="float32",
        checkpointing=Checkpointing(log=tmp_path / "log.jsonl"),
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    assert final["gate"] < 0.7 * lines[0]["gate"]
    model = mj.load(world["base"], world["bank"], tmp_path / "gates", dtype="float32")
    for i, name in enumerate(NAMES):
        (done,) = model.generate([TASKS[name][15].prompt], mj.Gates(1), max_new_tokens=2)
        chosen = done.routing.indices[4 : done.prompt_length]
        assert (chosen == i).mean() > 0.45, name  # one of four by chance
    config, _ = load_gates(tmp_path / "gates", model.config, NAMES)
    assert (config.top_k, final["step"]) == (2, 60)


@pytest.mark.exhaustive("test_training_resume compares two runs, one of them killed, bit for bit")
def test_seeds_decide_everything(tmp_path, world):
    settings = flat(GateTraining, steps=6, batch_size=8, learning_rate=5e-2, composite=0.25, max_length=200)
    for name in ("first", "again"):
        train_gates(world["base"], world["bank"], TASKS, tmp_path / name, settings, dtype="float32")
    first, again = (load_gates(tmp_path / name, world["model"].config, NAMES)[1] for name in ("first", "again"))
    assert all(np.array_equal(first[p], again[p]) for p in first)


def test_accuracy_leaves_out_the_tokens_that_all_tasks_begin_with(world):
    """What it is for the tokens behind them alone; the loss is that of all."""
    model = world["model"]
    batch = some_batch(model.tokenizer)

    def loss(b, shared):
        return compiled_losses(model, b, bound(model), 50.0, shared)

    whole, found = loss(batch, 0), loss(batch, 5)
    behind = loss(dataclasses.replace(batch, tasks=jnp.where(batch.positions < 5, NO_TASK, batch.tasks)), 0)
    for key in ("gate_accuracy", "hits", "judged"):
        assert np.allclose(getattr(found, key), getattr(behind, key), atol=1e-6)
        assert not np.allclose(getattr(found, key), getattr(whole, key), atol=1e-4)
    for key in ("loss", "gate", "entropy", "load"):
        assert np.array_equal(getattr(found, key), getattr(whole, key))


def test_one_adapter_learns_and_becomes_a_bank(tmp_path, world):
    settings = flat(
        AdapterTraining,
        name="elder",
        rank=4,
        steps=60,
        batch_size=8,
        learning_rate=3e-2,
        prompt_loss=False,
        targets=("q_proj", "up_proj"),
    )
    tasks = {n: TASKS[n] for n in NAMES[:2]}
    final = train_adapter(
        world["base"],
        tasks,
        tmp_path / "bank",
        settings,
        dtype="float32",
        checkpointing=Checkpointing(log=tmp_path / "log.jsonl"),
    )
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert final["lm"] < 0.5 * first["lm"]
    model = mj.load(world["base"], tmp_path / "bank", dtype="float32")
    assert model.adapter_names == ("elder",)
    ids = model.encode(TASKS["apple"][3].prompt)
    bare, tuned = model.logits([ids], None), model.logits([ids], mj.Fixed("elder"))
    assert np.abs(np.asarray(bare - tuned)).max() > 0.1
    assert model.bank.adapters[0].targets == ("q_proj", "up_proj")
    assert len(model.bank.adapters[0].sha256) == 64


@pytest.mark.parametrize("what", ["loss", "parameters"])
@pytest.mark.parametrize("at", [2, 4])
def test_what_is_no_number_is_not_saved(tmp_path, world, monkeypatch, what, at):
    """Parameters may become so in the very step that is saved, whose loss is that of those before."""

    def breaking(*given: Any, **options: Any) -> Any:
        step, done = make_step(*given, **options), [0]

        def broken(*arguments: Any) -> Any:
            state, losses = step(*arguments)
            done[0] += 1
            if done[0] == at and what == "loss":
                losses = dataclasses.replace(losses, loss=losses.loss * np.nan)
            elif done[0] == at:
                state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
            return state, losses

        return broken

    monkeypatch.setattr(trainer, "make_step", breaking)
    settings = flat(AdapterTraining, name="elder", rank=2, steps=4, batch_size=2, learning_rate=1e-3)
    run = Checkpointing(run=tmp_path / "run", save_every=2)
    with pytest.raises(InputError, match=rf"step {at}: expected (a finite loss|finite parameters), found"):
        train_adapter(world["base"], TASKS, tmp_path / "bank", settings, dtype="float32", checkpointing=run)
    assert not (tmp_path / "bank").exists()
    saved = [] if at == 2 else ["2"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()] == saved


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_is_one_line(tmp_path, world):
    settings = flat(AdapterTraining, name="elder", rank=2, steps=2, batch_size=2, learning_rate=1e-3)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = Checkpointing(log=tmp_path / "log.jsonl")
    with pytest.raises(InputError, match=rf"{tmp_path}/log\.jsonl: cannot be written \(No space left on device\)"):
        train_adapter(world["base"], TASKS, tmp_path / "bank", settings, dtype="float32", checkpointing=log)


@pytest.mark.exhaustive("two trainings")
def test_a_bank_grows_and_its_old_gates_keep_every_bit(tmp_path, world):
    config = world["model"].config
    old = {p: np.ascontiguousarray(0.05 * g[..., [2, 0]]) for p, g in world["gate_arrays"].items()}
    save_gates(tmp_path / "old", GateConfig(("cedar", "apple"), 2, 1.0), old)
    settings = flat(GateTraining, steps=40, batch_size=8, learning_rate=3e-2, max_length=100, beta=5.0)
    final = train_gates(
        world["base"], world["bank"], TASKS, tmp_path / "new", settings, dtype="float32", extend=tmp_path / "old",
        checkpointing=Checkpointing(log=tmp_path / "log.jsonl"),
    )  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert final["gate"] < 0.9 * first["gate"]
    _, grown = load_gates(tmp_path / "new", config, NAMES)
    for p, gate in grown.items():
        assert np.array_equal(gate[..., [2, 0]], old[p])
        assert np.all(np.abs(gate[..., [1, 3]]).max(axis=(0, 1)) > 1e-3)
    with pytest.raises(InputError, match="expected a part of the bank's adapters, found all"):
        train_gates(
            world["base"], world["bank"], TASKS, tmp_path / "x", settings, dtype="float32", extend=world["gates"]
        )
    save_gates(tmp_path / "other", GateConfig(("zinnia",), 1, 1.0), {p: g[..., :1] for p, g in old.items()})
    with pytest.raises(InputError, match="expected adapters of the bank, found zinnia"):
        train_gates(
            world["base"], world["bank"], TASKS, tmp_path / "x", settings, dtype="float32", extend=tmp_path / "other"
        )


def test_adapters_can_be_trained_beside_the_gates(tmp_path, world):
    settings = flat(GateTraining, steps=5, batch_size=8, learning_rate=1e-2, max_length=100)
    train_gates(
        world["base"], world["bank"], TASKS, tmp_path / "gates", settings, dtype="float32", new_bank=tmp_path / "bank"
    )
    old, new = (load_bank(b, world["model"].config, np.float32) for b in (world["bank"], tmp_path / "bank"))
    assert new.names == old.names
    for p in old.a:
        targeted = old.scale[p] != 0
        changed = np.any(old.b[p] != new.b[p], axis=(2, 3))
        assert np.array_equal(changed, targeted)  # an adapter gains no projection
        assert np.array_equal(old.scale[p], new.scale[p])
    padding = NAMES.index("birch")  # rank 2 among 8s
    assert not new.a["q_proj"][:, padding, 2:].any()
    mj.load(world["base"], tmp_path / "bank", tmp_path / "gates", dtype="float32")


@pytest.mark.exhaustive("a training more")
def test_adapters_may_have_a_learning_rate_of_their_own(tmp_path, world):
    moved = {}
    for rate in (None, 1e-3):
        out = tmp_path / str(rate)
        settings = flat(GateTraining, steps=1, batch_size=8, learning_rate=1e-2, warmup=0.0,
                        adapter_learning_rate=rate, max_length=100)  # fmt: skip
        train_gates(
            world["base"], world["bank"], TASKS, out / "gates", settings, dtype="float32", new_bank=out / "bank"
        )
        old, new = (load_bank(b, world["model"].config, np.float32) for b in (world["bank"], out / "bank"))
        _, gates = load_gates(out / "gates", world["model"].config, NAMES)
        moved[rate] = (np.abs(new.b["q_proj"] - old.b["q_proj"]).max(), np.abs(gates["q_proj"]).max())
    assert moved[1e-3][0] == pytest.approx(0.1 * moved[None][0], rel=0.01)
    assert moved[1e-3][1] == moved[None][1]
    frozen = flat(GateTraining, steps=1, batch_size=8, adapter_learning_rate=1e-3)
    with pytest.raises(InputError, match="expected a new_bank beside it"):
        train_gates(world["base"], world["bank"], TASKS, tmp_path / "x", frozen, dtype="float32")


@pytest.mark.exhaustive("two trainings")
def test_bfloat16_trains_float32_gates_to_about_the_same_loss(tmp_path, world):
    settings = flat(GateTraining, steps=4, batch_size=8, max_length=100, beta=1.0)
    finals = {
        dtype: train_gates(world["base"], world["bank"], TASKS, tmp_path / dtype, settings, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    assert finals["bfloat16"]["lm"] == pytest.approx(finals["float32"]["lm"], abs=0.05)
    assert finals["bfloat16"]["gate"] == pytest.approx(finals["float32"]["gate"], abs=0.02)
    _, gates = load_gates(tmp_path / "bfloat16", world["model"].config, NAMES)
    assert any(np.any(g != g.astype(jnp.bfloat16)) for g in gates.values())


def test_flops_of_a_token_are_counted_by_hand():
    """Llama-3-8B's shape: 4 FLOPs a frozen weight, 6 a trained one."""
    shape = dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    config = hf_config.from_hf(shape)
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336
    base = 4 * (32 * layer + 4096 * 128256)
    assert flops_per_token(config, None, chosen=2, gates=None, train_adapters=False) == base
    assert flops_per_pair(config) == 32 * 3 * (2 * 4096 + 2 * 4096)  # q k and p v, forward once and backward twice
    bank = fresh_adapter(config, "a", 8, 16.0, ("q_proj",), 0).config
    inputs = 4096 * 5 + 4096 + 14336
    with_gates = flops_per_token(config, bank, chosen=1, gates="meteora", train_adapters=False)
    adapters = 32 * 8 * (3 * 4096 + 4096 + 2 * 1024)  # the whole group pays for q_proj's rank
    assert with_gates == base + 4 * adapters + 6 * 32 * inputs
    common: Any = dict(chosen=1, train_adapters=False)
    form = TokenRouterForm(width=128, depth=4)
    # the three tokens before; a hop: task, previous task, both back, what was read, 16 segments and back; the second
    ends = 3 * 128 + 2 * (1 + 2 + 2 + 1 + 1 + 2 * 16) + 1 + 4 * 128
    own = 6 * 128 * (4096 + ends + 4 * (3 * 4096 + 10 * 128))
    assert flops_per_token(config, bank, gates=form, **common) == base + 4 * adapters + own
    assert flops_per_token(config, bank, gates=form, lm=False, **common) == own


def test_training_refuses_missing_tasks(tmp_path, world):
    settings = flat(GateTraining, steps=1, batch_size=2)
    few = {n: TASKS[n] for n in NAMES[:2]}
    with pytest.raises(InputError, match="found none for cedar, daisy"):
        train_gates(world["base"], world["bank"], few, tmp_path / "gates", settings, dtype="float32")
    assert not (tmp_path / "gates").exists()
