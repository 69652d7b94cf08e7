"""PEFT options in any combination, ends of the model and invocations included: peft's logits or a refusal by name."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extent import examples
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_converters_peft_features import hf_logits, load_hf, logits, pickle_weights
from test_converters_peft_features import pytestmark as features_marks
from test_converters_vocab import PEFT_TIES, write_adapter
from tiny import assert_refused, edit_safetensors, tiny_llama, tiny_peft

import meteora_jax as mj
from converters import export_adapter, import_adapters, import_base
from meteora_jax.config import PROJECTIONS

LAYERS = 3
ENDS = ("embed_tokens", "lm_head")
ROW = [5, 6, 7, 8, 9, 300, 17]  # as test_converters_peft_features sends it
pytestmark = [*features_marks, pytest.mark.filterwarnings(f"ignore:{PEFT_TIES}")]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Path]]:
    """By whether the head is tied: a Hugging Face folder, its base, and a plain adapter that shares the bank."""
    found = {}
    for tied in (False, True):
        folder = tmp_path_factory.mktemp("combinations")
        hf = tiny_llama(folder, attention_bias=True, tie_word_embeddings=tied)[1]
        # a tied head's logits would be seven times those of the other, and so would their rounding
        edit_safetensors(
            hf / "model.safetensors", lambda t, tied=tied: t["model.embed_tokens.weight"].mul_(0.15 if tied else 1)
        )
        import_base(hf, folder / "base")
        found[tied] = {"hf": hf, "base": folder / "base", "plain": tiny_peft(folder, hf, "plain", seed=3, r=5)}
    return found


def refusal(config: dict[str, Any], tied: bool) -> str | None:
    """The setting that a combination is refused for; None where it is not."""
    at_ends = [end for end in ENDS if end in config["target_modules"]]
    tokens = config["trainable_token_indices"]
    rows = [] if tokens is None else ["embed_tokens"] if isinstance(tokens, list) else list(tokens)
    if config["alora_invocation_tokens"] and (at_ends or rows or config["use_dora"]):
        return "alora_invocation_tokens"
    if at_ends and (config["use_dora"] or config["lora_bias"]):
        return "use_dora" if config["use_dora"] else "lora_bias"
    if set(at_ends) & set(rows) or (tied and "embed_tokens" in rows and "lm_head" in at_ends):
        return "trainable_token_indices"
    return None


ids = st.lists(st.sampled_from([0, 5, 7, 9, 300, 319]), min_size=1, max_size=3, unique=True)
by_end = st.dictionaries(st.sampled_from(ENDS), ids, min_size=1)


# without shrinking: every example loads two models, and a failure says enough as it is
@settings(
    deadline=None,
    max_examples=examples(4, 16),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tied=st.booleans(),
    kind=st.sampled_from(["use_dora", "lora_bias", "neither", "neither"]),
    rank=st.integers(1, 6),
    alpha=st.integers(1, 12),
    rslora=st.booleans(),
    targets=st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
    ends=st.just([]) | st.lists(st.sampled_from(ENDS), unique=True),
    layers=st.none() | st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "layers.1.*", ".*up_proj", "lm_head"]), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from(["v_proj", "layers.0.*", ".*down_proj", "embed_tokens"]), st.integers(1, 9)),
    tokens=st.none() | ids | by_end,
    invocation=st.none() | st.none() | st.sampled_from([[7, 8], [9], [300, 17], [8, 7], [5, 6, 7, 8, 9, 300, 17]]),
    fan=st.booleans(),
    pickled=st.booleans(),
)
def test_any_combination_equals_peft_and_returns_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, worlds: dict[bool, dict[str, Path]],
    tied, kind, rank, alpha, rslora, targets, ends, layers, ranks, alphas, tokens, invocation, fan, pickled,
):  # fmt: skip
    folder, world = tmp_path_factory.mktemp("any"), worlds[tied]
    config = {
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": [*targets, *ends],
        # layers_to_transform leaves out what is in no layer
        "layers_to_transform": None if ends else layers,
        "rank_pattern": dict(sorted(ranks.items())), "alpha_pattern": dict(sorted(alphas.items())),
        "fan_in_fan_out": fan, "use_dora": kind == "use_dora", "lora_bias": kind == "lora_bias",
        "trainable_token_indices": tokens, "alora_invocation_tokens": invocation,
    }  # fmt: skip
    refused = refusal(config, tied)
    try:
        theirs, adapter = write_adapter(folder, world["hf"], "a", lora=0.4, **config)
    except (ValueError, NotImplementedError, TypeError):
        assert refused is not None, "peft itself refuses what is supported here"
        return
    if pickled:
        pickle_weights(adapter)
    adapters = {"plain": world["plain"], "a": adapter}
    call = partial(import_adapters, folder / "bank", world["base"], adapters)
    if refused is not None:
        assert_refused(call, folder / "bank", f"{refused}: expected")
        return
    call()
    expected = hf_logits(theirs)
    assert np.abs(logits(world["base"], folder / "bank", mj.Fixed("a")) - expected).max() <= 1e-4
    export_adapter(folder / "bank", "a", folder / "out")
    again = PeftModel.from_pretrained(load_hf(world["hf"]), folder / "out")
    assert np.array_equal(hf_logits(again), expected)
