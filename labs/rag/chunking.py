"""python -m labs.rag.chunking: how chunk size, overlap, the place of the cuts and a header decide what is found.

The sub-corpus has every document that answers a question and, up to 900, those that BM25 confuses with them (so that no
cut of the vectors' own is favoured). Each variant is cut, embedded with MiniLM and asked all answerable questions; what is
stored is the rank of the first document that answers, question by question, so that any two variants can be compared in
pairs. The index lends the vectors of chunks that it has; for the others the encoder's products run in bfloat16, at half the
time where a core has the instructions, and the result says how far a sample is from float32. Takes about half an hour on one
core. ``--keep FOLDER`` keeps the vectors there, and a later run goes on from them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from labkit.models import minilm
from labs.rag.corpus import Document
from labs.rag.evaluation import Query, queries
from labs.rag.experiments import expected, record
from labs.rag.index import Index, chunks, load

DOCUMENTS = 900
SIZES = 150, 300, 600, 1200
BUDGET = 2400  # characters of pieces that a reader is shown
WINDOWS = 0, 1, 2


def subcorpus(index: Index, asked: Sequence[Query], size: int = DOCUMENTS) -> list[Document]:
    """All documents that answer a question, and the best wrong ones by BM25, taken in turn from every question."""
    wanted = set().union(*(q.answers for q in asked))
    kept = {i for i, d in enumerate(index.documents) if d.name in wanted}
    rankings = [[i for i, _ in index.sparse(q.query, 100)] for q in asked]
    for place in range(100):
        for ranking in rankings:
            if len(kept) < size and place < len(ranking):
                kept.add(ranking[place])
    return [index.documents[i] for i in sorted(kept)]


def packed(body: str, size: int) -> list[str]:
    """Cut at paragraphs, lines and sentences: whole units, as many as fit into ``size`` characters.

    A paragraph that does not fit is cut into lines, a line into sentences, a sentence by size.
    """

    def units(text: str, separators: tuple[str, ...]) -> list[str]:
        if len(text) <= size:
            return [text]
        if not separators:
            return chunks(text, size, 0)
        parts = re.split(separators[0], text)
        return [u for p in parts if p.strip() for u in units(p, separators[1:])]

    pieces: list[str] = []
    for unit in units(body, (r"(?<=\n)\s*\n", r"(?<=\n)(?=\S)", r"(?<=[.!?])\s+")):
        if pieces and len(pieces[-1]) + len(unit) + 1 <= size:
            pieces[-1] += "\n" + unit
        else:
            pieces.append(unit)
    return [p.strip() for p in pieces if p.strip()]


def header(document: Document) -> str:
    """What the lab's index puts before every piece of a document."""
    return f"{document.name}{document.signature[:200]}\n"


