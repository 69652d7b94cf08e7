"""The real SmolLM2-135M-Instruct, against transformers' reading of the same GGUF file.

scripts/test.sh fetches the file; where it is not (no network), these tests are skipped.
"""

import copy

import compiling
import numpy as np
import pytest
import torch

import converters
import meteora_jax as mj
from meteora_jax.cli.demo import ASSETS, GGUF_NAME
from meteora_jax.config import read_json

GGUF = ASSETS.parents[1] / "runs" / "demo" / "download" / GGUF_NAME
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in 1984,",
    "[INST] Which is heavier, a ton of feathers or a ton of bricks? [/INST]\n",
    "Water boils at",
    "1 2 3 4 5 6",
    "Dear Sir or Madam,",
    "Q: Who wrote Hamlet?\nA:",
    "Ünïcödé text: 漢字",
    "import numpy as np\n",
)
pytestmark = pytest.mark.skipif(not GGUF.exists(), reason=f"{GGUF} is not here; scripts/demo.sh fetches it")


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """This model takes longer to run than to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "FORWARD", frozenset())
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "base"
    converters.import_base(GGUF, folder)
    return folder


@pytest.fixture(scope="module")
def model(base):
    return mj.load(base, dtype="float32")


@pytest.fixture(scope="module")
def hf():
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def expected(model, hf):
    """Our 64 greedy tokens after each prompt, and transformers' logits for prompt and response."""
    done = model.generate(PROMPTS, max_new_tokens=64)
    rows = [model.encode(p) for p in PROMPTS]
    with torch.no_grad():
        logits = [hf(torch.tensor([r + c.token_ids])).logits[0].numpy() for r, c in zip(rows, done, strict=True)]
    return rows, done, logits


def test_logits_equal_transformers(model, hf):
    """Its float64 ones: as far from them as 1e-4, or, where a processor's sums bring transformers' own float32 as far,
    as twice that (seen: 0.6e-4 to 1.3e-4)."""
    rows = [model.encode(p) for p in PROMPTS]
    own, theirs, double = [], [], copy.deepcopy(hf).double()
    for row, mine in zip(rows, np.asarray(model.logits(rows)), strict=True):
        with torch.no_grad():
            exact, rounded = (m(torch.tensor([row])).logits[0].numpy() for m in (double, hf))
        own.append(np.abs(mine[: len(row)] - exact).max())
        theirs.append(np.abs(rounded - exact).max())
    assert max(theirs) <= 2e-4  # or it would not be the same model
    assert max(own) <= max(1e-4, 2 * max(theirs)), (own, theirs)


def test_greedy_text_equals_transformers(model, expected):
    """Every token is transformers' own argmax after all tokens before it: its greedy text, by induction."""
    for row, done, theirs in zip(*expected, strict=True):
        want = theirs[len(row) - 1 :].argmax(-1).tolist()
        assert done.token_ids == want[: len(done.token_ids)]
        ended = done.finish_reason == "end"
        assert ended == (len(done.token_ids) < 64)
        assert not ended or want[len(done.token_ids)] in model.config.eos_token_ids


def test_the_demo_adapters_equal_peft(tmp_path, base, hf):
    from peft import PeftModel

    names = [p.name for p in sorted((ASSETS / "adapters").iterdir()) if p.is_dir()]
    assert len(names) >= 8
    converters.import_adapters(tmp_path / "bank", base, {n: ASSETS / "adapters" / n for n in names})
    model = mj.load(base, tmp_path / "bank", ASSETS / "gates", dtype="float32")
    tests = {t["task"]: t["prompt"] for t in read_json(ASSETS / "problems.json")["tests"]}
    peft = None
    for name in ("winowhy", "object_counting"):
        row = model.encode(tests[name])
        ours = np.asarray(model.logits([row], mj.Fixed(name)))[0]
        if peft is None:
            peft = PeftModel.from_pretrained(hf, ASSETS / "adapters" / name, adapter_name=name)
        else:
            peft.load_adapter(ASSETS / "adapters" / name, name)
        peft.set_adapter(name)
        with torch.no_grad():
            theirs = peft(torch.tensor([row])).logits[0].numpy()
        assert np.abs(ours - theirs).max() <= 2e-4
    (done,) = model.generate([tests["winowhy"]], max_new_tokens=4)
    own = done.routing.indices[done.prompt_length - 8 : done.prompt_length, 15:, :, 0]
    assert (own == names.index("winowhy")).mean() > 0.8
