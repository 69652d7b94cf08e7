"""The training data of the demo's adapters: examples alone and inside composite problems, held-back slices, batches."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from meteora_jax.evaluation.composite import answer_pieces, prompt_pieces
from meteora_jax.evaluation.tasks import Example

END = "<|im_end|>"  # ends a response
IGNORED = -100  # the label of tokens outside the loss
VALIDATION_EXAMPLES, VALIDATION_SHARE = 160, 0.1  # held back from the train split, whichever is fewer
COMPOSITE_EVERY = 4  # batches: one of them has composite problems,
COMPOSITE_TASKS = 3  # of so many tasks,
BATCH_TOKENS = 8192  # padded, at most: eight trainings share one GPU's memory


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text without special tokens (`tokenizer.ggml.add_bos_token` is false)."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_example(tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids (with the end token); apart, as generation sees the prompt alone."""
    return encode(tokenizer, example.prompt), [*encode(tokenizer, example.response), tokenizer.eos_token_id]


def varied(task: str, example: Example, rng: random.Random) -> Example:
    """The same problem, its choice lines (object_counting: its list of objects) in another order, so that places
    cannot be learned by heart."""

    def choices(block: re.Match) -> str:
        lines = block[0].splitlines(keepends=True)
        return "".join(rng.sample(lines, len(lines)))

    def objects(listing: re.Match) -> str:
        *others, last = rng.sample(names := [*listing[1].split(", "), listing[2]], len(names))
        return f"I have {', '.join(others)}, and {last}. How many"

    if task == "object_counting":
        return replace(example, prompt=re.sub(r"I have (.*), and (.*)\. How many", objects, example.prompt))
    return replace(example, prompt=re.sub(r"(?:^ *choice: .*\n)+", choices, example.prompt, flags=re.MULTILINE))


def hold_back(examples: Sequence[Example], rng: random.Random) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those to validate on: a random cut, which is how the test split was made. Like it,
    it shares contexts and near-duplicates with what is trained on, so it tells learning by heart from learning."""
    shuffled = rng.sample(examples, len(examples))
    held = min(VALIDATION_EXAMPLES, int(VALIDATION_SHARE * len(examples)))
    return shuffled[held:], shuffled[:held]


@dataclass(frozen=True)
class Encoded:
    """Tokens [T], and labels [T]: those tokens again where they carry loss, else IGNORED."""

    tokens: list[int]
    labels: list[int]


def single(tokenizer, example: Example) -> Encoded:
    """The example alone, loss on the response."""
    prompt, response = encode_example(tokenizer, example)
    return Encoded(prompt + response, [IGNORED] * len(prompt) + response)


def composite(tokenizer, example: Example, others: Sequence[Example], rng: random.Random) -> Encoded:
    """The example among other tasks' in a composite problem. The loss is on what follows the example's own tokens,
    which is what its adapter is asked for when every token has its task's adapter: its answer line but not the line's
    number, and then the next line's number, or the end."""
    examples = rng.sample([example, *others], 1 + len(others))
    own = examples.index(example)
    tokens: list[int] = []
    labels: list[int] = []
    previous_own = False
    asked = [piece for piece, _ in prompt_pieces(examples)]
    for pieces, answers in ((asked, False), (answer_pieces(examples), True)):
        for i, piece in enumerate(pieces):
            ids = encode(tokenizer, piece)
            first, rest = (previous_own and answers), (i == own and answers)
            tokens += ids
            labels += [ids[0] if first else IGNORED, *(ids[1:] if rest else [IGNORED] * (len(ids) - 1))]
            previous_own = i == own
    tokens.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id if previous_own else IGNORED)
    return Encoded(tokens, labels)


def composites(
    task: str,
    tokenizer,
    examples: Iterator[Example],
    others: dict[str, list[Example]],
    max_length: int,
    rng: random.Random,
) -> Iterator[Encoded]:
    """Composite problems of the task's examples and of two other tasks', those that are short enough."""
    for example in examples:
        picked = [
            varied(other, rng.choice(others[other]), rng) for other in rng.sample(sorted(others), COMPOSITE_TASKS - 1)
        ]
        sequence = composite(tokenizer, varied(task, example, rng), picked, rng)
        if len(sequence.tokens) <= max_length:
            yield sequence


def endless_batches(
    task: str,
    tokenizer,
    examples: Sequence[Example],
    others: dict[str, list[Example]],
    batch_size: int,
    max_length: int,
    rng: random.Random,
) -> Iterator[list[Encoded]]:
    """Batches of sequences of like length, every example once an epoch, in another order each time; every fourth
    batch is of composite problems, which go round the examples on their own."""

    def endless() -> Iterator[Example]:
        while True:
            yield from rng.sample(examples, len(examples))

    alone = (single(tokenizer, varied(task, example, rng)) for example in endless())
    among = composites(task, tokenizer, endless(), others, max_length, rng)
    while True:
        # sorted by length within a pool only, or the batches would always be the same
        singles = [next(alone) for _ in range(4 * (COMPOSITE_EVERY - 1) * batch_size)]
        batches = cut(singles, batch_size)
        problems = [next(among) for _ in range(2 * batch_size)]
        composite_batches = cut(problems, batch_size)
        batches += rng.sample(composite_batches, min(len(composite_batches), len(batches) // (COMPOSITE_EVERY - 1)))
        rng.shuffle(batches)
        yield from batches


def cut(sequences: Sequence[Encoded], batch_size: int) -> list[list[Encoded]]:
    """Batches of sequences of like length, of at most `batch_size` sequences and BATCH_TOKENS padded tokens."""
    batches: list[list[Encoded]] = [[]]
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.tokens)):
        if len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * len(sequence.tokens) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(sequence)
    return [batch for batch in batches if batch]


def collate(tokenizer, batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens and labels [B, T], padded on the right; and the real tokens' count."""
    T = max(len(sequence.tokens) for sequence in batch)
    tokens = torch.full((len(batch), T), tokenizer.pad_token_id)
    labels = torch.full((len(batch), T), IGNORED)
    for row, sequence in enumerate(batch):
        tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
    return tokens, labels, sum(len(sequence.tokens) for sequence in batch)
