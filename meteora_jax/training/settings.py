"""How gates and adapters are trained: each setting is declared here once, with its help.

The library takes these classes and the command line shows them as they are. What is `Constant` in one belongs to its
recipe: a program may set it, the command line does not ask.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.gate_config import TokenRouterForm

if TYPE_CHECKING:
    from meteora_jax.training.loss import Remat

T = TypeVar("T")
Constant = tyro.conf.Suppress[tyro.conf.Fixed[T]]

RECOMPUTED: dict[str, Remat] = {"all": True, "dots": "dots", "none": False}


def at_least(settings: Any, lowest: dict[str, int]) -> list[str]:
    """What is wrong with some fields of `settings`, which are numbers from these on (or None)."""
    values = {name: (getattr(settings, name), n) for name, n in lowest.items()}
    return [f"{k}: expected at least {n}, found {x}" for k, (x, n) in values.items() if x is not None and x < n]


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
    composite_sizes: tuple[int, int] = (3, 3)
    """The fewest and the most tasks that one holds."""

    def __post_init__(self):
        refuse(at_least(self, {"batch_size": 1, "max_length": 2}))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How sequences are drawn and put into rows."""

    rows: int | None = None
    """Rows of the packed batch, instead of what batch size and mean length give."""
    packing: bool = True
    """Several sequences a row, each attending to itself alone; else one a row, padded."""
    prompt_loss: bool = True
    """Whether prompt tokens count in the loss."""
    composite_shots: int = 0
    """At most so many worked examples stand before a composite problem, any number as likely as another."""
    composite_cut: Constant[float] = 0.0
    """Share of the composites whose questions and answers are cut to their ends."""

    def __post_init__(self):
        refuse(at_least(self, {"rows": 1}))


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
        refuse(at_least(self, {"steps": 1, "accumulate": 1}))

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
    """Largest gradient norm."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What gates are trained towards: CE(next token) + beta * CE(gate logits, task id).

    lm_loss: without the first term a token router is trained by the second alone, and no layer runs. answer_share: what
    the answers' tokens together count in the second; as many as they are unless given. turn_share: the part of that
    which the first two tokens of each answer count by themselves. order: without the first term, the weight of telling
    the previous segment's task and the own segment's index.
    """

    beta: float = 0.0
    lm_loss: bool = True
    answer_share: float | None = None
    turn_share: float = 0.0
    order: float = 0.0

    def __post_init__(self):
        problems = []
        if self.answer_share is not None and not 0 <= self.answer_share <= 1:
            problems.append(f"answer_share: expected a share from 0 to 1, found {self.answer_share}")
        if not 0 <= self.turn_share <= 1 or (self.turn_share and self.answer_share is None):
            problems.append(f"turn_share: expected a share from 0 to 1 beside answer_share, found {self.turn_share}")
        if self.order < 0:
            problems.append(f"order: expected 0 or more, found {self.order}")
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

    @property
    def numerator(self) -> float:
        """`alpha`, whether given or not."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where a run keeps its checkpoints, TensorBoard scalars, log and pictures, and how often it saves."""

    run: Path | None = None
    """Folder of checkpoints, TensorBoard scalars, log.jsonl (a line a step) and pictures; OUT-run unless given."""
    save_every: int = 100
    """Steps between checkpoints."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder if there is one; --no-resume removes them and starts over."""
    keep: Constant[int] = 3
    """Checkpoints kept."""
    log: Constant[Path | None] = None
    """The log, without a run folder too."""

    def __post_init__(self):
        refuse(at_least(self, {"save_every": 1, "keep": 1}))

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

    def record(self) -> dict[str, Any]:
        """All settings by their names alone, as reports and checkpoints hold them."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Data | Drawing | Optimization | Schedule | Objective | LoRA | Validating):
                found |= vars(value)
            else:
                found[field.name] = vars(value) if isinstance(value, TokenRouterForm) else value
        return found | {"remat": self.optimization.recomputed}


@dataclass(frozen=True, kw_only=True)
class GateTraining(Training):
    """How gates are trained; `recipes.RECIPES` has the whole of each form, and the defaults are the original's.

    form: a token router, or None: MeteoRA's own gates. temperature: of the softmax over the chosen gates.
    adapter_learning_rate: the adapters' peak where they are trained beside the gates; the gates' unless given.
    """

    drawing: Constant[Drawing] = Drawing()
    schedule: Constant[Schedule] = Schedule()
    objective: Constant[Objective] = Objective(beta=50.0)
    form: Constant[TokenRouterForm | None] = None
    temperature: Constant[float] = 1.0
    adapter_learning_rate: Constant[float | None] = None
    top_k: int = 2
    """Adapters a token."""

    def __post_init__(self):
        problems, objective = [], self.objective
        if not objective.lm_loss and self.form is None:
            problems.append("lm_loss: expected a token router to go without it, found MeteoRA's own gates")
        if objective.answer_share is not None and self.drawing.prompt_loss:
            problems.append("answer_share: expected no prompt_loss beside it: what carries loss is then the answers")
        if objective.lm_loss and (objective.order or self.drawing.composite_cut):
            problems.append("order, composite_cut: expected no lm_loss beside them")
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

    def record(self) -> dict[str, Any]:
        return super().record() | {"alpha": self.lora.numerator}


@dataclass(frozen=True, kw_only=True)
class Validating:
    """What of each task is not trained on, and how it is scored: the bank holds each adapter as it scored best."""

    validations: int = 8
    """Times a run that the held-out examples are scored."""
    held_back: float = 0.05
    """Share of a task's examples that is scored and not trained on ..."""
    held_least: int = 8
    """... no fewer than these ..."""
    held_most: int = 64
    """... and no more than these."""
    held_composites: int = 0
    """So many composite problems of these examples are scored, too; an adapter's score is then the mean of both: a task
    that is soon learnt by heart would else be kept as it was before it learnt to answer among others."""
    average: float = 0.0
    """Score and keep each adapter's mean over steps, in which each counts so much of the next (0.97: about the last
    30), not what a step left; 0: that."""

    def __post_init__(self):
        problems = at_least(self, {"validations": 1, "held_least": 1, "held_most": self.held_least})
        if not 0 <= self.held_back < 1:
            problems.append(f"held_back: expected a share from 0 to below 1, found {self.held_back}")
        if not 0 <= self.average < 1:
            problems.append(f"average: expected a decay from 0 to below 1, found {self.average}")
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
        problems, composites = at_least(self, {"tokens": 1}), self.validating.held_composites
        if composites < 0 or (composites and not self.data.composite):
            wanted = "0 or more" if self.data.composite else "0 where composite is 0"
            problems.append(f"held_composites: expected {wanted}, found {composites}")
        if self.epochs <= 0:
            problems.append(f"epochs: expected more than 0, found {self.epochs}")
        refuse(problems)

    def record(self) -> dict[str, Any]:
        return super().record() | {"alpha": self.lora.numerator, "mixture": "balanced"}
