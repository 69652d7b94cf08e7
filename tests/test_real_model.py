"""The real SmolLM2-135M-Instruct, against transformers' and peft's float64 results (`fixtures/golden`, by golden.py).

A sample of these is computed live as well, with --all every one, from transformers' own reading of the GGUF file.
scripts/test.sh fetches the file; where it is not (no network), these tests are skipped.
"""

import copy
import hashlib

import compiling
import golden
import numpy as np
import pytest
import torch
from extent import ALL
from safetensors import safe_open

import converters
import meteora_jax as mj
from meteora_jax.cli.demo import ASSETS

NEW = golden.NEW if ALL else 24  # one of the prompts ends after 17
pytestmark = pytest.mark.skipif(
    not golden.GGUF.exists(), reason=f"{golden.GGUF} is not here; scripts/demo.sh fetches it"
)


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """This model takes longer to run than to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "FORWARD", frozenset())
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "base"
    converters.import_base(golden.GGUF, folder)
    return folder


@pytest.fixture(scope="module")
def model(base):
    return mj.load(base, dtype="float32")


@pytest.fixture(scope="module")
def known(base):
    """The golden file, and its float64 logits of each prompt, {number or adapter: [T, V]}."""
    content, hidden = golden.read()
    with safe_open(base / "weights.safetensors", "numpy") as weights:
        head = weights.get_tensor("embed.embedding")
    assert hashlib.sha256(head.tobytes()).hexdigest() == content["embedding_sha256"]
    return content, {key: golden.logits_of(states, head) for key, states in hidden.items()}


@pytest.fixture(scope="module")
def hf(base, tmp_path_factory):
    """transformers' float32 model: of our export, or, with --all, of its own reading of the file (half a minute)."""
    from transformers import AutoModelForCausalLM

    if ALL:
        return golden.from_gguf()
    folder = tmp_path_factory.mktemp("real") / "hf"
    converters.export_base(base, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def numbers_of_live(content) -> list[int]:
    """Every prompt with --all, or the one whose float32 logits were farthest from its float64 ones."""
    errors = [p["error_of_float32"] for p in content["prompts"]]
    return list(range(len(errors))) if ALL else [int(np.argmax(errors))]


def test_the_golden_file_is_what_the_packages_compute(hf, known):
    content, logits = known
    double = copy.deepcopy(hf).double()
    for i in numbers_of_live(content):
        row, new = content["prompts"][i]["token_ids"], content["prompts"][i]["greedy"]
        _, theirs = golden.hidden_and_logits(double, row + new)
        assert np.abs(theirs[: len(row)] - logits[str(i)]).max() <= 1e-5
        assert theirs[len(row) - 1 : -1].argmax(-1).tolist() == new
    for name in golden.ADAPTERS if ALL else ("object_counting",):
        _, theirs = golden.hidden_and_logits(golden.with_adapter(double, name), content["adapters"][name]["token_ids"])
        assert np.abs(theirs - logits[name]).max() <= 1e-5


def test_logits_equal_transformers(model, hf, known):
    """Its float64 ones: as far from them as 1e-4, or, where a processor's sums bring transformers' own float32 as far,
    as twice that (seen: 0.6e-4 to 1.3e-4)."""
    content, logits = known
    rows = [model.encode(p) for p in golden.PROMPTS]
    assert rows == [p["token_ids"] for p in content["prompts"]]
    ours = zip(rows, np.asarray(model.logits(rows)), strict=True)
    own = [np.abs(mine[: len(row)] - logits[str(i)]).max() for i, (row, mine) in enumerate(ours)]
    live = numbers_of_live(content)
    theirs = [np.abs(golden.hidden_and_logits(hf, rows[i])[1] - logits[str(i)]).max() for i in live]
    assert max(theirs) <= 2e-4  # or it would not be the same model
    assert max(own) <= max(1e-4, 2 * max(theirs)), (own, theirs)


def test_greedy_text_equals_transformers(model, known):
    for done, prompt in zip(model.generate(golden.PROMPTS, max_new_tokens=NEW), known[0]["prompts"], strict=True):
        want, length = prompt["greedy"], len(done.token_ids)
        assert done.token_ids == want[:length]
        ended = done.finish_reason == "end"
        assert ended == (length < NEW)
        assert not ended or want[length] in model.config.eos_token_ids


def test_the_demo_adapters_equal_peft(tmp_path, base, known):
    content, logits = known
    names = [p.name for p in sorted((ASSETS / "adapters").iterdir()) if p.is_dir()]
    assert len(names) >= 8
    converters.import_adapters(tmp_path / "bank", base, {n: ASSETS / "adapters" / n for n in names})
    model = mj.load(base, tmp_path / "bank", ASSETS / "gates", dtype="float32")
    for name, prompt in content["adapters"].items():
        assert model.encode(prompt["text"]) == prompt["token_ids"]
        ours = np.asarray(model.logits([prompt["token_ids"]], mj.Fixed(name)))[0]
        assert np.abs(ours - logits[name]).max() <= 2e-4
    (done,) = model.generate([content["adapters"]["winowhy"]["text"]], max_new_tokens=4)
    own = done.routing.indices[done.prompt_length - 8 : done.prompt_length, 15:, :, 0]
    assert (own == names.index("winowhy")).mean() > 0.8
