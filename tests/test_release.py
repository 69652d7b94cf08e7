"""What a release consists of: versions that agree, archives that install and run, files that hosts and readers expect,
and scripts that install quietly."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from meteora_jax.cli.demo import Demo, assets_folder
from meteora_jax.config import InputError, read_json

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def run_in(cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)


def said_by(*command: object, cwd: Path) -> str:
    done = run_in(cwd, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def yaml_of(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# Versions and files


def test_changelog_citation_and_package_have_one_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    citation = yaml_of("CITATION.cff")
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (VERSION, str(citation["date-released"]))
    assert citation["version"] == VERSION
    newest = text.split("\n## [")[2]
    assert newest.index("### Upgrading from") < newest.index("### Added")


def test_the_citation_has_what_its_format_requires():
    """Keys of the Citation File Format 1.2.0: https://github.com/citation-file-format."""
    citation = yaml_of("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == PROJECT["license"]
    for part in (citation, *citation["references"]):
        assert part["title"].strip()
        assert part["authors"]
        for author in part["authors"]:
            assert set(author) == {"name"} or set(author) == {"given-names", "family-names"}
    assert citation["message"].strip()
    assert all(reference["type"] and reference["identifiers"] for reference in citation["references"])


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml_of(".github/workflows/checks.yml")
    (job,) = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true


def test_issue_forms_ask_for_something():
    for form in ("bug", "wish"):
        asked = yaml_of(f".github/ISSUE_TEMPLATE/{form}.yml")
        assert asked["name"]
        assert asked["description"]
        assert any(field.get("validations", {}).get("required") for field in asked["body"])
        assert len({field["id"] for field in asked["body"]}) == len(asked["body"])


def test_the_model_card_says_what_the_adapters_are():
    folder = ROOT / "scripts" / "demo" / "adapters"
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card, summary = yaml.safe_load(head), read_json(folder / "summary.json")
    settings = [read_json(p) for p in folder.glob("*/adapter_config.json")]
    assert {s["base_model_name_or_path"] for s in settings} == {card["base_model"]}
    assert {(s["r"], s["lora_alpha"], s["lora_dropout"]) for s in settings} == {(8, 16, 0.05)}
    assert "rank 8, alpha 16, dropout 0.05" in text
    assert card["license"] == "apache-2.0"
    rows = {
        n: tuple(map(int, cells)) for n, *cells in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    }
    assert rows == {
        name: (s["train_examples"], round(100 * s["accuracy_before"]), round(100 * s["accuracy_after"]))
        for name, s in summary.items()
    }


# The demo's assets, for whoever has the wheel alone


def write_assets(folder: Path) -> Path:
    for name in ("gates/gates.json", "adapters/one/adapter_config.json", "problems.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_the_demo_takes_its_assets_from_a_folder_a_checkout_or_an_archive(tmp_path):
    demo = write_assets(tmp_path / "meteora_jax-0" / "scripts" / "demo")
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "meteora_jax-0", "meteora_jax-0")
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as packed:
        for file in demo.rglob("*.json"):
            packed.write(file, file.relative_to(tmp_path))
    for given in (demo, tmp_path / "meteora_jax-0"):
        assert assets_folder(Demo(assets=given)) == demo
    for given in ("source.tar.gz", "source.zip", "source.zip"):  # the second time over the first
        found = assets_folder(Demo(tmp_path / "out", tmp_path / given))
        assert sorted(p.relative_to(found).as_posix() for p in found.rglob("*.json")) == [
            "adapters/one/adapter_config.json", "gates/gates.json", "problems.json",
        ]  # fmt: skip


def test_assets_that_are_missing_or_damaged_are_refused_in_a_line(tmp_path):
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "text.txt", "text.txt")
    (tmp_path / "text.txt").rename(tmp_path / "text.zip")
    for given, words in (
        ("nowhere", "--assets names scripts/demo of a checkout"),
        ("cut.tar.gz", "expected a whole .tar.gz or .zip archive"),
        ("text.zip", "expected a whole .tar.gz or .zip archive"),
        ("other.tar.gz", "expected a folder with gates/gates.json"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            assets_folder(Demo(tmp_path / "out", tmp_path / given))
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


# Archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the source archive, and the source archive."""
    pytest.importorskip("build", reason="build is not installed")
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    dist = tmp_path_factory.mktemp("dist")
    said_by(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=dist)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, source


@pytest.mark.exhaustive("builds the archives, half a minute; nothing of the package's code is tested")
def test_the_source_archive_has_whatever_a_checkout_has(archives):
    _, source = archives
    with tarfile.open(source) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    tracked = said_by("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    assert [name for name in tracked if name not in inside] == []
    assert inside >= {"LICENSE", "README.md", "CHANGELOG.md", "docs/index.md", "scripts/demo/gates/gates.json"}
    assert source.name == f"meteora_jax-{VERSION}.tar.gz"
    assert source.stat().st_size < 100 << 20


@pytest.mark.exhaustive("builds the archives, half a minute; nothing of the package's code is tested")
def test_the_wheel_runs_in_an_empty_environment(archives, tmp_path):
    """The dependencies are this environment's, whose installation of the project is not seen: files named *.pth of a
    folder that a *.pth file adds are not read."""
    wheel, source = archives
    venv = tmp_path / "venv"
    said_by(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    said_by(venv / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    python, meteora = venv / "bin" / "python", venv / "bin" / "meteora"
    own = Path(said_by(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    dependencies = {sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))}
    (own / "dependencies.pth").write_text("\n".join(sorted(dependencies)), encoding="utf-8")
    where = "import meteora_jax as m, converters as c, pallas_kernels as p; print(m.__file__, c.__file__, p.__file__)"
    assert said_by(python, "-c", where, cwd=tmp_path).count(str(own)) == 3
    assert said_by(meteora, "--version", cwd=tmp_path) == f"meteora {VERSION}\n"
    assert "generate" in said_by(meteora, "--help", cwd=tmp_path)
    for data in ("routing_page.html", "py.typed", "serving/page/index.html"):
        assert (own / "meteora_jax" / data).exists(), data

    missing = run_in(tmp_path, meteora, "demo")
    assert missing.returncode == 1
    assert "--assets names scripts/demo of a checkout" in missing.stderr
    gguf = ROOT / "runs" / "demo" / "download" / "smollm2-135m-instruct-q4_1.gguf"
    if not gguf.exists():
        pytest.skip(f"{gguf} is not here; scripts/demo.sh fetches it. What comes before it in this test passed")
    said_by(meteora, "demo", "--assets", source, "--gguf", gguf, "--out", "demo", "--max-new-tokens", 8, cwd=tmp_path)
    assert read_json(tmp_path / "demo" / "summary.json")["accuracy"]["gates"] > 0.2


def test_the_archives_are_of_this_licence():
    assert importlib.metadata.metadata("meteora-jax")["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


# Installing


@pytest.mark.parametrize("status", [0, 1])
def test_an_installation_is_a_line_and_pip_s_words_are_in_a_file(tmp_path, status):
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@"\nseq 400\n[ {status} = 0 ] || echo "ERROR: no such package"\nexit {status}\n', "utf-8"
    )
    fake.chmod(0o755)
    begin = f'set -euo pipefail; source "{ROOT}/scripts/environment.sh"; PY={fake}'
    script = f'{begin}; pip_install {tmp_path} torch "a b"; echo ok'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    said, log = done.stderr.splitlines(), (tmp_path / "install.log").read_text(encoding="utf-8")
    assert log.startswith("-m pip install --disable-pip-version-check --progress-bar off a b\n1\n2\n")
    assert done.returncode == status
    assert len(said) == (3 if status else 2)
    if status:
        assert said[1] == "ERROR: no such package"
        assert said[2].endswith(f"{tmp_path}/install.log")
    assert done.stdout == ("" if status else "ok\n")