def variants() -> list[dict]:
    fixed = [{"cut": "fixed", "size": s, "overlap": o, "header": True} for s in SIZES for o in (0, s // 6)]
    whole = [{"cut": "packed", "size": s, "overlap": 0, "header": True} for s in (300, 600)]
    bare = [{"cut": "fixed", "size": s, "overlap": 0, "header": False} for s in SIZES]
    return [*fixed, *whole, *bare]


def label(variant: dict) -> str:
    return f"{variant['cut']} {variant['size']}/{variant['overlap']}" + ("" if variant["header"] else " bare")


def embed(encoder: SentenceTransformer, texts: list[str], known: dict[str, np.ndarray]) -> np.ndarray:
    """(texts, 384); texts that are not known yet are embedded and remembered."""
    missing = [t for t in dict.fromkeys(texts) if t not in known]
    if missing:
        with torch.autocast("cpu", torch.bfloat16):
            made = encoder.encode(missing, normalize_embeddings=True, convert_to_tensor=True).float().numpy()
        known |= dict(zip(missing, made, strict=True))
    return np.stack([known[t] for t in texts])


def cut(variant: dict, body: str) -> list[str]:
    size, overlap = variant["size"], variant["overlap"]
    return packed(body, size) if variant["cut"] == "packed" else chunks(body, size, overlap)


def shown(
    order: np.ndarray, pieces: list[str], owner: np.ndarray, window: int, budget: int = BUDGET
) -> list[list[int]]:
    """The pieces that a reader gets, best first, each with up to ``window`` neighbours of its document on either side.

    Never a piece twice. Where the budget of characters is too small for all neighbours, there are fewer; the first piece
    that does not fit alone ends it.
    """
    taken: list[list[int]] = []
    seen: set[int] = set()
    for row in order:
        if row in seen:
            continue
        for w in range(window, -1, -1):
            near = range(max(0, row - w), min(len(pieces), row + w + 1))
            group = [r for r in near if owner[r] == owner[row] and r not in seen]
            cost = sum(len(pieces[r]) for r in group)
            if cost <= budget:
                break
        else:
            break
        budget -= cost
        seen.update(group)
        taken.append(group)
    return taken


def measure(
    documents: list[Document],
    pieces: list[str],
    owner: np.ndarray,
    vectors: np.ndarray,
    asked: list[Query],
    q: np.ndarray,
) -> dict:
    """Ranks of the first answering document, what the reader is shown, and how far right and wrong chunks are apart."""
    names = np.array([d.name for d in documents])
    similarity = q @ vectors.T  # (questions, chunks)
    ranks, right, wrong = [], [], []
    evidence = {w: [] for w in WINDOWS}
    for query, row in zip(asked, similarity, strict=True):
        best = np.full(len(documents), -1.0)
        np.maximum.at(best, owner, row)  # a document is as near as its nearest chunk
        answers = np.isin(names, list(query.answers))
        ranks.append(int((best > best[answers].max()).sum()) + 1)
        right.append(best[answers].max())
        wrong.append(best[~answers].max())
        order = np.argsort(-row, kind="stable")[:400]
        for window in WINDOWS:
            texts = [
                "\n".join(pieces[r] for r in group if answers[owner[r]])
                for group in shown(order, pieces, owner, window)
            ]
            evidence[window].append(int(any(expected(text, query) for text in texts)))
    return {
        "ranks": " ".join(map(str, ranks)),
        "evidence": {str(w): "".join(map(str, hits)) for w, hits in evidence.items()},
        "cosine of the nearest right chunk": round(float(np.mean(right)), 4),
        "cosine of the nearest wrong chunk": round(float(np.mean(wrong)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path)
    keep = parser.parse_args().keep
    index, encoder = load(), minilm()
    asked = [q for q in queries() if q.answers]
    documents = subcorpus(index, asked)
    body = {d.name: d.body for d in documents}
    said = [any(expected(body[name], q) for name in q.answers) for q in asked]  # not only in the name
    print(f"{len(documents)} documents, {sum(map(len, body.values())):,} characters", flush=True)
    q = encoder.encode([query.query for query in asked], normalize_embeddings=True)
    limit, tokenizer = encoder.max_seq_length, encoder.tokenizer
    headed = (header(index.documents[o]) + p for o, p in zip(index.owner, index.passages, strict=True))
    known = dict(zip(headed, index.vectors.reconstruct_n(0, index.vectors.ntotal), strict=True))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        for variant in variants():
            cuts = [cut(variant, d.body) for d in documents]
            pieces = [p for pieces in cuts for p in pieces]
            owner = np.array([i for i, pieces in enumerate(cuts) for _ in pieces])
            texts = [
                (header(documents[i]) if variant["header"] else "") + p for i, p in zip(owner, pieces, strict=True)
            ]
            kept = folder / f"{label(variant).replace('/', '-').replace(' ', '_')}.npz"
            if not kept.exists():
                np.savez(kept, vectors=embed(encoder, texts, known))
            vectors = np.load(kept)["vectors"]
            lengths = np.array([len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]])
            rows.append(
                variant
                | {
                    "label": label(variant),
                    "chunks": len(pieces),
                    "index bytes": len(pieces) * vectors.shape[1] * 4,
                    "characters": sum(map(len, pieces)),
                    "tokens": int(lengths.sum()),
                    "tokens read": int(np.minimum(lengths, limit).sum()),
                    "chunks cut off by the encoder": int((lengths > limit).sum()),
                }
                | measure(documents, pieces, owner, vectors, asked, q)
            )
            print({k: v for k, v in rows[-1].items() if k not in ("ranks", "evidence")}, flush=True)
    some = range(0, len(texts), max(1, len(texts) // 60))
    exact = encoder.encode([texts[i] for i in some], normalize_embeddings=True)
    record(
        "chunking",
        {
            "what": "rank of the first answering document, by question, for each way of cutting the sub-corpus",
            "documents": len(documents),
            "characters": sum(map(len, body.values())),
            "encoder reads at most": limit,
            "budget of characters": BUDGET,
            "least cosine of a vector with its float32": round(float((exact * vectors[some]).sum(1).min()), 6),
            "questions": " ".join(q.id for q in asked),
            "split": " ".join(q.split for q in asked),
            "expected string in an answering body": "".join(str(int(s)) for s in said),
            "variants": rows,
        },
    )


if __name__ == "__main__":
    main()
