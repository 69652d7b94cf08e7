"""The index of a pool: profiles of adapters, and the k adapters whose profiles fit a request best."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from meteora_jax.config import InputError, read_json
from meteora_jax.io.files import refuse_foreign, whole_folder, write_json
from meteora_jax.retriever.calibration import calibrate
from meteora_jax.retriever.features import SKETCH, Encoder, Features
from meteora_jax.retriever.named_scorings import make_scoring
from meteora_jax.retriever.ranking import FILE as RANKING
from meteora_jax.retriever.scoring import Profile, is_large
from meteora_jax.retriever.wording import NO_FRAME, Frame, Wording, shared_frame
from meteora_jax.text import check_text

FORMAT = "meteora-index-1"
INSTRUCTION = "Represent the sentence for similar task retrieval: "  # LoraRetriever's own (section 3.2)
MOST_INPUTS = 20  # an adapter's profile; the paper used up to that many
VECTORS, FIT, ENCODER = "vectors.safetensors", "fit.safetensors", "encoder"
LOG = logging.getLogger(__name__)


class Retrieved(NamedTuple):
    """What a query found: for each request its k adapters, best first, and their similarities float32 [B, k]."""

    names: list[tuple[str, ...]]
    similarities: np.ndarray


def check_replaced(folder: str | os.PathLike[str]) -> None:
    """Refuses to replace a folder that is no index or holds other files than an index's. Raises InputError so."""
    refuse_foreign(folder, "index.json", ENCODER, FIT, VECTORS, RANKING)


def check_profile(name: object, inputs: object) -> list[str]:
    """What is wrong with a profile, one line each."""
    if not isinstance(name, str) or not name:
        return [f"profiles: expected an adapter's name, found {name!r}"]
    where, problems = f"profile {name!r}", text_problems([name], lambda _: f"profile {name!r}: name")
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
        found = "a single text" if isinstance(inputs, str) else type(inputs).__name__
        return [*problems, f"{where}: expected 1 to {MOST_INPUTS} inputs, found {found}"]
    if not 1 <= len(inputs) <= MOST_INPUTS:
        problems.append(f"{where}: expected 1 to {MOST_INPUTS} inputs, found {len(inputs)}")
    return problems + text_problems(inputs, lambda i: f"{where}: input {i}")


def text_problems(texts: Sequence[object], where: Callable[[int], str]) -> list[str]:
    """What is wrong with texts, one line each: no text at all, a blank one, one that UTF-8 cannot hold."""
    problems = []
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{where(i)}: expected a text, found {text!r:.60}")
            continue
        try:
            check_text(text, where(i))
        except InputError as e:
            problems += e.problems
    return problems


