"""A persistent index over the corpus: vectors of MiniLM and a BM25 of words, in one folder of the cache.

Building embeds every chunk once (six minutes on two cores). Chunks are known by their hash, so a later build embeds
only what changed. The folder's name carries the corpus' fingerprint: an index of other versions is stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import bm25s
import faiss
import numpy as np

from labkit.models import MINILM, cache_dir, minilm
from labs.rag.corpus import Document, documents, fingerprint

SIZE, OVERLAP = 600, 100  # characters of a chunk and of what two neighbours share; chosen on the development split
FORMAT = 2  # raised when the chunks or the files of the folder change


class NoIndex(Exception):
    """There is no index, or one of other versions. The message says what to run."""


def chunks(body: str, size: int = SIZE, overlap: int = OVERLAP) -> list[str]:
    """Cut a text into pieces of at most ``size`` characters that overlap by at most ``overlap``, at white space.

    Raises ``ValueError`` unless 0 <= overlap < size / 2.
    """
    if not 0 <= overlap < size / 2:
        raise ValueError("the overlap must be at least 0 and less than half of the size")
    pieces, start = [], 0
    while True:
        end = start + size
        if end >= len(body):
            return [*pieces, body[start:].strip()]
        # Back to the last white space in the second half, so that no word is cut; a word longer than that is.
        space = max(body.rfind(" ", start + size // 2, end), body.rfind("\n", start + size // 2, end))
        end = space if space > 0 else end
        pieces.append(body[start:end].strip())
        # The next one begins with a word too: the first that begins within the overlap, if one does.
        word = re.search(r"(?<=\s)\S", body[end - overlap - 1 : end]) if overlap else None
        start = end - overlap - 1 + word.start() if word else end


def words(text: str) -> list[str]:
    """The words of a text for BM25, lower-case; an identifier counts whole and in its parts: grad_norm, grad, norm."""
    found = []
    for word in re.findall(r"\w+", text):
        parts = [p.lower() for p in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]", word)]
        found += [word.lower(), *parts] if len(parts) > 1 else [word.lower().strip("_")]
    return [w for w in found if w]


@dataclass
class Index:
    """What a search needs. ``owner[i]`` is the number of the document that chunk i, and row i of the vectors, belongs to."""

    documents: Sequence[Document]
    passages: list[str]  # the chunks, without the header under which they were embedded
    owner: np.ndarray
    vectors: faiss.Index
    lexical: bm25s.BM25

    @cached_property
    def encoder(self):
        return minilm()

    def dense(self, query: str, k: int) -> list[tuple[int, float]]:
        """The k documents whose nearest chunk is nearest to the query: (document, cosine), best first."""
        vector = self.encoder.encode([query], normalize_embeddings=True)
        # A document may own several of the nearest chunks: look at more of them than documents are asked for.
        scores, rows = self.vectors.search(vector, min(8 * k, self.vectors.ntotal))
        best: dict[int, float] = {}
        for score, row in zip(scores[0], rows[0], strict=True):
            best.setdefault(int(self.owner[row]), float(score))
        return list(best.items())[:k]

    def sparse(self, query: str, k: int) -> list[tuple[int, float]]:
        """The k documents with the largest BM25 score above zero: (document, score), best first."""
        if not (asked := words(query)):
            return []
        scores = self.lexical.get_scores(asked)
        order = np.argsort(-scores, kind="stable")[:k]
        return [(int(i), float(scores[i])) for i in order if scores[i] > 0]


def folder() -> Path:
    return cache_dir() / f"rag-{fingerprint()}-{FORMAT}"


def build(report: Callable[[str], None] = print) -> Path:
    """Make the index, or bring it up to date. Another index in the cache lends the vectors of chunks it shares."""
    target, corpus = folder(), documents()
    passages = [piece for d in corpus for piece in chunks(d.body)]
    owner = np.array([i for i, d in enumerate(corpus) for _ in chunks(d.body)])
    texts = [f"{corpus[i].name}{corpus[i].signature[:200]}\n{p}" for i, p in zip(owner, passages, strict=True)]
    # Other weights make other vectors, so they are part of the key.
    keys = [hashlib.sha256(f"{MINILM[2]}\n{t}".encode()).hexdigest()[:24] for t in texts]
    known = _known_vectors(target.parent)
    missing = [i for i, key in enumerate(keys) if key not in known]
    report(f"{len(corpus):,} documents, {len(texts):,} chunks, {len(missing):,} of them to embed")
    encoder = minilm()
    missing.sort(key=lambda i: len(texts[i]))  # batches of equal length waste no padding
    for start in range(0, len(missing), 512):
        part = missing[start : start + 512]
        for i, vector in zip(part, encoder.encode([texts[i] for i in part], normalize_embeddings=True), strict=True):
            known[keys[i]] = vector
        report(f"  {min(start + 512, len(missing)):,} of {len(missing):,}")
    vectors = np.stack([known[key] for key in keys]).astype(np.float32)
    lexical = bm25s.BM25()
    lexical.index([words(d.text) for d in corpus], show_progress=False)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="rag-") as scratch:  # whole or not at all
        made = Path(scratch) / "index"
        made.mkdir()
        np.savez(made / "vectors.npz", keys=np.array(keys), vectors=vectors, owner=owner)
        lexical.save(made / "bm25", show_progress=False)
        with open(made / "documents.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(d)) + "\n" for d in corpus)
        (made / "passages.json").write_text(json.dumps(passages), encoding="utf-8")
        if target.exists():
            os.replace(target, Path(scratch) / "before")  # who has it open reads on; it goes with the scratch folder
        os.replace(made, target)
    return target


def _known_vectors(cache: Path) -> dict[str, np.ndarray]:
    known = {}
    for path in sorted(cache.glob("rag-*/vectors.npz")):
        with np.load(path) as stored:
            known |= dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))
    return known


def load() -> Index:
    """The index of the installed versions. Raises ``NoIndex`` where there is none."""
    source = folder()
    if not source.is_dir():
        others = sorted(p.name for p in source.parent.glob("rag-*") if p.is_dir())
        why = "the index is stale: torch, transformers or the corpus changed" if others else "there is no index yet"
        raise NoIndex(f"{why}. Run:\n    python -m labs.rag --build")
    with np.load(source / "vectors.npz") as stored:
        matrix, owner = stored["vectors"], stored["owner"]
    vectors = faiss.IndexFlatIP(matrix.shape[1])
    vectors.add(matrix)
    lines = (source / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return Index(
        [Document(**json.loads(line)) for line in lines],
        json.loads((source / "passages.json").read_text(encoding="utf-8")),
        owner,
        vectors,
        bm25s.BM25.load(source / "bm25"),
    )
