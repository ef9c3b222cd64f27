"""python -m labs.rag.offset: the same corpus cut at other places, and what the searches then find.

Every document that has more than one chunk is cut again, with its first chunk half as long, so that all its boundaries move;
size and overlap stay. For each answerable test question the first documents by MiniLM and after the lab's reranker are
stored by name, for the index as it is and for the shifted one. Writes results/offset.json. About five minutes on one core.
"""

from __future__ import annotations

import time
from dataclasses import replace

import faiss
import numpy as np

from labs.rag.evaluation import queries
from labs.rag.experiments import record
from labs.rag.index import OVERLAP, SIZE, Index, chunks, load
from labs.rag.pipeline import CANDIDATES, Pipeline

KEPT = 10  # documents stored of each ranking


def shifted(body: str) -> list[str]:
    """The chunks of a text, with the first boundary moved to half of its place; a text of one chunk stays whole.

    The first cut is at white space; the second chunk begins ``OVERLAP`` characters before it, wherever that is.
    """
    if len(pieces := chunks(body)) == 1:
        return pieces
    start = pieces[0][: SIZE // 2]
    cut = body.index(start) + len(start.rsplit(maxsplit=1)[0])
    return [body[:cut].strip(), *chunks(body[max(0, cut - OVERLAP) :].lstrip())]


def shifted_index(index: Index) -> tuple[Index, int]:
    """(the index over the shifted chunks, how many of them had to be embedded)"""
    pieces = [shifted(d.body) for d in index.documents]
    passages = [p for own in pieces for p in own]
    owner = np.repeat(np.arange(len(pieces)), [len(own) for own in pieces])
    stored = index.vectors.reconstruct_n(0, index.vectors.ntotal)
    known = {(int(d), p): v for d, p, v in zip(index.owner, index.passages, stored, strict=True)}
    keys = [(int(d), p) for d, p in zip(owner, passages, strict=True)]
    new = sorted({key for key in keys if key not in known}, key=lambda key: len(key[1]))
    texts = [f"{index.documents[d].name}{index.documents[d].signature[:200]}\n{p}" for d, p in new]
    known |= dict(zip(new, index.encoder.encode(texts, normalize_embeddings=True), strict=True))
    vectors = faiss.IndexFlatIP(stored.shape[1])
    vectors.add(np.stack([known[key] for key in keys]).astype(np.float32))
    return replace(index, passages=passages, owner=owner, vectors=vectors), len(new)


def main() -> None:
    begin = time.process_time()
    index = load()
    other, embedded = shifted_index(index)
    names = [d.name for d in index.documents]
    asked = [q for q in queries("test") if q.answers]
    rows = [{"id": q.id} for q in asked]
    for name, pipeline in (("as it is", Pipeline(index)), ("shifted", Pipeline(other))):
        for q, row in zip(asked, rows, strict=True):
            dense = [names[d] for d, _ in pipeline.index.dense(q.query, CANDIDATES)][:KEPT]
            reranked = [names[d] for d in pipeline.rerank(q.query, pipeline.retrieve(q.query))[0]][:KEPT]
            row[name] = {"MiniLM": dense, "reranked": reranked}
    several = np.bincount(index.owner) > 1
    record(
        "offset",
        {
            "what": "first documents of every answerable test question, before and after the chunks' boundaries moved",
            "documents with several chunks": int(several.sum()),
            "chunks": {"as it is": len(index.passages), "shifted": len(other.passages), "embedded anew": embedded},
            "CPU seconds": round(time.process_time() - begin),
            "rows": rows,
        },
    )
    for stage in ("MiniLM", "reranked"):
        kept = [len(set(r["as it is"][stage][:5]) & set(r["shifted"][stage][:5])) for r in rows]
        print(f"{stage}: {np.mean(kept):.2f} of five documents kept, {len(asked)} questions")


if __name__ == "__main__":
    main()
