"""The harness' own tasks on a local fixture, by our model and by its transformers model of the same checkpoint."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from extent import parameters
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import CHAT_TEMPLATE, CORPUS

from meteora_jax.config import InputError
from meteora_jax.harness import MeteoraLM, main
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, datasets and torch; nothing of ours warns here

PAIRS = [
    ("The quick brown fox", " jumps over"), ("", "A gate picks two"), ("How many apples? ", "3"), ("Answer:", " yes"),
    ("Answer:", " no"), ("x " * 300, "and a long tail " * 5),
]  # fmt: skip


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def models(world):
    """Name -> (ours, the harness' hf model): the base alone, and with one adapter."""
    hf = dict(pretrained=str(world["hf_folder"]), device="cpu", dtype="float32", batch_size=2)
    folders = {k: str(world[k]) for k in ("base", "bank", "gates")}
    return {
        "none": (MeteoraLM(**folders, router="none", batch_size=4), HFLM(**hf)),
        "apple": (MeteoraLM(**folders, router="apple", batch_size=3), HFLM(**hf, peft=str(world["peft"]["apple"]))),
    }


@pytest.mark.parametrize("router", parameters(["none", "apple"], ["apple"], "an adapter acts on the same base"))
def test_loglikelihoods_are_those_of_transformers(models, router):
    ours, theirs = models[router]
    found, want = (m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (ours, theirs))
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in want], rtol=1e-6, atol=1e-4)
    assert [g for _, g in found] == [g for _, g in want]
    texts = [(t,) for t in (*CORPUS, " ".join(CORPUS * 8))]  # the last is longer than the context
    found, want = (
        m.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for m in (ours, theirs)
    )
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-4)
    assert len(ours.tok_encode(texts[-1][0])) > ours.max_length


def test_greedy_continuations_are_said_to_be_greedy(models):
    ours, _ = models["none"]
    prompt = "The quick brown fox"
    (said,) = ours.model.generate([prompt], None, max_new_tokens=4)
    ids = ours.tok_encode(prompt)
    ((_, greedy), (_, other)) = ours._loglikelihood_tokens(
        [(None, ids, said.token_ids), (None, ids, [*said.token_ids[:-1], (said.token_ids[-1] + 1) % 320])]
    )
    assert greedy
    assert not other


@pytest.mark.parametrize("router", parameters(["none", "apple"], ["apple"], "an adapter acts on the same base"))
def test_generated_texts_are_those_of_transformers(models, router):
    ours, theirs = models[router]
    asked = [(c, {"until": ["e"], "max_gen_toks": 12, "do_sample": False}) for c in (*CORPUS, "long " * 200)]
    asked += [(c, {"until": [], "max_gen_toks": 8}) for c in CORPUS[:2]]
    found, want = (m.generate_until(requests("generate_until", asked), disable_tqdm=True) for m in (ours, theirs))
    assert found == want
    assert any(found)


def test_an_adapter_in_a_slot_gives_the_figures_of_one_that_is_there(models, world):
    ours, _ = models["apple"]
    folders = {k: str(world[k]) for k in ("base", "bank", "gates")}
    slots = MeteoraLM(**folders, router="daisy", batch_size=3, adapter_slots=2)
    slots.router = ours.router  # not among the first two
    assert slots.model.pool.resident() == ("apple", "birch")
    slots.model.logits([[5]], [Fixed({"cedar": 1.0, "daisy": 1.0})])
    found, want = (m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (slots, ours))
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in want], rtol=1e-6, atol=1e-4)
    assert "apple" in slots.model.pool.resident()


def test_gates_choose_for_the_harness_as_for_generate(world):
    model = MeteoraLM(*(str(world[k]) for k in ("base", "bank", "gates")), top_k=1, batch_size=2)
    (text,) = model.generate_until(requests("generate_until", [("Answer:", {"max_gen_toks": 9})]))
    assert text == world["model"].generate(["Answer:"], model.router, max_new_tokens=9)[0].text
    assert model.router == Gates(1, 1.0)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: ["yes", "no", "maybe so"]\nmetric_list: [{metric: acc}, {metric: acc_norm}]',
    "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    "generate_until": "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ['.'], max_gen_toks: 6}",
}


