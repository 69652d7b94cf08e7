"""Sequences to batches.

Sequences are drawn, shuffled and packed by Grain; every batch of a run has one shape. Several sequences share a
row, each with positions of its own and attention to itself alone, so packing changes no loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from meteora_jax.config import InputError
from meteora_jax.examples import Example, as_text
from meteora_jax.sharding import local_rows
from meteora_jax.training.sequences import (
    NO_TASK,
    SYSTEM_PROMPTS,
    TURNS,
    Tokenized,
    compose,
    converse,
    encode_all,
    shortened,
    takes,
)
from pallas_kernels.paged_attention import EMPTY

WIDTH_STEP = 64  # a row's width is a multiple of this
FILL = 0.95  # the share of a row that packing fills, measured on the BIG-bench tasks; a guess good enough for `rows`
THREADS = 8  # that draw sequences; the tokenizer lets others work meanwhile
DRAWS = 100  # composites drawn before none is said to fit
MORE_DRAWS = 100_000  # once some are known to fit, so that no run ends because many in a row do not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of sequences, padded on the right; all arrays are [B, T].

    tokens int32; positions int32, each token's place in its own sequence, EMPTY for padding; segments int32, which
    sequence of its row a token belongs to (from 1); loss bool; tasks int32.
    """

    tokens: Any
    positions: Any
    segments: Any
    loss: Any
    tasks: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """The one shape of a run's batches: `rows` x `width` tokens, in `shards` parts that are drawn independently.

    A host draws the shards whose rows its devices hold, so a run may go on with other hosts.
    """

    rows: int
    width: int
    shards: int
    packing: bool


def collate(sequences: Sequence[Tokenized], width: int | None = None) -> Batch:
    """One sequence a row, padded on the right to `width` (the longest, rounded up, unless given)."""
    width = width or rounded(max(len(s.tokens) for s in sequences))
    batch = _empty((len(sequences), width))
    for b, s in enumerate(sequences):
        n = len(s.tokens)
        batch.tokens[b, :n], batch.tasks[b, :n], batch.loss[b, :n] = s.tokens, s.tasks, s.loss
        batch.positions[b, :n], batch.segments[b, :n] = np.arange(n), 1
    return batch


