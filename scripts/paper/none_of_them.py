"""Measure what gates with a null choice leave to the base: general requests, and of the bank's own tasks nothing.

    python scripts/paper/none_of_them.py runs/demo/base runs/demo/bank runs/none/gates --before runs/demo/gates \\
        --tasks runs/tasks --json runs/none/measured.json

The 200 requests of general.txt are no adapter's and are never trained on. Each is asked in three forms, as messages, as
plain text and in the tasks' own frame, with a few tokens of answer. Of the tasks' test problems the right answer is
read, not written: a problem counts where each of its tokens is the likeliest, so that one pass judges a system.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import meteora_jax as mj
from meteora_jax.evaluation.problems import choose
from meteora_jax.evaluation.tasks import load_split
from meteora_jax.io.files import write_json
from meteora_jax.routing import NO_ADAPTER, RoutingTrace, null_share
from meteora_jax.viz import dominant

REQUESTS = Path(__file__).with_name("general.txt")


@dataclass(frozen=True)
class Arguments:
    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    gates: tyro.conf.Positional[Path]
    """GATES folder with a null choice."""
    before: Path | None = None
    """GATES of the same bank without one, to compare with."""
    tasks: Path | None = None
    """TASKS folder; none: general requests alone."""
    limit: int = 20
    """Test problems a task."""
    requests: int = 200
    """General requests, evenly spread."""
    tokens: int = 16
    """Of a general request's answer."""
    frame: str = "[INST] {} [/INST]\n"
    """The tasks' frame, {} for the request."""
    batch: int = 20
    """Requests or problems at a time."""
    json: Path | None = None
    """Write the figures here too."""


def alone(traces: Sequence[RoutingTrace]) -> dict[str, float]:
    """Of prompts' and of responses' tokens: the share that no adapter leads, and the mean weight of the null choice."""
    found: dict[str, float] = {}
    for part in ("prompt", "response"):
        leaders, weights = [], []
        for trace in traces:
            n = trace.prompt_length
            at = slice(0, n) if part == "prompt" else slice(n, len(trace.tokens) - 1)  # nothing routed the last
            leaders.append(dominant(trace)[at] == NO_ADAPTER)
            weights.append(null_share(trace)[at])
        if sum(map(len, leaders)):
            found[f"{part}_led_by_none"] = float(np.concatenate(leaders).mean())
            found[f"{part}_null_weight"] = float(np.concatenate(weights).mean())
    return found


def batches(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of one size, the last filled up with its last."""
    parts = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [part + part[-1:] * (size - len(part)) for part in parts]


def traces_of(model: mj.Meteora, prompts: Sequence[Any], tokens: int, batch: int) -> list[RoutingTrace]:
    """How the model's gates route prompts and so many tokens of answer."""
    done = [c for part in batches(prompts, batch) for c in model.generate(part, max_new_tokens=tokens)]
    return [c.routing for c in done[: len(prompts)] if c.routing is not None]


def exact(model: mj.Meteora, rows: Sequence[tuple[list[int], int]], router: Any, batch: int) -> float:
    """The share of (token ids, prompt's length) whose tokens behind the prompt are all the likeliest."""
    right = []
    for part in batches(rows, batch):
        likeliest = np.asarray(model.logits([ids for ids, _ in part], router).argmax(-1))
        right += [(said[n - 1 : len(ids) - 1] == ids[n:]).all() for said, (ids, n) in zip(likeliest, part, strict=True)]
    return float(np.mean(right[: len(rows)]))


def judge(models: dict[str, mj.Meteora], command: Arguments, task: str) -> dict[str, Any]:
    """A task's test problems: each system's score, the gates' with its own adapter hidden (unseen), and what the null
    choice takes."""
    assert command.tasks is not None
    examples, model = load_split(command.tasks, task, "test"), models["gates"]
    examples = [examples[i] for i in choose([e.prompt for e in examples], command.limit)]
    rows = []
    for e in examples:
        prompt = model.encode(e.prompt)
        response = model.tokenizer(e.response, add_special_tokens=False)["input_ids"]
        rows.append(([*prompt, *response, model.config.eos_token_ids[0]], len(prompt)))
    size = max(1, command.batch // 4)  # logits of every token
    scores = {name: exact(m, rows, "gates if loaded", size) for name, m in models.items()}
    scores["base"] = exact(model, rows, None, size)
    others = tuple(name for name in model.adapter_names if name != task)
    assert model.gates is not None
    unseen = mj.Gates(model.gates.top_k, model.gates.temperature, within=others)
    scores["unseen"] = exact(model, rows, unseen, size)
    traces = traces_of(model, [ids for ids, _ in rows], 1, command.batch)
    return {**scores, **alone(traces)}


def main(command: Arguments) -> None:
    models = {"gates": mj.load(command.base, command.bank, command.gates)}
    if command.before is not None:
        models["before"] = mj.load(command.base, command.bank, command.before)
    requests = REQUESTS.read_text(encoding="utf-8").splitlines()
    requests = [requests[i * len(requests) // command.requests] for i in range(command.requests)]
    forms = {
        "messages": [[{"role": "user", "content": text}] for text in requests],
        "text": [f"{text}\n" for text in requests],
        "frame": [command.frame.format(text) for text in requests],
    }
    figures: dict[str, Any] = {"general": {}, "tasks": {}}
    for form, prompts in forms.items():
        figures["general"][form] = alone(traces_of(models["gates"], prompts, command.tokens, command.batch))
        print(form, json.dumps(figures["general"][form]), flush=True)
    if command.tasks is not None:
        for task in models["gates"].adapter_names:
            figures["tasks"][task] = judge(models, command, task)
            print(task, json.dumps(figures["tasks"][task]), flush=True)
        systems = (*models, "base", "unseen")
        mean = {name: float(np.mean([row[name] for row in figures["tasks"].values()])) for name in systems}
        figures["mean"] = mean
        print("mean", json.dumps(mean), flush=True)
    if command.json is not None:
        write_json(command.json, figures)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
