"""How well an index finds the adapter that a query belongs to, in its own wording and without it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meteora_jax.config import InputError, read_json
from meteora_jax.retriever.features import Features, ngrams, unit
from meteora_jax.retriever.index import Index, top
from meteora_jax.retriever.wording import Wording
from meteora_jax.text import check_text

KS = (1, 3, 5, 8)
WORDINGS = ("own", "removed", "paraphrased")
MOST_DRAWN = 300  # adapters in a similarity map; names are unreadable beyond
WordingKind = Literal["own", "removed", "paraphrased"]


@dataclasses.dataclass(frozen=True)
class Query:
    """A request, the adapter that it belongs to, and that adapter's cluster (the kind of task; "" if unknown)."""

    text: str
    adapter: str
    cluster: str


def read_queries(path: str | os.PathLike[str]) -> list[Query]:
    """Queries of a JSON file, a list of {"inputs", "task", "domain"} as in LoraRetriever's release; a query without a
    domain has no cluster.

    Raises:
        InputError: no list, an empty one, or an entry without those texts.
    """
    raw = read_json(path)
    if not isinstance(raw, list) or not raw:
        found = "an empty one" if raw == [] else type(raw).__name__
        raise InputError(f"{path}: expected a list of queries, found {found}")
    queries = []
    for i, query in enumerate(raw):
        if not isinstance(query, dict):
            raise InputError(f"{path}: query {i}: expected an object, found {type(query).__name__}")
        for key, value in (("inputs", None), ("task", None), ("domain", "")):
            if not isinstance(found := query.get(key, value), str):
                raise InputError(f"{path}: query {i}: {key}: expected a text, found {found!r:.60}")
            check_text(found, f"{path}: query {i}: {key}")
        if not query["inputs"].strip():
            raise InputError(f"{path}: query {i}: inputs: expected a text, found {query['inputs']!r:.60}")
        queries.append(Query(query["inputs"], query["task"], query.get("domain", "")))
    return queries


def read_paraphrases(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """{adapter: instructions of other words, "{text}" standing for the request's content} of a JSON file."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object, found {type(raw).__name__}")
    wrong = [
        f"{path}: {name}: expected texts that hold {{text}}, found {templates!r:.80}"
        for name, templates in raw.items()
        if not isinstance(templates, list) or not templates or any("{text}" not in str(t) for t in templates)
    ]
    if wrong:
        raise InputError(wrong)
    for name, templates in raw.items():
        for i, template in enumerate(templates):
            if not isinstance(template, str):
                raise InputError(f"{path}: {name}: {i}: expected a text, found {template!r:.60}")
            check_text(template, f"{path}: {name}: {i}")
    return raw


def reword(
    queries: Sequence[Query],
    index: Index,
    wording: WordingKind,
    paraphrases: Mapping[str, Sequence[str]] | None = None,
) -> list[Query]:
    """The queries in another wording; those that are all wording are left out.

    own: as they are. removed: without any run of three words, or answer option, that occurs in a profile of the
    index. paraphrased: what is left of that, inside an instruction of other words (an adapter's templates in turn).
    """
    if wording == "own":
        return list(queries)
    shared = Wording([text for inputs in index.profiles.values() for text in inputs], least=1)
    bare = [(i, q, shared.remove(q.text)) for i, q in enumerate(queries)]
    if wording == "removed":
        return [dataclasses.replace(q, text=text) for _, q, text in bare if text]
    if paraphrases is None:
        raise InputError("wording: expected paraphrases for 'paraphrased', found none")
    if missing := sorted({q.adapter for q in queries} - paraphrases.keys()):
        raise InputError([f"paraphrases: {name}: expected templates, found none" for name in missing])
    reworded = []
    for i, q, text in bare:
        templates = paraphrases[q.adapter]
        if text:
            reworded.append(dataclasses.replace(q, text=templates[i % len(templates)].replace("{text}", text)))
    return reworded


def judge(index: Index, queries: Sequence[Query], ks: Sequence[int] = KS) -> dict[str, Any]:
    """Share of queries (%) whose adapter is among the first k.

    Returns:
        queries; iid {k: %}; ood {k: %}, the query's own adapter masked and any adapter of its cluster right (queries
        whose cluster holds no other adapter are left out; no cluster is ""); clusters and adapters {name: {k: %}},
        the iid figure of each.

    Raises:
        InputError: a query of an adapter that is not in the index, an index of one adapter, no queries.
    """
    names = index.names
    if not queries:
        raise InputError("queries: expected at least one, found none")
    if unknown := sorted({q.adapter for q in queries} - set(names)):
        raise InputError([f"queries: expected adapters of the index, found {name!r}" for name in unknown])
    if len(names) < 2:
        raise InputError(f"index: expected two adapters or more, found {len(names)}")
    ks = [k for k in ks if k < len(names)]
    scores = index.scores([q.text for q in queries])
    own = [[q.adapter] for q in queries]
    found = top(scores, names, max(ks)).names
    masked = top(scores, names, max(ks), own).names
    cluster = {q.adapter: q.cluster for q in queries}
    kin = [{a for a, c in cluster.items() if c and c == q.cluster and a != q.adapter} for q in queries]
    hits = np.asarray([[q.adapter in row[:k] for k in ks] for q, row in zip(queries, found, strict=True)])
    others = np.asarray([[bool(s & set(r[:k])) for k in ks] for s, r in zip(kin, masked, strict=True) if s])

    def percent(rows):
        return {k: round(100 * float(v), 2) for k, v in zip(ks, rows.mean(axis=0), strict=True)}

    def split(group: Callable[[Query], str]) -> dict[str, dict[int, float]]:
        members = {
            g: [i for i, q in enumerate(queries) if group(q) == g] for g in sorted({*map(group, queries)} - {""})
        }
        return {g: percent(hits[rows]) for g, rows in members.items()}

    return {
        "queries": len(queries),
        "iid": percent(hits),
        "ood": percent(others) if len(others) else {},
        "clusters": split(lambda q: q.cluster),
        "adapters": split(lambda q: q.adapter),
    }


def adapter_similarity(index: Index) -> np.ndarray:
    """float32 [A, A]: cosine between adapters' mean vectors, or their mean word n-grams without an encoder."""
    profiles = index.profiles.values()
    counts = [len(inputs) for inputs in profiles]
    features = Features([text for inputs in profiles for text in inputs], index.encoder, index.instruction)
    starts = np.cumsum([0, *counts[:-1]])
    if index.encoder is not None:
        means = np.add.reduceat(unit(features.vectors()), starts, axis=0)
        return (unit(means) @ unit(means).T).astype(np.float32)
    from scipy.sparse import csr_matrix

    owner = np.repeat(np.arange(len(counts)), counts)
    sums = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner))))) @ ngrams(features.texts, "words")
    gram = csr_matrix(sums @ sums.T).toarray()
    lengths = np.sqrt(np.maximum(np.diag(gram), 1e-12))
    return (gram / np.outer(lengths, lengths)).astype(np.float32)