def rounded(length: int) -> int:
    """The width of a row that holds so many tokens."""
    return -(-length // WIDTH_STEP) * WIDTH_STEP


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Where a run's sequences come from.

    tasks: {name: training examples}. labels: the adapter of each task, int. composite: share of the sequences that
    hold several tasks, composite_sizes (from, to) of them, behind at most composite_shots worked examples, a share
    composite_cut of these with each example cut to CUT; conversations: share of these that the chat template writes, a
    turn a task, where the tokenizer has one. balanced: every task equally often, else as often as it
    has examples; shares {name: float}: as often as they say, inside composites too. samples_per_task: a random choice
    of so many examples of each. max_length: longer sequences are passed over.
    """

    tasks: Mapping[str, Sequence[Example]]
    labels: Mapping[str, int]
    tokenizer: Any
    end: int
    max_length: int
    prompt_loss: bool
    composite: float = 0.0
    mixture: Literal["balanced", "natural"] = "balanced"
    samples_per_task: int | None = None
    seed: int = 0
    shares: Mapping[str, float] | None = None
    composite_sizes: tuple[int, int] = (3, 3)
    composite_shots: int = 0
    composite_cut: float = 0.0
    conversations: float = 0.0

    def __post_init__(self):
        empty = [n for n in self.labels if not self.tasks.get(n)]
        if empty:
            raise InputError(f"tasks: expected training examples for every adapter, found none for {', '.join(empty)}")
        for key in ("composite", "composite_cut", "conversations"):
            if not 0 <= getattr(self, key) <= 1:
                raise InputError(f"{key}: expected a share between 0 and 1, found {getattr(self, key)}")
        low, high = self.composite_sizes
        if not 1 <= low <= high:
            raise InputError(f"composite_sizes: expected two numbers from 1 on, found {low} and {high}")
        if self.composite_shots < 0:
            raise InputError(f"composite_shots: expected 0 or more, found {self.composite_shots}")
        if self.samples_per_task is not None and self.samples_per_task < 1:
            raise InputError(f"samples_per_task: expected at least 1, found {self.samples_per_task}")

    def chosen(self) -> dict[str, list[tuple[Example, Tokenized]]]:
        """Each task's examples that training may draw, with their sequences; none is longer than max_length."""
        chosen = {}
        for i, (name, label) in enumerate(self.labels.items()):
            examples = list(self.tasks[name])
            if self.samples_per_task is not None and len(examples) > self.samples_per_task:
                rng = np.random.default_rng([self.seed, i])
                examples = [examples[j] for j in sorted(rng.permutation(len(examples))[: self.samples_per_task])]
            sequences = encode_all(examples, label, self.tokenizer, self.end, prompt_loss=self.prompt_loss)
            chosen[name] = [
                (e, s) for e, s in zip(examples, sequences, strict=True) if len(s.tokens) <= self.max_length
            ]
        none = [n for n, pairs in chosen.items() if not pairs]
        if none:
            raise InputError(
                f"max_length: expected room for an example of every task, found none for {', '.join(none)}"
            )
        return chosen

    def draw_composite(
        self, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]], rng: Any, limit: int, draws: int = DRAWS
    ) -> Tokenized:
        """What `several_of` gives, at most `limit` tokens; longer ones are drawn again.

        Raises:
            InputError: so many draws in a row were longer.
        """
        for _ in range(draws):
            s = self.several_of(chosen, rng)
            if len(s.tokens) <= limit:
                return s
        low = self.composite_sizes[0]
        wanted = f"expected room for {low} tasks or more in one sequence of {limit} tokens"
        raise InputError(f"max_length: {wanted}, found none among {draws} drawn")

    def several_of(self, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]], rng: Any) -> Tokenized:
        """A `composite_of` or, as often as `conversations` says and if the chat template can, a `conversation_of`."""
        share = self.conversations if takes(self.tokenizer, *(["user", "assistant"] * 2)) else 0.0
        talks = share and rng.random() < share
        return self.conversation_of(chosen, rng) if talks else self.composite_of(chosen, rng)

    def composite_of(self, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]], rng: Any) -> Tokenized:
        """Several tasks (fewer if there are fewer) in one sequence, however long."""
        low, high = self.composite_sizes

        def example(name: str) -> Example:
            return chosen[name][int(rng.integers(len(chosen[name])))][0]

        size = low if low == high else int(rng.integers(low, high + 1))
        shots = int(rng.integers(self.composite_shots + 1)) if self.composite_shots else 0
        picked = self._picked(size, rng)
        parts = [(example(n), self.labels[n]) for n in picked]
        worked = [[example(n) for n in picked] for _ in range(shots)]
        if self.composite_cut and rng.random() < self.composite_cut:
            parts, worked = [(shortened(e), label) for e, label in parts], [[shortened(e) for e in w] for w in worked]
        parts = [(as_text(e, self.tokenizer), label) for e, label in parts]
        worked = [[as_text(e, self.tokenizer) for e in shot] for shot in worked]
        return compose(parts, self.tokenizer, self.end, prompt_loss=self.prompt_loss, shots=worked)

    def conversation_of(self, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]], rng: Any) -> Tokenized:
        """One to TURNS tasks, each asked and answered in a turn of a conversation, however long."""
        picked = self._picked(int(rng.integers(1, TURNS + 1)), rng)
        parts = [(chosen[n][int(rng.integers(len(chosen[n])))][0], self.labels[n]) for n in picked]
        if self.composite_cut and rng.random() < self.composite_cut:
            parts = [(shortened(e), label) for e, label in parts]
        at = int(rng.integers(3 * len(SYSTEM_PROMPTS)))  # a third begins with one, where the template takes it
        begins = at < len(SYSTEM_PROMPTS) and takes(self.tokenizer, "system", "user", "assistant")
        system = SYSTEM_PROMPTS[at] if begins else None
        return converse(parts, self.tokenizer, self.end, prompt_loss=self.prompt_loss, system=system)

    def _picked(self, size: int, rng: Any) -> list[str]:
        """So many tasks, or all, in random order."""
        names = list(self.labels)
        p = None if self.shares is None else np.asarray([self.shares[n] for n in names]) / sum(self.shares.values())
        return [names[i] for i in rng.choice(len(names), size=min(size, len(names)), replace=False, p=p)]


