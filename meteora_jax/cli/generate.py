"""`meteora generate`: text out, and how it was routed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from meteora_jax.cli.report import console, status, write_json
from meteora_jax.config import InputError
from meteora_jax.io.files import refuse_unwritable

RETRIEVING = ("retrieval", "gates-within")


@dataclass(frozen=True)
class Generate:
    """Answer prompts."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Texts; none: standard input is one prompt."""
    base: Path
    """BASE folder."""
    bank: Path | None = None
    """BANK folder."""
    gates: Path | None = None
    """GATES folder."""
    adapter_slots: int | Literal["auto"] | None = None
    """So many of the bank's adapters are on the device, the others on disk (auto: by the memory); else all."""
    index: Path | None = None
    """INDEX folder: the prompt's text finds its adapters."""
    router: str | None = None
    """"gates", "retrieval", "gates-within" (what was retrieved), "none", an adapter's name, or a mixture
    NAME=WEIGHT,NAME=WEIGHT; of a bank alone "arrow", "spectr", "lag", "logo" (which read the adapters' matrices),
    "phatgoose" (their own gates) and "uniform" (all of them alike); by default what is given: gates within retrieval,
    retrieval, gates, else none: a bank alone does nothing."""
    retrieve: int | None = None
    """Adapters that the index finds for a prompt, 3 with --compose, --weights or gates unless given. Without any of
    these: the best adapter or, where INDEX is ranked (meteora index rank), for a task without its own what serves three
    similar tasks best."""
    compose: Literal["selection", "mixture", "fusion"] | None = None
    """How retrieved adapters act together, a mixture unless given."""
    weights: Literal["uniform", "similarity"] | None = None
    """Of the retrieved adapters, uniform unless given."""
    gate_top_k: int | None = None
    """Adapters a token, by default as the gates were trained; of logo adapters a prompt."""
    gate_temperature: float | None = None
    """Of the softmax over the chosen gates or scores; by default as the gates were trained, and 1 of scores."""
    max_new_tokens: int = 64
    """At most this many tokens a response."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability only."""
    seed: int = 0
    """Of the sampling."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends a response; may be given several times."""
    chat: bool = False
    """Each prompt is a user's message: the tokenizer's chat template is applied."""
    stream: bool = True
    """Print text as it comes (one prompt only)."""
    show_routing: bool = False
    """Colour each token by its dominant adapter; write routing-N.html and routing-N.png."""
    routing_dir: Path = Path("runs/routing")
    """Where --show-routing writes."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    json: Path | None = None
    """Write responses, token ids and finish reasons here too."""


def router_name(command: Generate) -> str:
    """What `--router` says, or what is chosen by default of what is given."""
    if command.router:
        return command.router
    if command.index is not None:
        return "retrieval" if command.gates is None else "gates-within"
    return "none" if command.gates is None else "gates"


def check_options(command: Generate) -> None:
    """Refuses options that the router would not heed, and a text that every response begins with."""
    name, problems = router_name(command), []
    if "" in command.stop:
        problems.append("--stop: expected a text, found an empty one")
    for option, value, routers in (
        ("--retrieve", command.retrieve, RETRIEVING),
        ("--compose", command.compose, ("retrieval",)),
        ("--weights", command.weights, ("retrieval",)),
    ):
        if value is not None and name not in routers:
            problems.append(f"{option}: expected --router {' or '.join(routers)} beside it, found {name!r}")
    if command.weights is not None and command.compose == "selection":
        problems.append("--weights: expected --compose mixture or fusion beside it, found 'selection'")
    if command.show_routing and name == "none":
        problems.append("--show-routing: expected a router that picks adapters, found the bare base")
    if problems:
        raise InputError(problems)


def check_router(command: Generate) -> None:
    """Refuses, before anything large is read, a `--router` that the folders' descriptions do not have."""
    from meteora_jax.cli.bank import read_description
    from meteora_jax.config import read_json
    from meteora_jax.gate_config import GateConfig
    from meteora_jax.routing.named import read_router

    names, gates = () if command.bank is None else read_description(command.bank).names, None
    if command.gates is not None:
        gates = GateConfig.from_json(read_json(command.gates / "gates.json"), str(command.gates / "gates.json"))
    text, options = router_name(command), (command.gate_top_k, command.gate_temperature)
    if text not in RETRIEVING:
        read_router(text, gates, names, *options)
        return
    if command.index is None:
        raise InputError(f"--router: expected --index beside {text!r}, found none")
    if not (command.index / "index.json").is_file():
        raise InputError(f"{command.index / 'index.json'}: expected a file, found none")
    if text == "gates-within" and gates is None:
        raise InputError("--router: expected --gates beside 'gates-within', found none")
    if text == "retrieval" and options != (None, None):
        raise InputError(f"--gate-top-k, --gate-temperature: expected --router gates, found {text!r}")