def by_cluster(index: Index, queries: Sequence[Query]) -> tuple[list[str], list[str]]:
    """The index's adapters ordered by cluster, then name, and the cluster of each ("" where no query says)."""
    cluster = {q.adapter: q.cluster for q in queries}
    ordered = sorted(index.names, key=lambda name: (cluster.get(name, "~"), name))
    return ordered, [cluster.get(name, "") for name in ordered]


def write_heat_map(index: Index, queries: Sequence[Query], folder: str | os.PathLike[str]) -> list[Path]:
    """similarity.png and similarity.html: all adapters against all, ordered by cluster; refuses over MOST_DRAWN."""
    if len(index.names) > MOST_DRAWN:
        raise InputError(f"{folder}: expected at most {MOST_DRAWN} adapters to draw, found {len(index.names)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, clusters = by_cluster(index, queries)
    order = [index.names.index(name) for name in names]
    matrix = adapter_similarity(index)[np.ix_(order, order)]
    picture, page = folder / "similarity.png", folder / "similarity.html"
    _write_png(matrix, names, clusters, picture)
    page.write_text(_page(matrix, names, clusters), encoding="utf-8")
    return [picture, page]


def _write_png(matrix: np.ndarray, names: Sequence[str], clusters: Sequence[str], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib: expected it for the heat map, found none (extra 'eval')") from None
    size = 2.5 + 0.16 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="viridis", vmin=min(0.0, float(matrix.min())), vmax=1.0)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    for i in range(1, len(names)):
        if clusters[i] != clusters[i - 1]:
            axes.axhline(i - 0.5, color="white", linewidth=0.8)
            axes.axvline(i - 0.5, color="white", linewidth=0.8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="cosine")
    figure.savefig(path, dpi=130)


def _page(matrix: np.ndarray, names: Sequence[str], clusters: Sequence[str]) -> str:
    """One self-contained page: a canvas, and what the mouse points at in words."""
    data = json.dumps({"names": names, "clusters": clusters, "rows": np.round(matrix, 3).tolist()}, ensure_ascii=True)
    data = data.replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape("Similarity of adapters")}</title>
<style>body{{font:14px sans-serif;margin:2em}}canvas{{image-rendering:pixelated;border:1px solid #999}}</style>
<h1>Similarity of adapters</h1><p id="said">Point at a cell.</p><canvas id="map"></canvas>
<script>
const data = {data};
const n = data.names.length, cell = Math.max(4, Math.floor(720 / n)), map = document.getElementById("map");
map.width = map.height = n * cell;
const pen = map.getContext("2d");
data.rows.forEach((row, i) => row.forEach((value, j) => {{
  pen.fillStyle = `hsl(${{260 - 200 * Math.max(0, value)}} 70% ${{15 + 60 * Math.max(0, value)}}%)`;
  pen.fillRect(j * cell, i * cell, cell, cell);
}}));
pen.fillStyle = "white";
for (let i = 1; i < n; i++) if (data.clusters[i] !== data.clusters[i - 1]) {{
  pen.fillRect(i * cell, 0, 1, n * cell);
  pen.fillRect(0, i * cell, n * cell, 1);
}}
map.onmousemove = event => {{
  const j = Math.min(n - 1, Math.floor(event.offsetX / cell)), i = Math.min(n - 1, Math.floor(event.offsetY / cell));
  if (i < 0 || j < 0) return;
  const named = k => data.names[k] + (data.clusters[k] ? ` (${{data.clusters[k]}})` : "");
  document.getElementById("said").textContent = `${{named(i)}} and ${{named(j)}}: ${{data.rows[i][j]}}`;
}};
</script></html>
"""
