"""Which model a base is, as far as its source said so: what tells bases of one shape apart.

A name is compared without its organisation or folder, case, separators, and what says only how numbers are stored:
`unsloth/Meta-Llama-3-8B-bnb-4bit`, `meta-llama/Llama-3-8B` and `Llama-3-8B.Q4_K_M.gguf` are one model. Only names with
a size in them (8B, 135M) are known to be of different models where they differ: a folder `llama3` may hold any, and
`unsloth/zephyr-sft-bnb-4bit` is `HuggingFaceH4/mistral-7b-sft-beta`. Where the weights that an adapter names lie on
this machine their norms decide what names cannot. AWQ and SmoothQuant make another model of it: norms hold scales that
adapters of the unquantised one do not know, so `-AWQ` and `-SmoothQuant` are part of a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from meteora_jax.config import PROJECTIONS, BankConfig, InputError, LlamaConfig

GIVEN = "name"  # among `BaseOrigin.names`: what the user said, which counts alone

_STORAGE = re.compile(  # at a name's end: quantisations, types and formats
    r"[-_. ]+(?:[it]?q[1-8](?:_[0-9a-z]+)*|ud|bf16|fp?(?:8|16|32)|b?float(?:16|32)|mxfp4|nf4|int[48]|[3468]-?bit"
    r"|bnb|gptq|hqq|gguf|ggml|exl[23]|mlx|hf|unsloth|dynamic|imatrix|imat|quantized|marlin|w\d+a\d+|nvfp4"
    r"|[0-9]{5}-of-[0-9]{5})$"
)
_SIZE = re.compile(r"(?<![0-9a-z])(?:[0-9]+x)?[0-9]+(?:[._][0-9]+)?[mbt](?![0-9a-z])", re.IGNORECASE)
_HUB = re.compile(r"(?P<owner>\w[\w.-]*)/\w[\w.-]*")
_LOCAL = {  # first components of relative paths, which look like a hub's organisations
    "models", "model", "checkpoints", "checkpoint", "ckpts", "ckpt", "outputs", "output", "data", "runs", "weights",
    "base", "saved", "results", "tmp", "local", "llm", "llms", "pretrained",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BaseOrigin:
    """What a BASE folder records of its source.

    names: where a name was found (`GIVEN`, config.json's key, a GGUF key, the file's or folder's own name) -> the name.
    revision: the commit of a hub's repository. norms_sha256: of all norm scales in bfloat16, in the order of their
    paths: the same after conversion, quantisation, and merging of adapters.
    """

    names: dict[str, str]
    revision: str | None
    norms_sha256: str

    @classmethod
    def of_base(cls, raw: Any, source: str) -> BaseOrigin | None:
        """The record in a BASE's `config.json`; None in one that an older version imported.

        Raises:
            InputError: a malformed record.
        """
        meteora = raw.get("meteora") if isinstance(raw, Mapping) else None
        origin = meteora.get("origin") if isinstance(meteora, Mapping) else None
        return None if origin is None else cls.from_json(origin, f"{source}: meteora.origin")

    @classmethod
    def from_json(cls, raw: Any, source: str) -> BaseOrigin:
        """What `dataclasses.asdict` made. Raises InputError."""
        try:
            names = {str(k): str(v) for k, v in raw["names"].items()}
            revision = None if raw["revision"] is None else str(raw["revision"])
            return cls(names, revision, str(raw["norms_sha256"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{source}: expected names, revision and norms_sha256, found {raw!r:.200}") from e

    @property
    def claims(self) -> dict[str, str]:
        """The names that count: the user's alone, or all that the source gave."""
        return {GIVEN: self.names[GIVEN]} if GIVEN in self.names else self.names

    @property
    def known(self) -> dict[str, str]:
        """Those of `claims` that say which model it is."""
        return {where: name for where, name in self.claims.items() if where == GIVEN or is_known(name)}

    @property
    def name(self) -> str | None:
        """The first known name: what files that name their base are given."""
        return next(iter(self.known.values()), None)


def split_name(name: str) -> tuple[str, str | None]:
    """(the last part of a path or hub's name that says something, the commit in it).

    `models--org--name/snapshots/COMMIT` is what a hub's cache is called.
    """
    parts = [part for part in re.split(r"[/\\]", name.strip()) if part not in ("", ".")]
    revision = None
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts, revision = parts[:-2], parts[-1]
    if len(parts) > 1 and parts[-1] == "original":  # where hub repositories keep Meta's own files
        parts = parts[:-1]
    last = parts[-1] if parts else ""
    return (last.split("--")[-1] if last.startswith("models--") else last), revision


def normalized(name: str) -> str:
    """What is left of a name to compare."""
    name = re.sub(r"\.gguf$", "", split_name(name)[0].lower())
    while match := _STORAGE.search(name):
        name = name[: match.start()]
    return re.sub(r"[\W_]+", "", re.sub(r"^meta[-_. ]+(?=llama)", "", name))


def has_size(name: str) -> bool:
    """Whether a name has a number of parameters in it (8B, 135M)."""
    return _SIZE.search(split_name(name)[0]) is not None


def is_known(name: str) -> bool:
    """Whether a name says which model it is: it has a size, or is a hub's."""
    if has_size(name):
        return True
    hub = _HUB.fullmatch(name.strip())
    return hub is not None and hub["owner"].lower() not in _LOCAL


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of an adapter's claim about its base: `expected` where it is refused, else perhaps a `remark`."""

    key: str
    expected: str | None = None
    remark: str | None = None


def compare(origin: BaseOrigin | None, claimed: str | None, revision: str | None, norms: str | None = None) -> Verdict:
    """Whether an adapter whose settings name `claimed` (at `revision`) as its base may act on this one.

    norms: `BaseOrigin.norms_sha256` of the weights that `claimed` names, where they are at hand.
    """
    key = "base_model_name_or_path"
    names = origin.claims if origin else {}
    same = [where for where, name in names.items() if claimed and normalized(name) == normalized(claimed)]
    spelt = {
        normalized(name): name
        for where, name in reversed((origin.known if origin else {}).items())
        if where not in same
    }
    others = list(spelt.values())[::-1]
    if same:
        commits = [
            c for c in (revision, origin.revision if origin else None) if c and re.fullmatch("[0-9a-f]{7,40}", c)
        ]
        if len(commits) == 2 and not commits[0].startswith(commits[1]) and not commits[1].startswith(commits[0]):
            return Verdict("revision", expected=commits[1])
        called = f"the base is called {', '.join(others)} as well as {names[same[0]]}"
        return Verdict(key, remark=called if others else None)
    if claimed is None:
        return Verdict(key, remark="the adapter does not say which base it was trained on")
    if norms is not None and origin is not None and norms == origin.norms_sha256:
        return Verdict(key)
    sized = [name for where, name in (origin.known if origin else {}).items() if where == GIVEN or has_size(name)]
    if norms is not None and origin is not None and not (has_size(claimed) and sized):
        return Verdict(key, expected=f"a model with this base's norms, {origin.norms_sha256[:12]}")
    if not is_known(claimed):
        return Verdict(key, remark=f"trained on {claimed!r}, a name that does not say which model it is")
    if others and not has_size(claimed):
        return Verdict(key, remark=f"trained on {claimed!r}, a name without a size, which may be {' or '.join(others)}")
    if not sized:
        return Verdict(
            key, remark=f"trained on {claimed!r}; the base does not say which model it is (import it with --name)"
        )
    return Verdict(key, expected=" or ".join(others))


def misfits(bank: BankConfig, config: LlamaConfig, origin: BaseOrigin | None, source: str) -> list[str]:
    """Why a bank cannot be this base's, one line a reason; empty if it can. Raises InputError: a malformed record."""
    problems = []
    if bank.num_layers != config.num_layers:
        problems.append(f"{source}: num_layers: expected {config.num_layers} (the base's), found {bank.num_layers}")
    for p in PROJECTIONS:
        wanted, found = config.projection_shape(p), bank.base_shapes.get(p)
        if found != wanted:
            problems.append(f"{source}: base_shapes.{p}: expected {wanted} (the base's), found {found}")
    vocab = (config.vocab_size, config.hidden_size)
    if bank.vocab_shape not in (None, vocab):
        problems.append(f"{source}: vocab_shape: expected {vocab} (the base's), found {bank.vocab_shape}")
    mine = None if bank.base is None else BaseOrigin.from_json(bank.base, f"{source}: base")
    if mine and origin and mine.norms_sha256 != origin.norms_sha256 and not problems:
        expected, found = (f"{o.norms_sha256[:12]} ({o.name or 'no name'})" for o in (origin, mine))
        problems.append(
            f"{source}: base.norms_sha256: expected the base's, {expected}, found {found}; adapters that are meant for "
            "this base must be imported for it"
        )
    return problems