def parse_router(command: Generate, model: Any) -> Any:
    """`--router`, which was checked, as a router of the loaded model."""
    from meteora_jax.routing.named import gate_options, read_router

    text, options = router_name(command), (command.gate_top_k, command.gate_temperature)
    if text not in RETRIEVING:
        return read_router(text, model.gates, model.adapter_names, *options)
    from meteora_jax.retriever.index import Index
    from meteora_jax.retriever.ranking import read_ranking
    from meteora_jax.routing.retrieval import RETRIEVED, GatesWithin, Retrieval
    from meteora_jax.routing.task_retrieval import default_retrieval

    count = RETRIEVED if command.retrieve is None else command.retrieve
    assert command.index is not None, "as check_router says"
    if text == "gates-within":
        return GatesWithin(Index.load(command.index), count, *gate_options(model.gates, *options))
    if (command.retrieve, command.compose, command.weights) == (None, None, None):
        most = model.pool.table.count if model.pool else RETRIEVED
        how_ranked = Index.load(command.index), read_ranking(command.index)
        return default_retrieval(*how_ranked, most=most, names=model.adapter_names)
    how = command.compose or "mixture", command.weights or "uniform"
    return Retrieval(Index.load(command.index), count, *how)


def read_stdin() -> str:
    """All of standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise InputError(f"standard input: expected UTF-8 text, found byte {e.object[e.start]:#04x} ({e})") from None


def generate(command: Generate) -> None:
    """Runs `meteora generate`."""
    from meteora_jax.loading import load

    prompts: list[Any] = list(command.prompts) or [read_stdin()]
    if empty := [i for i, p in enumerate(prompts) if not p]:
        raise InputError([f"prompt {i}: expected a text, found an empty one" for i in empty])
    check_options(command)
    check_router(command)
    if command.show_routing:
        refuse_unwritable("--routing-dir", command.routing_dir, folder=True)
    with status.status("loading"):
        model = load(
            command.base, command.bank, command.gates, dtype=command.dtype, adapter_slots=command.adapter_slots
        )
    status.print(f"loaded {command.base} as {model.dtype}", highlight=False, soft_wrap=True)
    router = parse_router(command, model)
    if router is None and command.router is None and command.bank is not None:
        status.print(
            "no adapter acts: of a bank alone none is chosen; --gates, --index or --router NAME chooses one",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    asked = [[{"role": "user", "content": p}] if command.chat else p for p in prompts]
    options: dict[str, Any] = dict(
        max_new_tokens=command.max_new_tokens, temperature=command.temperature, top_k=command.top_k,
        top_p=command.top_p, seed=command.seed, stop=command.stop,
    )  # fmt: skip
    if command.stream and len(prompts) == 1:
        completions: list[Any] = []
        for piece in model.stream(asked, router, **options):
            if isinstance(piece, list):
                completions = piece
            else:
                print(piece.text, end="", flush=True, file=console.file)
        print(file=console.file)
    else:
        completions = model.generate(asked, router, **options)
        for i, c in enumerate(completions):
            if len(completions) > 1:
                console.rule(f"prompt {i}", align="left")
            print(c.text, file=console.file)
    for i, c in enumerate(completions):
        if c.routing is not None and c.routing.retrieved:
            found = ", ".join(f"{name} {similarity:.3f}" for name, similarity in c.routing.retrieved)
            status.print(f"prompt {i} retrieved: {found}", highlight=False)
    written = [
        show_routing(c.routing, command.routing_dir, f"routing-{i}")
        for i, c in enumerate(completions)
        if command.show_routing
    ]
    write_json(
        command.json,
        [
            {"prompt": p, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason,
             "prompt_length": c.prompt_length,
             **({"retrieved": dict(c.routing.retrieved)} if c.routing is not None and c.routing.retrieved else {}),
             **({"routing": [str(f) for f in written[i]]} if written else {})}
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ],
    )  # fmt: skip


def show_routing(trace: Any, folder: Path, stem: str) -> list[Path]:
    """Prints a trace in colour and writes its page and picture; the files written."""
    if trace is None:
        raise InputError("--show-routing: expected a router that picks adapters, found the bare base")
    from meteora_jax import viz

    viz.to_terminal(trace, console)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / f"{stem}.html", folder / f"{stem}.png"
    viz.write_html(trace, page, "routing")
    viz.write_png(trace, picture, "routing")
    status.print(f"routing: {page} {picture}", highlight=False)
    return [page, picture]
