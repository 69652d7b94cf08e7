"""One LLaMA-family model with many LoRA adapters inside, where nobody has to pick the adapter.

`load` makes a `Meteora`; its `generate`, `stream` and `logits` take `router=`: who chooses adapters. `Engine` serves
requests that come and go. `help` of each has shapes, units, errors and an example; docs/python.md has all of them.

Examples:
    >>> import meteora_jax as mj
    >>> model = mj.load("runs/demo/base", bank="runs/demo/bank", gates="runs/demo/gates")
    >>> model.generate(["How many legs has a spider?"], max_new_tokens=8)[0].text
"""

from importlib.metadata import PackageNotFoundError, version

from meteora_jax.api import Meteora
from meteora_jax.batching import Engine, Pending
from meteora_jax.completion import Completion, Delta
from meteora_jax.config import InputError
from meteora_jax.engine import Sampling
from meteora_jax.loading import load
from meteora_jax.retriever.index import Index
from meteora_jax.routing import Router, RouterArgument, Routing, RoutingTrace
from meteora_jax.routing.by_score import Arrow, Lag, Phatgoose, Spectr
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.logo import Logo
from meteora_jax.routing.retrieval import GatesWithin, Retrieval
from meteora_jax.routing.task_retrieval import TaskRetrieval
from meteora_jax.warming import warm_up

try:
    __version__ = version("meteora-jax")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Arrow",
    "Completion",
    "Delta",
    "Engine",
    "Fixed",
    "Gates",
    "GatesWithin",
    "Index",
    "InputError",
    "Lag",
    "Logo",
    "Meteora",
    "Pending",
    "Phatgoose",
    "Retrieval",
    "Router",
    "RouterArgument",
    "Routing",
    "RoutingTrace",
    "Sampling",
    "Spectr",
    "TaskRetrieval",
    "__version__",
    "load",
    "warm_up",
]


def __dir__() -> list[str]:
    """What is public; the modules below are imported by their names."""
    return sorted(__all__)
