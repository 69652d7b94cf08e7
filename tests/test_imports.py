"""Which module may import which, and two habits, read off the source of every module.

ORDER lists the modules and packages of meteora_jax; each may import those before it, and itself. pallas_kernels and
converters know only what THIRD_PARTY and PROJECT grant them; nobody else imports scripts or tests. A module that has no
place in ORDER fails here until it has one.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
NO_NOUN = {"utils", "util", "common", "helpers", "helper", "misc"}  # a function lives with the noun it serves

# meteora_jax in the order in which it may import; "" is meteora_jax/__init__, the public API.
ORDER = [
    *(
        "quantization",
        "config",
        "io.files",
        "io.hf_config",
        "gate_config",
        "io.provenance",
        "text",
        "arguments",
        "prompts",
        "examples",
        "execution",
        "compilation_cache",
        "topologies",
        "numerics",
    ),
    *(
        "sharding",
        "spectra",
        "bank",
        "retriever",
        "model.paged_cache",
        "model.attention",
        "model.rope",
        "routing",
        "padding",
        "model",
        "io",
    ),
    *("engine", "sequences", "completion", "generation", "probing", "evaluation", "training", "viz", "planning"),
    "engine_plan",
    *("adapter_files", "api", "likelihood", "loading", "batching", "warming", "", "serving", "harness", "cli"),
]
PACKAGES = ("meteora_jax", "converters", "pallas_kernels")
PROJECT = {  # what else of this project a package imports; of meteora_jax, ORDER decides
    "pallas_kernels": (),
    "converters": (
        *(
            "meteora_jax.config",
            "meteora_jax.quantization",
            "meteora_jax.io.hf_config",
            "meteora_jax.io.files",
            "meteora_jax.gate_config",
            "meteora_jax.io.provenance",
        ),
        *("meteora_jax.retriever.config",),
    ),
    "meteora_jax": ("pallas_kernels",),
    "meteora_jax.adapter_files": ("converters",),  # of others, for a loaded model
    "meteora_jax.cli": ("converters", "pallas_kernels"),
}
THIRD_PARTY = {
    "pallas_kernels": {"jax", "jax_triton", "triton", "jaxtyping"},
    "converters": {"numpy", "ml_dtypes", "safetensors", "gguf", "tokenizers", "transformers"},
    "meteora_jax": {
        *("jax", "flax", "optax", "orbax", "numpy", "ml_dtypes", "safetensors", "jaxtyping"),
        *("transformers", "tokenizers", "jinja2", "tyro", "rich", "gguf"),
        *("matplotlib", "sacrebleu", "rouge_score", "datasets", "lm_eval", "grain", "tensorboardX"),
        *("scipy", "sklearn", "bm25s"),
        *("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance"),  # serving
    },
}
INSIDE_FUNCTIONS = {  # optional, or slow to import: only where used
    *("gguf", "matplotlib", "sacrebleu", "rouge_score", "datasets", "transformers", "tokenizers"),
    *("grain", "tensorboardX", "orbax"),
    *("scipy", "sklearn", "bm25s", "llguidance"),
}


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(full name, line, executed when the module is imported) of every import, relative ones resolved."""

    def walk(node: ast.AST, eager: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, eager
            elif isinstance(child, ast.ImportFrom):
                source = child.module or ""
                if child.level:
                    kept = module.split(".")
                    kept = kept[: len(kept) - child.level + is_package]
                    source = ".".join([*kept, source] if source else kept)
                for alias in child.names:
                    yield f"{source}.{alias.name}", child.lineno, eager
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                lazy = lazy or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
                yield from walk(child, eager and not lazy)

    return walk(tree, True)


def place_of(name: str) -> str:
    """Whose place in ORDER a full name has: the longest that it begins with; an attribute of the package is the API."""
    inner = name.partition(".")[2]
    return max((place for place in ORDER if f"{inner}.".startswith(f"{place}.")), key=len, default="")


def violations(path: str, text: str) -> list[str]:
    """Every import of one file (its path from the root, its text) against the tables, one line each."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package, _, inner = module.partition(".")
    place = place_of(module)
    placed = place != "" or not inner
    found = []
    if package == "meteora_jax" and not placed:
        found.append(f"{path}: {inner!r} has no place in ORDER")
    for name, line, eager in imports(ast.parse(text), module, path.endswith("__init__.py")):
        top = name.split(".")[0]
        where = f"{path}:{line} imports {name}"
        if top in ("scripts", "tests") and top != package:
            found.append(f"{where}: nobody imports {top}")
        if package not in PACKAGES or top == package != "meteora_jax":
            continue
        if top == "meteora_jax" == package:
            theirs = place_of(name)
            if placed and theirs != place and ORDER.index(theirs) > ORDER.index(place):
                found.append(f"{where}: {theirs or 'the public API'} comes after {place or 'the public API'}")
        elif top in PACKAGES:
            granted = PROJECT.get(f"{package}.{place}", PROJECT[package])
            if not any(f"{name}.".startswith(f"{grant}.") for grant in granted):
                found.append(f"{where}: {package} may not")
        elif top not in sys.stdlib_module_names:
            if top not in THIRD_PARTY[package]:
                found.append(f"{where}: {package} may not")
            elif eager and top in INSIDE_FUNCTIONS:
                found.append(f"{where}: only inside the function that needs it")
    return found


def eager_in_tests(name: str, seen: set[str]) -> set[str]:
    """What a file of tests imports from elsewhere when it starts, through the files of tests that it imports."""
    seen.add(name)
    tree, found = ast.parse((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")), set()
    for imported, _, eager in imports(tree, name, False):
        top = imported.split(".")[0]
        if eager and (ROOT / "tests" / f"{top}.py").exists():
            found |= eager_in_tests(top, seen) if top not in seen else set()
        elif eager:
            found.add(top)
    return found


PROGRAMS = [
    path.stem for path in sorted((ROOT / "tests").glob("*.py")) if "\nif __name__ ==" in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_tests_start_begins_without_torch(name: str):
    """Seven seconds of a core each time: torch and transformers are imported in the functions that need them."""
    assert not {"torch", "transformers", "peft"} & eager_in_tests(name, set())


def sources() -> list[str]:
    folders = (*PACKAGES, "scripts", "tests")
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources())
def test_file_keeps_the_order(path: str):
    text = (ROOT / path).read_text(encoding="utf-8")
    found = violations(path, text)
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        found.append(f"{path}: {lines} lines; split it above {MAX_LINES}")
    if NO_NOUN & set(Path(path).with_suffix("").parts):
        found.append(f"{path}: name it after what it holds")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("pallas_kernels/routed_lora/api.py", "import numpy as np", "pallas_kernels may not"),
        ("pallas_kernels/routed_lora/api.py", "from meteora_jax.config import BankConfig", "may not"),
        ("converters/rules.py", "import jax.numpy as jnp", "converters may not"),
        ("converters/rules.py", "import torch", "converters may not"),
        ("converters/rules.py", "from meteora_jax.model import llama", "converters may not"),
        ("converters/gguf_llama.py", "import gguf", "only inside"),
        ("converters/gguf_llama.py", "class Reader:\n    import gguf", "only inside"),
        ("meteora_jax/config.py", "from meteora_jax.model.llama import Llama", "model comes after config"),
        ("meteora_jax/config.py", "def f():\n    from meteora_jax.model import llama", "model comes after config"),
        ("meteora_jax/model/llama.py", "from .. import cli", "cli comes after model"),
        ("meteora_jax/model/attention.py", "from meteora_jax.routing import Routing", "routing comes after"),
        ("meteora_jax/io/files.py", "import meteora_jax.io.provenance", "comes after io.files"),
        ("meteora_jax/routing/gates.py", "from ..model.llama import Llama", "model comes after routing"),
        ("meteora_jax/generation.py", "import meteora_jax as mj", "the public API comes after generation"),
        ("meteora_jax/generation.py", "from meteora_jax import Gates", "the public API comes after"),
        ("meteora_jax/__init__.py", "from meteora_jax.cli import main", "cli comes after the public API"),
        ("meteora_jax/generation.py", "from converters import rules", "meteora_jax may not"),
        ("meteora_jax/model/llama.py", "import torch", "meteora_jax may not"),
        ("meteora_jax/viz.py", "import matplotlib.pyplot as plt", "only inside"),
        ("meteora_jax/kittens.py", "", "no place"),
        ("tests/test_x.py", "from scripts import bench", "nobody imports scripts"),
        ("scripts/bench.py", "import tests.tiny", "nobody imports tests"),
    ],
)
def test_a_wrong_import_is_named(path: str, text: str, complaint: str):
    (found,) = violations(path, text)
    assert complaint in found
    assert path in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pallas_kernels/routed_lora/api.py", "import jax\nfrom .reference import routed_lora"),
        ("converters/gguf_llama.py", "from meteora_jax.config import LlamaConfig\ndef f():\n    import gguf"),
        ("meteora_jax/routing/__init__.py", "from .gates import Gates\nfrom meteora_jax import config"),
        ("meteora_jax/model/lora_linear.py", "from meteora_jax.routing import Routing\nimport pallas_kernels"),
        ("meteora_jax/cli/convert.py", "import converters.rules\nimport meteora_jax as mj"),
        ("meteora_jax/__init__.py", "from .api import load"),
        ("scripts/demo/train.py", "import torch\nimport meteora_jax as mj"),
    ],
)
def test_a_right_import_is_not(path: str, text: str):
    assert violations(path, text) == []
