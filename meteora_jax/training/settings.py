"""How gates and adapters are trained: each setting is declared here once, with its help.

The library takes these classes and the command line shows them as they are. What is `Constant` in one belongs to its
recipe: a program may set it, the command line does not ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from meteora_jax.config import NAME, PROJECTIONS, InputError, is_name
from meteora_jax.gate_config import TokenRouterForm

if TYPE_CHECKING:
    from meteora_jax.training.loss import Remat

T = TypeVar("T")
Constant = tyro.conf.Suppress[tyro.conf.Fixed[T]]

RECOMPUTED: dict[str, Remat] = {"all": True, "dots": "dots", "none": False}


def at_least(lowest: int, **values: int | None) -> list[str]:
    """What is wrong with some settings, which are numbers from `lowest` on (or None)."""
    return [f"{k}: expected at least {lowest}, found {x}" for k, x in values.items() if x is not None and x < lowest]


def above_0(**values: float | None) -> list[str]:
    """What is wrong with some settings, which are finite numbers above 0 (or None)."""
    wrong = {k: x for k, x in values.items() if x is not None and not 0 < x < math.inf}
    return [f"{k}: expected a number above 0, found {x}" for k, x in wrong.items()]


def refuse(problems: list[str]) -> None:
    """Raises InputError: there are problems."""
    if problems:
        raise InputError(problems)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which sequences are trained on, and how many at a time."""

    batch_size: int = 32
    """Sequences a step; packed: on average."""
    max_length: int = 4096
    """Longer sequences are passed over."""
    samples_per_task: int | None = None
    """At most so many examples of a task, chosen at random."""
    composite: float = 0.0
    """Share of the sequences that hold several tasks: composite problems."""

    def __post_init__(self):
        refuse(at_least(1, batch_size=self.batch_size) + at_least(2, max_length=self.max_length))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How sequences are drawn and put into rows."""

    rows: int | None = None
    """Rows of the packed batch, instead of what batch size and mean length give."""
    packing: bool = True
    """Several sequences a row, each attending to itself alone; else one a row, padded."""
    prompt_loss: bool = True
    """Whether prompt tokens count in the loss."""
    composite_sizes: tuple[int, int] = (3, 3)
    """The fewest and the most tasks that a composite problem holds."""
    composite_shots: int = 0
    """At most so many worked examples stand before a composite problem, any number as likely as another."""
    composite_cut: Constant[float] = 0.0
    """Share of the composites whose questions and answers are cut to the characters at their beginning and end."""
    conversations: Constant[float] = 0.0
    """Share of the composites that are conversations by the base's chat template, of one task or a task a turn."""

    def __post_init__(self):
        refuse(at_least(1, rows=self.rows))


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How long and how fast, and what it may cost."""

    steps: int = 1000
    """Updates."""
    learning_rate: float = 5e-4
    """Peak of the cosine schedule."""
    accumulate: int = 1
    """Parts that a step's batch is worked off in: less memory, the same result."""
    remat: Literal["all", "dots", "none"] = "all"
    """What of a layer the backward pass computes again, for less memory and up to half more arithmetic: all, all but
    the results of its matmuls (dots), or nothing."""

    def __post_init__(self):
        problems = at_least(1, steps=self.steps, accumulate=self.accumulate)
        refuse(problems + above_0(learning_rate=self.learning_rate))

    @property
    def recomputed(self) -> Remat:
        """`remat` as a layer takes it."""
        return RECOMPUTED[self.remat]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The optimiser's constants."""

    warmup: float = 0.005
    """Share of the steps that warm up."""
    clip: float = 0.3
    """Largest gradient norm; inf: any."""

    def __post_init__(self):
        problems = []
        if not 0 <= self.warmup <= 1:
            problems.append(f"warmup: expected a share from 0 to 1, found {self.warmup}")
        if not self.clip > 0:
            problems.append(f"clip: expected a norm above 0 (inf: any), found {self.clip}")
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What gates are trained towards: CE(next token) + beta * CE(gate logits, task id).

    lm_loss: without the first term a token router is trained by the second alone, and no layer runs. response_weight:
    what the responses' tokens together count in the second term, of 1; every token counts the same unless given.
    start_weight: the part of that which the first two tokens of each response count by themselves. segment_weight:
    without the first term, that of CE(previous segment's task) + CE(own segment's index) beside the second.
    """

    beta: float = 0.0
    lm_loss: bool = True
    response_weight: float | None = None
    start_weight: float = 0.0
    segment_weight: float = 0.0

    def __post_init__(self):
        problems = []
        if self.response_weight is not None and not 0 <= self.response_weight <= 1:
            problems.append(f"response_weight: expected a share from 0 to 1, found {self.response_weight}")
        if not 0 <= self.start_weight <= 1:
            problems.append(f"start_weight: expected a share from 0 to 1, found {self.start_weight}")
        if self.start_weight and self.response_weight is None:
            problems.append(f"start_weight: expected 0 without a response_weight, found {self.start_weight}")
        for name, value in (("beta", self.beta), ("segment_weight", self.segment_weight)):
            if not 0 <= value < math.inf:
                problems.append(f"{name}: expected 0 or more, found {value}")
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The shape of a new adapter: W x + alpha / rank * B A x at every projection in `targets`."""

    rank: int = 8
    """Of A and B."""
    alpha: float | None = None
    """The scale is alpha / rank; twice the rank unless given."""
    targets: tuple[str, ...] = PROJECTIONS
    """Projections that an adapter touches."""

    def __post_init__(self):
        refuse(above_0(alpha=self.alpha))

    @property
    def numerator(self) -> float:
        """`alpha`, whether given or not."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where a run keeps its checkpoints (every 100 steps), TensorBoard scalars, log and pictures."""

    run: Path | None = None
    """Folder of checkpoints, TensorBoard scalars, log.jsonl (a line a step) and pictures; OUT-run unless given."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder if there is one; --no-resume removes them and starts over."""
    save_every: Constant[int] = 100
    """Steps between checkpoints."""
    keep: Constant[int] = 3
    """Checkpoints kept."""
    log: Constant[Path | None] = None
    """The log, without a run folder too."""

    def __post_init__(self):
        refuse(at_least(1, save_every=self.save_every, keep=self.keep))

    def in_run(self, name: str) -> Path | None:
        """The path of something in the run folder, if there is one."""
        return self.run / name if self.run else None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training of gates and of adapters have in common."""

    data: Data = Data()
    drawing: Drawing = Drawing()
    optimization: Optimization = Optimization()
    schedule: Schedule = Schedule()
    seed: int = 0
    """Of the data's order, and of the weights that training begins with."""

    def __post_init__(self):
        refuse(at_least(0, seed=self.seed))
        refuse([] if self.seed < 2**32 else [f"seed: expected less than 2**32, found {self.seed}"])

    def record(self) -> dict[str, Any]:
        """All settings by their names alone, as reports and checkpoints hold them."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Data | Drawing | Optimization | Schedule | Objective | LoRA | Validating):
                found |= vars(value)
            else:
                found[name] = vars(value) if isinstance(value, TokenRouterForm) else value
        return found | {"remat": self.optimization.recomputed}


@dataclass(frozen=True, kw_only=True)
class GateTraining(Training):
    """How gates are trained; `recipes.RECIPES` has the whole of each form, and the defaults are the original's.

    form: a token router, or None: MeteoRA's own gates. temperature: of the softmax over the chosen gates.
    adapter_learning_rate: the adapters' peak where they are trained beside the gates; the gates' unless given.
    background_share: of the sequences, single and in composites, where there is background text.
    """

    drawing: Constant[Drawing] = Drawing()
    schedule: Constant[Schedule] = Schedule()
    objective: Constant[Objective] = Objective(beta=50.0)
    form: Constant[TokenRouterForm | None] = None
    temperature: Constant[float] = 1.0
    adapter_learning_rate: Constant[float | None] = None
    background_share: Constant[float] = 0.25
    top_k: int = 2
    """Adapters a token."""

    def __post_init__(self):
        super().__post_init__()
        problems, objective = above_0(temperature=self.temperature), self.objective
        problems += above_0(adapter_learning_rate=self.adapter_learning_rate)
        if not objective.lm_loss and self.form is None:
            problems.append("lm_loss: expected a token router to go without it, found MeteoRA's own gates")
        if objective.response_weight is not None and self.drawing.prompt_loss:
            problems.append("prompt_loss: expected none with a response_weight, by which loss marks the responses")
        if objective.lm_loss and objective.segment_weight:
            problems.append(f"segment_weight: expected 0 with lm_loss, found {objective.segment_weight}")
        if objective.lm_loss and self.drawing.composite_cut:
            problems.append(f"composite_cut: expected 0 with lm_loss, found {self.drawing.composite_cut}")
        if not 0 < self.background_share < 1:
            problems.append(f"background_share: expected a share between 0 and 1, found {self.background_share}")
        refuse(problems)

    def record(self) -> dict[str, Any]:
        return super().record() | {"mixture": "balanced"}


@dataclass(frozen=True, kw_only=True)
class AdapterTraining(Training):
    """How one adapter is trained on one task or several."""

    drawing: Drawing = Drawing(prompt_loss=False)
    lora: LoRA = LoRA()
    name: str
    """The adapter's name."""
    mixture: Literal["balanced", "natural"] = "natural"
    """Every task equally often, or as often as it has examples."""

    def __post_init__(self):
        super().__post_init__()
        refuse([] if is_name(self.name) else [f"name: expected {NAME}, found {self.name!r:.200}"])

    def record(self) -> dict[str, Any]:
        return super().record() | {"alpha": self.lora.numerator}


