"""README and docs: every block of code runs or says why not, the command line's page is current, the site builds
without a warning and asks nothing of other hosts."""

import doctest
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import GENERATED, LANGUAGES, PAGES, ROOT, blocks_of, check_block, make_folders, run_block
from extent import ALL

import meteora_jax as mj

DOCS = ROOT / "docs"
RUN = [page for page in PAGES if any(block.not_run is None for block in blocks_of(page))]
LEFT_OUT = [page for page in PAGES if any(block.not_run is not None for block in blocks_of(page))]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "folders"
    make_folders(folder)
    return folder


@pytest.mark.parametrize("page", RUN, ids=[page.stem for page in RUN])
def test_code_runs_as_it_stands(page, folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    names = {}
    for block in blocks_of(page):
        if block.not_run is None:
            run_block(block, tmp_path / "here", names)


@pytest.mark.parametrize("page", LEFT_OUT, ids=[page.stem for page in LEFT_OUT])
def test_what_is_not_run_would_be_taken(page, folders, monkeypatch):
    monkeypatch.chdir(folders)
    for block in blocks_of(page):
        if block.not_run is not None:
            check_block(block)


def test_pages_are_short_lines_without_code_that_no_test_sees():
    for page in PAGES:
        fenced, lines = False, page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            where = f"{page.name}:{number}"
            if line.startswith("```"):
                assert fenced or line[3:] in LANGUAGES, f"{where}: a block whose language is unknown"
                fenced = not fenced
            assert fenced or not re.match(r"\s+(meteora|python|pip|\$) ", line), f"{where}: an indented command"
            before = lines[number - 2] if number > 1 else ""
            joined = re.match(r"(- |\d+\. )", line) and before and not re.match(r"(- |\d+\. |\s)", before)
            assert fenced or not joined, f"{where}: a list needs an empty line above it"
            assert line.startswith("|") or len(line) <= 160, f"{where}: {len(line)} characters"
        assert not fenced, f"{page.name}: a block without an end"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_a_block_is_run_unless_it_says_why_not(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```bash\nmeteora inspect x\n```\n<!-- not run: a GPU -->\n```python\n1\n```\n", encoding="utf-8"
    )
    first, second = blocks_of(page)
    assert (first.not_run, second.not_run, second.where) == (None, "a GPU", "page.md:5")
    for mark, said in (("not run: ", "a reason"), ("skip", "unknown mark")):
        page.write_text(f"<!-- {mark} -->\n```bash\nls\n```\n", encoding="utf-8")
        with pytest.raises(AssertionError, match=said):
            blocks_of(page)
    page.write_text("<!-- not run: x -->\n```bash\nmeteora inspect --no-such-option x\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="meteora does not take"):
        check_block(*blocks_of(page))
    page.write_text("```bash\nls scripts/no_such_file.py\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="is no file"):
        check_block(*blocks_of(page))


def test_the_readme_links_to_what_there_is():
    """The site's own links are checked by its build."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)", text)
    assert len(links) > 8
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_the_command_line_s_page_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    cli_reference = __import__("cli_reference")
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert cli_reference.page() == page, "run python scripts/cli_reference.py"
    for words in cli_reference.commands():
        assert f"\n## meteora {' '.join(words)}\n\n```text\nusage: meteora {' '.join(words)} " in page


def test_every_public_name_has_its_entry():
    entries = re.findall(r"^::: meteora_jax\.(\w+)$", (DOCS / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(entries) == sorted(set(mj.__all__) - {"__version__"})


TYPES = {
    "Completion",
    "Delta",
    "InputError",
    "Pending",
    "Router",
    "RouterArgument",
    "Routing",
    "RoutingTrace",
    "Meteora",
}


def test_help_of_every_public_name_has_an_example_that_runs(folders, tmp_path, monkeypatch):
    """In the order of the reference, with the names of those before: `model`, `engine`, `index`. By default prompts and
    routers are checked, looked up and bound; no step of `generate` is compiled, as other tests have each router."""

    def checked(model, prompts, router="gates if loaded", max_new_tokens=64, **how):
        requests, _ = model._requests(prompts, router, max_new_tokens, mj.Sampling(), how.get("stop", ()), True)
        return [mj.Completion("", [], "end", len(request.prompt), None) for request in requests]

    shutil.copytree(folders, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    meteora, engine = mj.Meteora, mj.Engine
    first = [mj, mj.load, meteora.generate, meteora.stream, meteora.logits, engine.__init__, engine.submit]
    first += [meteora.add_adapter, meteora.remove_adapter]
    first += [mj.Retrieval, mj.GatesWithin, mj.TaskRetrieval]  # by one index
    others = [getattr(mj, n) for n in mj.__all__ if n not in TYPES | {"__version__", "Engine"}]
    if not ALL:
        monkeypatch.setattr(mj.Meteora, "generate", checked)
    names = {}
    for entry in [*first, *(e for e in others if e not in first)]:
        text = inspect.getdoc(entry) or ""
        where = getattr(entry, "__qualname__", "meteora_jax")
        examples = doctest.DocTestParser().get_examples(text)
        assert examples, f"{where}: expected an example in its docstring"
        assert "InputError" in text or entry in (mj, meteora.stream, mj.Spectr, mj.Phatgoose, mj.Index), where
        for example in examples:
            exec(compile(example.source, where, "exec"), names)
    assert names["names"][0][0] == "strategyqa"


def test_tab_completion_and_types_show_what_is_public():
    assert dir(mj) == sorted(mj.__all__)
    user = (ROOT / "tests" / "typing_user.py").read_text(encoding="utf-8")
    assert user.startswith("# pyright: strict\n")
    assert [name for name in mj.__all__ if f"mj.{name}" not in user] == []


def test_messages_of_the_troubleshooting_page_exist():
    """Each message's fixed words, between the placeholders in capitals, stand in the source."""
    sources = [p for folder in ("meteora_jax", "converters") for p in (ROOT / folder).rglob("*.py")]
    source = re.sub(r'"\s*f?"', "", "".join(p.read_text(encoding="utf-8") for p in sources))
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        for words in re.split(r"\s*\.\.\.\s*", row):
            assert words in source, words


def test_all_pages_are_in_the_navigation():
    listed = re.findall(r"(?<=: )[\w./-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    assert set(listed) >= GENERATED


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, a missing anchor and an unknown reference are warnings, and warnings fail."""
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")  # links out of the project are refused
    for name in ("meteora_jax", "pallas_kernels", "converters"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site"


def test_the_site_builds_and_loads_nothing_from_elsewhere(site):
    pages = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    assert {f"{p.relative_to(DOCS).with_suffix('')}.html" for p in DOCS.rglob("*.md")} <= pages
    address = r"""\s*=\s*["']?(?:https?:)?//"""
    outside = re.compile(rf"<(?:script|img|iframe|source|video|audio)\b[^>]*\b(?:src|srcset){address}")
    kinds = "stylesheet|preload|preconnect|icon|modulepreload|dns-prefetch"
    sheets = re.compile(rf"""<link\b(?=[^>]*rel=["']?(?:{kinds}))[^>]*href{address}""")
    for name in pages:
        html = (site / name).read_text(encoding="utf-8")
        assert not outside.search(html), name
        assert not sheets.search(html), name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
    assert json.loads((site / "search.json").read_text(encoding="utf-8"))


def test_a_browser_asks_for_nothing_else(site):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    asked: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "token-router", "python", "results"):
            page.goto(f"file://{site}/{name}.html")
            page.wait_for_timeout(300)
        browser.close()
    assert len(asked) > 4
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