def plan(
    mixture: Mixture,
    chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]],
    batch_size: int,
    *,
    packing: bool,
    multiple: int,
    shards: int,
    rows: int | None = None,
) -> Layout:
    """The layout of batches that hold `batch_size` sequences (packed: on average).

    The width is the longest sequence's, at most max_length; `rows` (what batch_size needs, unless given) are rounded up
    to a multiple of `multiple` and of `shards`.
    """
    lengths = {name: [len(s.tokens) for _, s in pairs] for name, pairs in chosen.items()}
    every = list(itertools.chain(*lengths.values()))
    longest = max(every)
    if mixture.shares is not None:
        mean = np.average([np.mean(n) for n in lengths.values()], weights=[mixture.shares[n] for n in lengths])
    else:
        mean = np.mean(every) if mixture.mixture == "natural" else np.mean([np.mean(n) for n in lengths.values()])
    if mixture.composite > 0:
        rng = np.random.default_rng(mixture.seed)
        drawn = [len(mixture.draw_composite(chosen, rng, mixture.max_length).tokens) for _ in range(64)]
        longest = max(longest, min(mixture.max_length, 2 * max(drawn)))
        mean = (1 - mixture.composite) * mean + mixture.composite * np.mean(drawn)
    width = rounded(longest)
    if rows is None:
        rows = int(np.ceil(batch_size * float(mean) / (FILL * width))) if packing else batch_size
    multiple = int(np.lcm(multiple, shards))
    return Layout(-(-rows // multiple) * multiple, width, shards, packing)


def own_shards(layout: Layout, mesh: Mesh | None) -> list[int]:
    """The shards whose rows lie on this host's devices."""
    own = local_rows(mesh, layout.rows)
    return sorted({row * layout.shards // layout.rows for row in own})


class Batches(Iterator[Batch]):
    """Endless batches of one layout; `position` is where they are, and `seek` goes there.

    Rows of shards other than `mine` are left empty: another host fills them.
    """

    def __init__(
        self,
        mixture: Mixture,
        chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]],
        layout: Layout,
        mine: Iterable[int] | None = None,
    ):
        self._layout = layout
        mine = range(layout.shards) if mine is None else mine
        self._streams = {shard: iter(_stream(mixture, chosen, layout, shard)) for shard in mine}

    def __next__(self) -> Batch:
        rows = self._layout.rows // self._layout.shards
        whole = _empty((self._layout.rows, self._layout.width))
        for shard, stream in self._streams.items():
            part = next(stream)
            at = slice(shard * rows, (shard + 1) * rows)
            segments = part["tokens_segment_ids"]
            whole.tokens[at], whole.loss[at], whole.tasks[at] = part["tokens"], part["loss"], part["tasks"]
            whole.segments[at] = segments
            whole.positions[at] = np.where(segments > 0, part["tokens_positions"], EMPTY)
        return whole

    def position(self) -> dict[int, str]:
        """{shard: where its stream is}, as text."""
        return {shard: json.dumps(stream.get_state()) for shard, stream in self._streams.items()}

    def seek(self, position: Mapping[int, str]) -> None:
        """Goes on where `position` was taken."""
        for shard, stream in self._streams.items():
            stream.set_state(json.loads(position[shard]))


def _empty(shape: tuple[int, int]) -> Batch:
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, tasks = np.full(shape, EMPTY, np.int32), np.full(shape, NO_TASK, np.int32)
    return Batch(tokens, positions, segments, np.zeros(shape, bool), tasks)


def _features(s: Tokenized) -> dict[str, np.ndarray]:
    return {"tokens": s.tokens, "loss": s.loss, "tasks": s.tasks}


def _stream(
    mixture: Mixture, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]], layout: Layout, shard: int
) -> Any:
    """One shard's batches of rows, as Grain makes them."""
    import grain
    from grain.experimental import FirstFitPackIterDataset

    def endless(pairs: Sequence[tuple[Example, Tokenized]], seed: int) -> Any:
        own = pairs[shard :: layout.shards] or pairs  # a task of few examples is whole in every shard
        source = grain.MapDataset.source([_features(s) for _, s in own])
        return source.seed(seed).shuffle().repeat(None)

    first = 1000 * (1000 * mixture.seed + shard)
    if mixture.mixture == "balanced" or mixture.shares is not None:
        singles = [endless(pairs, first + i) for i, pairs in enumerate(chosen.values(), 1)]
        weights = None if mixture.shares is None else [mixture.shares[name] for name in chosen]
        sequences = grain.MapDataset.mix(singles, weights) if len(singles) > 1 else singles[0]
    else:
        sequences = endless(list(itertools.chain(*chosen.values())), first + 1)
    if mixture.composite > 0:
        limit = min(mixture.max_length, layout.width)

        def draw(_: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            return _features(mixture.draw_composite(chosen, rng, limit, MORE_DRAWS))

        composites = grain.MapDataset.range(1 << 30).seed(first).random_map(draw)
        share = mixture.composite
        sequences = grain.MapDataset.mix([sequences, composites], [1 - share, share]) if share < 1 else composites
    # a step of a token router's training takes less long than the composites of its batch in one thread
    stream = sequences.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * THREADS))
    rows, width = layout.rows // layout.shards, layout.width
    if layout.packing:
        stream = FirstFitPackIterDataset(
            stream,
            length_struct=dict.fromkeys(("tokens", "loss", "tasks"), width),
            num_packing_bins=rows,
            shuffle_bins=False,
            padding_struct={"tokens": 0, "loss": False, "tasks": NO_TASK},
        )
    else:
        stream = stream.map(lambda s: _alone(s, width))
    return stream.batch(rows)


def _alone(features: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """A sequence as the only one of its row, in the packer's terms."""
    batch = collate([Tokenized(features["tokens"], features["loss"], features["tasks"])], width)
    return {
        "tokens": batch.tokens[0], "loss": batch.loss[0], "tasks": batch.tasks[0],
        "tokens_segment_ids": batch.segments[0], "tokens_positions": batch.positions[0],
    }  # fmt: skip