@dataclass(frozen=True, kw_only=True)
class Validating:
    """The validation split of each task, and how it is scored: the bank holds each adapter as it scored best."""

    validations: int = 8
    """Times a run that the held-out examples are scored."""
    validation_share: float = 0.05
    """Share of a task's examples that is the validation split: scored and not trained on ..."""
    validation_min: int = 8
    """... no fewer than these ..."""
    validation_max: int = 64
    """... and no more than these."""
    validation_composites: int = 0
    """So many composite problems of the validation split are scored, too; an adapter's score is then the mean of both:
    a task that is soon learnt by heart would else be kept as it was before it learnt to answer among others."""
    ema: float = 0.0
    """Decay of the EMA of each adapter's parameters that is scored and kept (0.97: about the last 30 steps); 0: score
    and keep what a step left."""

    def __post_init__(self):
        problems = at_least(1, validations=self.validations, validation_min=self.validation_min)
        problems += at_least(self.validation_min, validation_max=self.validation_max)
        if not 0 <= self.validation_share < 1:
            problems.append(f"validation_share: expected a share from 0 to below 1, found {self.validation_share}")
        if not 0 <= self.ema < 1:
            problems.append(f"ema: expected a decay from 0 to below 1, found {self.ema}")
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class BankTraining(Training):
    """How the adapters of a bank are trained, one a task."""

    drawing: Drawing = Drawing(prompt_loss=False)
    schedule: Schedule = Schedule(clip=1.0)
    lora: LoRA = LoRA()
    validating: Validating = Validating()
    tokens: int = 2_500_000
    """How often tasks are drawn: each for so many tokens, but ..."""
    epochs: float = 8.0
    """... none more than so many times over. Shares only: --steps says how long the run is."""

    def __post_init__(self):
        super().__post_init__()
        problems, composites = at_least(1, tokens=self.tokens), self.validating.validation_composites
        if composites < 0 or (composites and not self.data.composite):
            wanted = "0 or more" if self.data.composite else "0 where composite is 0"
            problems.append(f"validation_composites: expected {wanted}, found {composites}")
        refuse(problems + above_0(epochs=self.epochs))

    def record(self) -> dict[str, Any]:
        return super().record() | {"alpha": self.lora.numerator, "mixture": "balanced"}
