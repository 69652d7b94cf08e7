"""What a run shows: a record a step, throughput and MFU, TensorBoard scalars."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from meteora_jax.bank import group_rank
from meteora_jax.config import GROUPS, PROJECTIONS, BankConfig, InputError, LlamaConfig
from meteora_jax.gate_config import HOPS, SEGMENTS, SHIFTS, TokenRouterForm
from meteora_jax.io.files import writing
from meteora_jax.training.loss import Losses

# Dense bfloat16 FLOP/s of one device, by the beginning of its `device_kind` (the makers' data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA L4": 121e12, "NVIDIA B200": 2250e12,
    "TPU7x": 2307e12, "TPU v6 lite": 918e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v4": 275e12,
}  # fmt: skip
WINDOW = 20  # steps over which throughput is measured
SCALARS_EVERY = 10  # steps between TensorBoard's many scalars (per task, per layer and projection)


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device; None where it is not known (a CPU)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def flops_per_token(
    config: LlamaConfig,
    bank: BankConfig | None,
    *,
    chosen: int,
    gates: TokenRouterForm | Literal["meteora"] | None,
    train_adapters: bool,
    lm: bool = True,
) -> float:
    """FLOPs that one token of training needs beside attention, whatever a program spends.

    2 forward and 2 backward through the activations for every weight of a matmul, 2 more for a weight that is trained;
    recomputation is not counted. Frozen: the base, its head included, and, unless trained, the `chosen` adapters.
    gates: a token router, "meteora" for those at the projections, None for none. lm: whether the model runs beside a
    token router.
    """
    base = config.hidden_size * config.vocab_size
    adapters = gate = 0
    count = len(bank.names) if bank is not None else 0
    for group, projections in GROUPS.items():
        shapes = [config.projection_shape(p) for p in projections]
        base += config.num_layers * sum(i * o for i, o in shapes)
        adapters += config.num_layers * chosen * group_rank(bank, group) * sum(i + o for i, o in shapes)
        if gates == "meteora":
            gate += config.num_layers * count * sum(i for i, _ in shapes)
    if isinstance(gates, TokenRouterForm):
        layers = gates.depth * (3 * config.hidden_size + 10 * gates.width)
        lookups = HOPS * (5 * count + 2 + 2 * SEGMENTS)
        hop = (1 + SHIFTS) * gates.width + count
        gate = gates.width * (config.hidden_size + SHIFTS * gates.width + layers + lookups + hop)
    if not lm:
        return 6.0 * gate
    return 4.0 * base + (6.0 if train_adapters else 4.0) * adapters + 6.0 * gate


def flops_per_pair(config: LlamaConfig) -> float:
    """FLOPs of attention for each token that a token sees: q k and p v are 4 a head's width, backward twice that."""
    return 12.0 * config.num_layers * config.num_heads * config.head_dim


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of training: of a token beside attention, and of a pair of tokens in attention."""

    token: float
    pair: float

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        bank: BankConfig | None,
        *,
        chosen: int,
        gates: TokenRouterForm | Literal["meteora"] | None,
        train_adapters: bool,
        lm: bool = True,
    ) -> FlopCount:
        """As `flops_per_token` and `flops_per_pair` count them."""
        token = flops_per_token(config, bank, chosen=chosen, gates=gates, train_adapters=train_adapters, lm=lm)
        return cls(token, flops_per_pair(config) if lm else 0.0)


class Recorder:
    """Turns each step's losses, when they have arrived, into its record.

    Args:
        names: of the tasks, by adapter index. log: JSON lines, a record a step; on resuming at step n its first n
            records are kept. tensorboard: folder of scalars.
    """

    def __init__(
        self,
        names: Sequence[str],
        log: Path | None,
        tensorboard: Path | None,
        *,
        flops: FlopCount,
        start: int,
        progress: Callable[[int, dict[str, Any]], None] | None,
    ):
        self.records = kept_records(log, start) if log else []
        self._start = start
        self._names, self._progress, self._flops = tuple(names), progress, flops
        self._before = self.records[-1]["seconds"] if self.records else 0.0
        self._began = time.perf_counter()
        self._times: deque[tuple[float, int, float]] = deque([(self._began, 0, 0.0)], maxlen=WINDOW)
        self.accuracies: deque[np.ndarray] = deque(maxlen=1000)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak else None
        self._file = self._writer = None
        if jax.process_index() != 0:
            return
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._file = log.open("w", encoding="utf-8")
            self._file.writelines(json.dumps(r) + "\n" for r in self.records)
            self._file.flush()
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=start + 1 if start else None)

    def add(self, step: int, losses: Losses) -> dict[str, Any]:
        """The record of a step; waits for the step to be done."""
        losses = jax.tree.map(np.asarray, losses)
        tokens, pairs = int(losses.tokens), float(losses.pairs)
        now = time.perf_counter()
        self._times.append((now, tokens, tokens * self._flops.token + pairs * self._flops.pair))
        (first, *_), *later = self._times
        rate, flops = (sum(t[i] for t in later) / max(now - first, 1e-9) for i in (1, 2))
        record: dict[str, Any] = {"step": step}
        if float(losses.lm) or not losses.gate_accuracy.size:  # a token router may have no such loss
            record["lm"] = round(float(losses.lm), 5)
        if losses.gate_accuracy.size:
            record["gate"] = round(float(losses.gate), 5)
            record["gate_accuracy"] = round(float(losses.gate_accuracy.mean()), 5)
            record["entropy"] = round(float(losses.entropy.mean()), 5)
            self.accuracies.append(np.asarray(losses.gate_accuracy))
        record |= {
            "tokens": tokens,
            "seconds": round(self._before + now - self._began, 2),
            "tokens_per_second": round(rate, 1),
            "mfu": round(flops / self._peak, 4) if self._peak else None,
        }
        if not np.isfinite(losses.loss):
            found = ", ".join(f"{key} {record[key]}" for key in ("lm", "gate") if key in record)
            raise InputError(f"step {step}: expected a finite loss, found {found}")
        self.records.append(record)
        if self._file:
            with writing(self._file.name):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        if self._writer:
            self._scalars(self._writer.add_scalar, step, record, losses)
        if self._progress:
            self._progress(step, record)
        return record

    def _scalars(self, add: Callable[..., Any], step: int, record: dict[str, Any], losses: Losses) -> None:
        for key in ("lm", "gate", "gate_accuracy", "entropy", "tokens_per_second", "mfu"):
            if record.get(key) is not None:
                add(key, record[key], step)
        if step % SCALARS_EVERY or not losses.gate_accuracy.size:
            return
        by_task = losses.hits.mean((0, 1))
        # an extension's null choice has no name where it has no background
        for name, hits, judged in zip(self._names, by_task, losses.judged, strict=False):
            if judged > 0:
                add(f"accuracy_of_task/{name}", hits / judged, step)
        for name, load in zip(self._names, losses.load.mean((0, 1)), strict=False):
            add(f"adapter_load/{name}", load, step)
        for l, (row, entropies) in enumerate(zip(losses.gate_accuracy, losses.entropy, strict=True)):
            for p, accuracy, entropy in zip(PROJECTIONS, row, entropies, strict=True):
                add(f"accuracy/{p}/{l:02d}", accuracy, step)
                add(f"entropy/{p}/{l:02d}", entropy, step)

    def summary(self) -> dict[str, Any]:
        """The last record, losses averaged over the last tenth of the steps; of a run that was over and whose log is
        gone, only the step."""
        if not self.records:
            return {"step": self._start, "seconds": 0.0}
        last = self.records[-max(1, len(self.records) // 10) :]
        keys = [k for k in ("lm", "gate", "gate_accuracy") if k in last[-1]]
        return {**last[-1], **{k: float(np.mean([r[k] for r in last])) for k in keys}}

    def close(self) -> None:
        """Closes the log and TensorBoard's file."""
        for file in (self._file, self._writer):
            if file:
                with contextlib.suppress(OSError):  # what could not be written was said at its step
                    file.close()


def kept_records(log: Path, start: int) -> list[dict[str, Any]]:
    """The records of the first `start` steps; a last line that a kill cut short is dropped."""
    if start == 0 or not log.is_file():
        return []
    records = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= start:
            records.append(record)
    return records
