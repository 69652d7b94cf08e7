"""`meteora throughput`: new tokens a second of systems at growing batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from meteora_jax.cli.comparison import Comparison, check_lengths, fitting, load_systems, named_problems
from meteora_jax.cli.devices import is_first_process, make_devices_mesh
from meteora_jax.cli.report import check_counts, console, default_dtype, print_tables, progress_bar, status, write_json
from meteora_jax.config import InputError
from meteora_jax.evaluation.systems import check_routes
from meteora_jax.evaluation.throughput import measure, throughput_markdown, write_throughput
from meteora_jax.io.files import refuse_unwritable


@dataclass(frozen=True)
class Throughput(Comparison):
    """Time systems on problems of like length, side by side, --max-new-tokens each; no answer is scored.

    --out gets throughput.json and throughput.png; figures are also given over the first system's.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Requests that are answered together."""
    repeats: int = 5
    """Measurements of each system and batch size; medians count."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""


def throughput(command: Throughput) -> None:
    """Runs `meteora throughput`."""
    check_counts(limit=command.limit, max_prompt=command.max_prompt, repeats=command.repeats)
    if command.max_new_tokens < 2:  # the first comes with the prompt: decoding is timed from the second on
        raise InputError(f"--max-new-tokens: expected 2 or more, found {command.max_new_tokens}")
    if not command.batch_sizes or min(command.batch_sizes) < 1:
        found = " ".join(map(str, command.batch_sizes)) or "none"
        raise InputError(f"--batch-sizes: expected batch sizes of 1 or more, found {found}")
    refuse_unwritable("--out", command.out, folder=True)
    mesh = make_devices_mesh(command)
    dtype = default_dtype(command.dtype)
    with status.status(f"loading as {dtype}"):
        loaded = load_systems(command, mesh, dtype)
        model, systems = loaded.model, loaded.systems
        rows, problems = named_problems(command, model, "all" if command.only is None else command.only)
        problems = fitting(command, model, rows, problems)
        check_routes(systems, problems)
        check_lengths(command, model, problems)
    first = is_first_process()
    with progress_bar("throughput", shown=first) as progress:
        records = measure(
            systems, problems, command.batch_sizes, command.max_new_tokens, command.repeats, progress=progress
        )
    if not first:
        return
    device = jax.devices()[0]
    about = {"device": device.device_kind, "devices": jax.device_count(), "dtype": dtype, "jax": jax.__version__}
    command.out.mkdir(parents=True, exist_ok=True)
    for path in (command.out / "throughput.json", command.json):
        write_json(path, {**about, "records": records})
    write_throughput(records, command.out / "throughput.png")
    console.print(f"{device.device_kind}, jax {jax.__version__}, {dtype}", highlight=False)
    print_tables(throughput_markdown(records))