def spread(inputs: Sequence[str], most: int = MOST_INPUTS) -> list[str]:
    """At most `most` different texts, evenly spread over a training file's inputs."""
    different = list(dict.fromkeys(text for text in inputs if text.strip()))
    count = min(most, len(different))
    return [different[i * len(different) // count] for i in range(count)]


class Index:
    """Profiles of adapters under one scoring.

    Words are compared without the frame that all profiles' inputs have ("[INST] ... [/INST]"), which says nothing
    of an adapter. Adapters may be added and removed at any time; what was computed for the others stays, unless the
    frame changes. Whatever a scoring has to learn from the pool it learns at the next query or when the index is
    saved; the folder keeps a regression, so that loading it learns nothing. The default scoring is "hybrid" with an
    encoder, "lexical" without: those that retrieve best (docs/results.md). Beyond 12,000 inputs (bare ones
    included; `large`) their regression gives way to means under the same kernel, at a price in accuracy. `SCORINGS`
    lists all by name.

    Examples:
        >>> index = mj.Index.build({"winowhy": ["Who does he mean?"], "strategyqa": ["Would a pear sink?"]})
        >>> index.add({"object_counting": ["I have two plums. How many fruits do I have?"]})
        >>> index.save("runs/my-index")
        >>> names, similarities = mj.Index.load("runs/my-index").query(["Would a stone sink?"], k=2)
    """

    def __init__(self, scoring: str | None = None, encoder: Encoder | None = None, instruction: str = ""):
        check_text(instruction, "instruction")
        self.scoring = scoring or ("hybrid" if encoder is not None else "lexical")
        self.instruction, self.encoder = instruction, encoder
        self._scoring = make_scoring(self.scoring)
        if self._scoring.needs_encoder and encoder is None:
            raise InputError(f"scoring {self.scoring!r}: expected an encoder, found none")
        self._profiles: dict[str, Profile] = {}
        self._frame = NO_FRAME
        self._fitted = self._calibrated = False
        self._threshold: float | None = None
        self._saved_fit: tuple[Path, dict[str, np.ndarray]] | None = None  # read, not yet compared with the pool

    @classmethod
    def build(
        cls,
        profiles: Mapping[str, Sequence[str]],
        scoring: str | None = None,
        encoder: Encoder | None = None,
        instruction: str = "",
    ) -> Index:
        """An index of {adapter: 1 to 20 inputs}; a sentence that describes the adapter counts as an input.

        Args:
            scoring: a name of `SCORINGS`, or several with "+" between them.
            encoder: for the scorings that compare vectors.
            instruction: stands before every text that the encoder reads; the paper's is `INSTRUCTION`.

        Raises:
            InputError: bad profiles (all of them), an unknown scoring, a scoring without its encoder.
        """
        index = cls(scoring, encoder, instruction)
        index.add(profiles)
        return index

    def __repr__(self) -> str:
        named, count = self.names[:4], len(self.names)
        more = f" and {count - len(named)} more" if count > len(named) else ""
        shown = f": {', '.join(named)}{more}" if named else ""
        return f"Index({count} adapters{shown}; scoring {self.scoring}{', encoder' if self.encoder else ''})"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order they were added."""
        return tuple(self._profiles)

    @property
    def large(self) -> bool:
        """Whether the scoring has a regression that the pool is too large for: its kernel's means then score."""
        return self._scoring.uses_bare and is_large(list(self._profiles.values()))

    @property
    def profiles(self) -> dict[str, tuple[str, ...]]:
        """{adapter: its inputs}."""
        return {name: profile.inputs.texts for name, profile in self._profiles.items()}

    def add(self, profiles: Mapping[str, Sequence[str]]) -> None:
        """Adds adapters, all or none. Raises InputError for bad profiles and for names that are there already."""
        if not isinstance(profiles, Mapping):
            raise InputError(f"profiles: expected {{adapter: [inputs]}}, found {type(profiles).__name__}")
        problems = [p for name, inputs in profiles.items() for p in check_profile(name, inputs)]
        problems += [
            f"profile {n!r}: expected a new adapter, found it in the index" for n in profiles if n in self.names
        ]
        if problems:
            raise InputError(problems)
        added = {name: self._profile(self._features(inputs)) for name, inputs in profiles.items()}
        if self._scoring.needs_encoder and added:
            self._encode([p.inputs for p in added.values()])
        self._changed(self._profiles | added)

    def _changed(self, profiles: dict[str, Profile]) -> None:
        """Takes profiles, compared without the frame that all of them have."""
        frame = shared_frame([p.inputs.texts for p in profiles.values()])
        if frame != self._frame:
            self._frame = frame
            known = {name: p.inputs for name, p in profiles.items()}
            profiles = {n: self._profile(self._features(f.texts, f.computed_vectors)) for n, f in known.items()}
        self._profiles = profiles
        self._fitted, self._calibrated, self._saved_fit = False, False, None

    def _profile(self, inputs: Features) -> Profile:
        wording = Wording(inputs.insides, least=2)
        bare = [text for text in map(wording.remove, inputs.insides) if text] if self._scoring.uses_bare else []
        return Profile(inputs, self._features(bare))

    def _features(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Features:
        return Features(texts, self.encoder, self.instruction, vectors, self._frame)

    def _encode(self, features: Sequence[Features]) -> None:
        """One call for all texts: the encoder sorts them into batches of like length."""
        assert self.encoder is not None
        texts = [text for f in features for text in f.texts]
        vectors = Features(texts, self.encoder, self.instruction).vectors()
        bounds = np.cumsum([len(f) for f in features])[:-1]
        for f, part in zip(features, np.split(vectors, bounds), strict=True):
            f.computed_vectors = part

    def remove(self, names: Sequence[str]) -> None:
        """Removes adapters, all or none. Raises InputError for names that are not there."""
        if isinstance(names, str):
            raise InputError(f"remove: expected a list of names, found the single text {names!r}")
        if unknown := [n for n in names if n not in self._profiles]:
            raise InputError([f"remove: expected an adapter of the index, found {n!r}" for n in unknown])
        self._changed({n: p for n, p in self._profiles.items() if n not in set(names)})

    @property
    def threshold(self) -> float | None:
        """The similarity below which a request is no adapter's, as `calibration` finds it: once for the pool as it is.

        None: of a folder of before there were any, or where an adapter has but one input.
        """
        if not self._calibrated:
            pool = list(self._profiles.values())
            self._threshold = calibrate(pool, functools.partial(make_scoring, self.scoring), self._profile)
            self._calibrated = True
        return self._threshold

    def fit(self) -> None:
        """Makes the scoring ready for the pool as it is; a query does it by itself when adapters came or went.

        What the folder of a loaded index keeps stands in for it, unless that is of other inputs or settings: then a
        warning is logged.
        """
        if not self._profiles:
            raise InputError("index: expected at least one adapter, found none")
        if self._fitted:
            return
        pool, saved = list(self._profiles.values()), self._saved_fit
        if saved is None or not self._scoring.restore(pool, saved[1]):
            if saved is not None:
                found = "that of others" if saved[1] else "none"
                LOG.warning("%s: expected the fit of these profiles, found %s: fitting again", saved[0], found)
            self._scoring.fit(pool)
        self._fitted, self._saved_fit = True, None

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [B, A]: every adapter's similarity to every text, adapters in the order of `names`.

        Raises:
            InputError: a single text instead of a list; texts that are blank, or that UTF-8 cannot hold.
        """
        if isinstance(texts, str | bytes):
            raise InputError("query: expected a list of texts, found a single text")
        texts = list(texts)
        if problems := text_problems(texts, lambda i: f"query: text {i}"):
            raise InputError(problems)
        self.fit()
        return self._scoring.score(self._features(texts)) if texts else np.zeros((0, len(self.names)), np.float32)

    def query(self, texts: Sequence[str], k: int = 3, exclude: Sequence[Collection[str]] | None = None) -> Retrieved:
        """The k most similar adapters of each text, best first; exact, ties to the one added first.

        Where there are fewer than k adapters all of them are found.

        Args:
            texts: B requests. k: adapters of each.
            exclude: for each text the adapters that it must not get (out-of-distribution evaluation, permissions).

        Returns:
            names (B tuples of k) and similarities float32 [B, k], of no unit: larger is more alike.

        Raises:
            InputError: a text may have no adapter at all, an excluded name is unknown, texts that `scores` refuses.
        """
        return top(self.scores(texts), self.names, k, exclude)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes INDEX/, fitted, whole or not at all; an existing one, its ranking included, is replaced only once the
        new one is complete.

        Raises:
            InputError: what is there is no index, or holds other files than an index's.
        """
        folder = Path(folder)
        check_replaced(folder)
        profiles = self._profiles.items()
        description = {
            "format": FORMAT, "scoring": self.scoring, "instruction": self.instruction,
            "encoder": self.encoder is not None, "threshold": self.threshold, "frame": self._frame,
            "adapters": [{"name": n, "inputs": list(p.inputs.texts), "bare": list(p.bare.texts)} for n, p in profiles],
        }  # fmt: skip
        if self._profiles:
            self.fit()
        with whole_folder(folder) as new:
            write_json(new / "index.json", description)
            if self.encoder is not None:
                self.encoder.save(new / ENCODER)
            parts = [v for _, p in profiles if (v := p.inputs.computed_vectors) is not None]
            kept = {"vectors": np.concatenate(parts).astype(np.float32)} if len(parts) == len(profiles) > 0 else {}
            if self.large:
                kept["sketches"] = np.stack([p.sketch for _, p in profiles if p.sketch is not None])
            if kept:
                (new / VECTORS).write_bytes(save(kept))  # save_file's are for their owner's eyes alone
            if self._profiles and (fitted := self._scoring.fitted()):
                (new / FIT).write_bytes(save({key: np.ascontiguousarray(value) for key, value in fitted.items()}))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Index:
        """Reads INDEX/. Raises InputError when it is missing, damaged, or of another format."""
        folder = Path(folder)
        source = str(folder / "index.json")
        raw = read_json(folder / "index.json")
        try:
            if raw["format"] != FORMAT:
                raise InputError(f"{source}: format: expected {FORMAT!r}, found {raw['format']!r}")
            listed = [(a["name"], tuple(a["inputs"]), tuple(a["bare"])) for a in raw["adapters"]]
            scoring, instruction, has_encoder = str(raw["scoring"]), str(raw["instruction"]), bool(raw["encoder"])
            threshold = None if raw.get("threshold") is None else float(raw["threshold"])
            before, behind = map(str, raw.get("frame", NO_FRAME))
        except (KeyError, TypeError, ValueError) as e:
            raise InputError(f"{source}: expected an index's description, found a malformed one ({e!r})") from e
        problems = [f"{source}: {p}" for name, inputs, _ in listed for p in check_profile(name, inputs)]
        if len({name for name, _, _ in listed}) < len(listed):
            problems.append(f"{source}: adapters: expected different names, found one twice")
        if problems:
            raise InputError(problems)
        encoder = None
        if has_encoder:
            from meteora_jax.retriever.encoder import TextEncoder

            encoder = TextEncoder.load(folder / ENCODER)
        index = cls(scoring, encoder, instruction)
        index._frame = Frame(before, behind)
        index._profiles = {n: Profile(index._features(i), index._features(b)) for n, i, b in listed}
        if (folder / VECTORS).exists():
            index._restore_vectors(folder / VECTORS)
        fit = folder / FIT
        index._saved_fit = fit, _read_tensors(fit) if fit.exists() else {}
        index._threshold, index._calibrated = threshold, True
        if "threshold" not in raw:
            LOG.warning(
                "%s: no threshold: no request is too unlike for adapters; one comes with `meteora index build`", folder
            )
        return index

    def _restore_vectors(self, path: Path) -> None:
        """Reads what was saved with the texts: vectors [inputs, D], sketches [adapters, SKETCH], either or both."""
        features = [p.inputs for p in self._profiles.values()]
        total = sum(len(f) for f in features)
        kept = _read_tensors(path)
        if strange := sorted(kept.keys() - {"vectors", "sketches"}):
            raise InputError(f"{path}: expected vectors and sketches, found {', '.join(strange)}")
        if (vectors := kept.get("vectors")) is not None:
            if vectors.ndim != 2 or len(vectors) != total:
                raise InputError(f"{path}: vectors: expected {total} rows (the inputs), found shape {vectors.shape}")
            bounds = np.cumsum([len(f) for f in features])[:-1]
            for f, part in zip(features, np.split(vectors, bounds), strict=True):
                f.computed_vectors = part
        if (sketches := kept.get("sketches")) is not None:
            if sketches.shape != (len(features), SKETCH):
                expected = (len(features), SKETCH)
                raise InputError(f"{path}: sketches: expected shape {expected}, found {sketches.shape}")
            for p, row in zip(self._profiles.values(), sketches, strict=True):
                p.sketch = row


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: expected a complete safetensors file, found none ({e})") from None


def top(
    scores: np.ndarray, names: Sequence[str], k: int, exclude: Sequence[Collection[str]] | None = None
) -> Retrieved:
    """The k largest of each row of `scores` float32 [B, A], largest first; ties go to the lowest index.

    A row that has fewer, all others excluded, gets those, and -inf for the similarities that it lacks.
    """
    if k < 1:
        raise InputError(f"k: expected at least 1, found {k}")
    if exclude is not None:
        if isinstance(exclude, str) or any(isinstance(row, str) for row in exclude):
            raise InputError("exclude: expected a collection of names for each text, found a single text")
        if len(exclude) != len(scores):
            raise InputError(f"exclude: expected {len(scores)} collections (one a text), found {len(exclude)}")
        places = {name: i for i, name in enumerate(names)}
        if unknown := {n for row in exclude for n in row} - places.keys():
            raise InputError([f"exclude: expected an adapter of the index, found {n!r}" for n in sorted(unknown)])
        scores = scores.copy()
        for row, gone in zip(scores, exclude, strict=True):
            row[[places[n] for n in gone]] = -np.inf
    left = (scores > -np.inf).sum(axis=1)
    if not left.all():
        raise InputError(f"exclude: expected an adapter that text {int(np.argmin(left))} may have, found all excluded")
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, int(left.max(initial=0)))]
    similarities = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    rows = zip(order, left, strict=True)
    chosen: list[tuple[str, ...]] = [tuple(str(names[i]) for i in row[:count]) for row, count in rows]
    return Retrieved(chosen, similarities)