@pytest.fixture
def task_manager(tmp_path, monkeypatch):
    """Three of the harness' kinds of task over one local file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    lines = [f'{{"question": "Is {i} of {3 * i} enough?", "answer": "{("yes", "no")[i % 2]}"}}\n' for i in range(5)]
    data.write_text("".join(lines))
    (tmp_path / "tasks").mkdir()
    for kind, more in KINDS.items():
        text = TASK.format(name=f"tiny_{kind}", data=data, kind=kind, more=more)
        (tmp_path / "tasks" / f"{kind}.yaml").write_text(
            text.replace('"{{question}}"', '""') if "rolling" in kind else text
        )
    return TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)


@pytest.mark.exhaustive("the harness' own loop around what is compared above")
def test_the_harness_own_evaluation_gives_the_same_figures(models, task_manager):
    tasks = [f"tiny_{kind}" for kind in KINDS]
    figures = []
    for model in models["apple"]:
        found: Any = simple_evaluate(model, tasks=tasks, task_manager=task_manager, bootstrap_iters=0)
        figures.append({t: {k: v for k, v in found["results"][t].items() if isinstance(v, float)} for t in tasks})
    ours, theirs = figures
    assert all(ours.values())
    for task in tasks:
        assert ours[task] == pytest.approx(theirs[task], rel=1e-4)


@pytest.mark.exhaustive("a process more around what is compared above")
def test_the_harness_own_command_line_runs_it(world, tmp_path, task_manager, monkeypatch, capsys):
    options = {
        "model": "meteora", "tasks": "tiny_generate_until", "include_path": tmp_path / "tasks", "batch_size": 4,
        "output_path": tmp_path / "results.json",
        "model_args": f"base={world['base']},bank={world['bank']},router=apple",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["harness", "run", *words])
    main()
    assert "exact_match" in capsys.readouterr().out
    assert list(tmp_path.glob("results*.json"))
    monkeypatch.setattr(sys, "argv", ["harness", "run", *words, "--model_args", f"base={tmp_path / 'none'}"])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 1
    assert "none/config.json: expected a file, found none" in capsys.readouterr().err


def test_it_is_registered_and_made_from_an_argument_string(world):
    cls = get_model("meteora")
    assert cls is MeteoraLM
    text = f"base={world['base']},bank={world['bank']},router=birch,max_length=128"
    model = cls.create_from_arg_string(text, {"batch_size": "5", "device": None, "max_batch_size": None})
    assert (model.batch_size, model.max_length, model.router.adapters) == (5, 128, "birch")
    chat = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tok_encode(chat)[:1] == [1]


def test_a_template_that_refuses_a_system_message_gets_none(models, caplog):
    """As the harness' own model does, and with a warning too."""
    ours, theirs = models["none"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.MonkeyPatch.context() as patch:
        for model in (ours, theirs):
            patch.setattr(model.tokenizer, "chat_template", refusal + CHAT_TEMPLATE)
        assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
        assert "no system role: the system message is left out" in caplog.text
        patch.setattr(ours.tokenizer, "chat_template", "{{ raise_exception('nobody may speak') }}")
        for history in (chat, chat[1:]):
            with pytest.raises(InputError, match=r"^[^\n]*chat history: expected messages .*: nobody may speak$"):
                ours.apply_chat_template(history)
    with pytest.raises(InputError, match="text: expected text that UTF-8 can hold"):
        ours.tok_encode("hi \ud83d")


def test_a_bank_that_nothing_chooses_from_is_remarked_on(world, caplog):
    MeteoraLM(base=str(world["base"]), bank=str(world["bank"]), router="none")
    assert "no adapter acts" not in caplog.text
    MeteoraLM(base=str(world["base"]), bank=str(world["bank"]))
    assert "no adapter acts" in caplog.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"router": "elm"}, "uniform or one of apple, birch, cedar, daisy, found 'elm'"),
        ({"router": "gates"}, "router: expected gates beside 'gates', found none"),
        ({"router": "apple", "top_k": 1}, "expected the router gates beside them, found 'apple'"),
        ({"batch_size": "auto"}, "expected a number and nothing else"),
        ({"max_batch_size": 8}, "expected a number and nothing else, found 1, 8"),
    ],
)
def test_refusals(world, more, said):
    with pytest.raises(InputError, match=r"^[^\n]*$") as refused:
        MeteoraLM(base=str(world["base"]), bank=str(world["bank"]), **more)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2}, "no beams, found num_beams"),
        ({"repetition_penalty": 1.1}, "found repetition_penalty"),
        ({"max_gen_toks": 256}, "max_gen_toks: expected less than 256"),
        ({"max_gen_toks": "some"}, "temperature, max_gen_toks: expected numbers, found 0.0, 'some'"),
        ({"temperature": "hot"}, "temperature, max_gen_toks: expected numbers, found 'hot', 256"),
    ],
)
def test_generation_settings_that_mean_nothing_here_are_refused(models, settings, said):
    with pytest.raises(InputError, match=said):
        models["none"][0].generate_until(requests("generate_until", [("a", settings)]))


def test_the_package_imports_neither_torch_nor_the_harness():
    program = "import sys, meteora_jax, meteora_jax.cli; sys.exit({'torch', 'lm_eval'} & {*sys.modules} != set())"
    subprocess.run([sys.executable, "-c", program], check=True)
