"""What holds for every test: no network, one CPU device unless it makes a mesh, strict shapes, types and dtypes."""

import gc
import itertools
import os

import compiling

# Before the first import of jax or transformers: both read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda runs the tests marked gpu
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["METEORA_CACHE"] = ""  # nothing is written into the user's cache, by child processes neither
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.FLAGS}"
os.environ["OMP_NUM_THREADS"] = "1"  # torch: threads that wait for each other take six times as long on tiny models

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype
import jax
import meshes
import pytest
from jaxtyping import install_import_hook

if os.environ["JAX_PLATFORMS"] == "cpu":
    compiling.use()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but not on constructors: jax rebuilds pytrees around leaves that are no arrays."""
    return function if function.__name__ == "__init__" else beartype.beartype(function)


# Every annotated function of these packages checks its arguments and result, shapes included. What Triton compiles
# from source is left as it is written: rewritten functions have lost the module's globals.
kernels = sorted(Path(__file__).parents[1].glob("pallas_kernels/*/*.py"))
kernels = [f"pallas_kernels.{path.parent.name}.{path.stem}" for path in kernels if not path.stem.endswith("_kernels")]
install_import_hook(("meteora_jax", "converters", *kernels), f"{__name__}.check_types")


EVERYTHING = "METEORA_TEST_ALL"  # set for workers and child processes by --all; see extent.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the tests marked exhaustive, too, and many random examples")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ[EVERYTHING] = "1"
    if os.environ["JAX_PLATFORMS"] == "cpu":
        meshes.use()
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if jax.default_backend() == "cpu" and runs_tests:
        import program_cache  # here, as meteora_jax is imported after the import hook, and by processes that run tests

        program_cache.use(config)


# Files that take a minute or more of one processor, the longest first: a worker that got one of them last would work on
# it while the others have nothing left.
LONGEST = (
    "real_model", "training_resume", "decode_step", "engine", "evaluate_model", "ray_serve", "loaded_adapters",
    "token_router", "retrieval", "tensor_parallel", "side_by_side", "routing", "plan", "serving", "serving_limits",
    "cli_train", "training", "generation", "paged_attention", "arguments", "quantized", "training_mesh", "kernels_tpu",
    "kernels_triton", "prompt_epilogues", "kernels", "gated_model", "sharding", "null_choice", "adapter_pool",
    "mixed_routers", "harness",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -k and -m leave tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; leaves out what is marked exhaustive unless asked for, by --all, by -m or by its own name."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    named = any("::" in argument for argument in config.args) or "exhaustive" in config.option.markexpr
    left_out = []
    for item in items:
        mark = item.get_closest_marker("exhaustive")
        if mark is not None and not (len(mark.args) == 1 and isinstance(mark.args[0], str)):
            raise pytest.UsageError(f"{item.nodeid}: the mark exhaustive takes the reason, one string")
        if mark is not None and not (config.getoption("--all") or named):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda"))


MAPS = 40_000  # of the 65,530 memory maps that Linux allows a process by default
TESTS = itertools.count()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Drops compiled programs before there are too many: each keeps maps, and XLA crashes when it can have no more."""
    maps = Path("/proc/self/maps")
    if next(TESTS) % 16:  # reading them takes up to 20 ms, and a test makes some hundreds at most
        return
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A test that reaches for another machine fails at once, on whatever machine it runs."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise RuntimeError(f"tests work offline, but this one connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(autouse=True)
def same_torch_draws():
    """PEFT and transformers draw weights from torch's generator: the same ones whichever tests ran before.

    Not all draws serve: for a sliding window with adapters by seed 0, torch's float32 is 1.3e-4 from its float64.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """See worlds.make_world."""
    from worlds import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    """TASKS of the hand-made BIG-bench folder."""
    from task_files import BIGBENCH, FIXTURE_TASKS

    from meteora_jax.evaluation.tasks.bigbench import prepare

    prepare(BIGBENCH, tmp_path / "tasks", FIXTURE_TASKS)
    return tmp_path / "tasks"
