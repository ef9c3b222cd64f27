"""python -m labs.rag.late_interaction: one vector a passage against one vector a token (MaxSim), with the same encoder.

For every answerable test question the ten documents that MiniLM finds first are ordered anew by the token vectors of their nearest
chunks. MiniLM was trained for one vector, so this shows the mechanism and its price, not what a model trained for it does.
Also counts the tokens of the corpus, and how well captions and alt texts find the book's own figures. Writes
results/late_interaction.json. About two minutes on one core.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch

from labs.rag.evaluation import queries
from labs.rag.experiments import record
from labs.rag.index import Index, load
from labs.rag.pipeline import Pipeline

NEAREST = 10  # documents that are ordered anew
CHAPTERS = Path(__file__).parents[2] / "chapters"


def stored_text(index: Index, row: int) -> str:
    """A chunk as it was embedded: under its header."""
    d = index.documents[index.owner[row]]
    return f"{d.name}{d.signature[:200]}\n{index.passages[row]}"


def token_vectors(encoder, texts: list[str]) -> list[np.ndarray]:
    """For each text (tokens, 384): the encoder's last states, each of length 1, without [CLS] and [SEP]."""
    states = encoder.encode(texts, output_value="token_embeddings", convert_to_numpy=False)
    return [torch.nn.functional.normalize(s.float()[1:-1], dim=-1).numpy() for s in states]


def maxsim(question: np.ndarray, passage: np.ndarray) -> float:
    """Each token of the question takes its nearest token of the passage; the mean over the question's tokens."""
    return float((question @ passage.T).max(1).mean())


def figures() -> list[dict]:
    """The book's figures: the question under which each stands, its alt text and its caption."""
    found = []
    for path in sorted(CHAPTERS.glob("*/*.ipynb")):
        question = ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown" and (heading := re.match(r"## (.+\?)\n", text)):
                question = heading[1]
            shown = cell["metadata"].get("mystnb", {})
            if question and "image" in shown:
                row = {"page": path.stem, "question": question, "alt": shown["image"]["alt"]}
                found.append(row | {"caption": shown["figure"]["caption"]})
    return found


def main() -> None:
    index = load()
    pipeline, encoder = Pipeline(index), index.encoder
    asked = [q for q in queries("test") if q.answers]
    single = encoder.encode([q.query for q in asked], normalize_embeddings=True)
    many = token_vectors(encoder, [q.query for q in asked])
    candidates, wanted = [], set()
    for q, vector in zip(asked, single, strict=True):
        found = [d for d, _ in index.dense(q.query, NEAREST)]
        rows = [pipeline.rows[d][int(np.argmax(pipeline.matrix[pipeline.rows[d]] @ vector))] for d in found]
        candidates.append(rows)
        wanted.update(rows)
    order = sorted(wanted, key=lambda r: len(index.passages[r]))
    print(len(order), "chunks to encode", flush=True)
    stored = dict(zip(order, token_vectors(encoder, [stored_text(index, r) for r in order]), strict=True))
    ranks: dict[str, list[int]] = {"one vector": [], "MaxSim": [], "mean of both": []}
    for q, vector, tokens, rows in zip(asked, single, many, candidates, strict=True):
        cosine = pipeline.matrix[rows] @ vector
        late = np.array([maxsim(tokens, stored[r]) for r in rows])
        standard = [(s - s.mean()) / s.std() for s in (cosine, late)]
        right = [index.documents[index.owner[r]].name in q.answers for r in rows]
        for name, score in zip(ranks, (cosine, late, sum(standard)), strict=True):
            placed = np.array(right)[np.argsort(-score, kind="stable")]
            ranks[name].append(int(placed.argmax()) + 1 if placed.any() else 0)
    texts = [stored_text(index, r) for r in range(len(index.passages))]
    lengths = np.array([len(t) for t in encoder.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]) - 2
    read = np.minimum(lengths, encoder.max_seq_length - 2)

    drawn = figures()
    titles = encoder.encode([f["question"] for f in drawn], normalize_embeddings=True)
    kinds = {"page name": "page", "alt text": "alt", "caption": "caption"}
    figure_ranks = {}
    for name, key in (kinds | {"alt text and caption": ""}).items():
        said = [f[key] if key else f"{f['alt']} {f['caption']}" for f in drawn]
        similarity = titles @ encoder.encode(said, normalize_embeddings=True).T
        same = np.array([[a["question"] == b["question"] for b in drawn] for a in drawn])
        best = np.where(same, similarity, -1).max(1)
        figure_ranks[name] = [
            int((np.where(same[i], -1, similarity[i]) > best[i]).sum()) + 1 for i in range(len(drawn))
        ]
    record(
        "late_interaction",
        {
            "what": f"rank of the first answering document among the {NEAREST} nearest (0: not among them), by question",
            "questions": " ".join(q.id for q in asked),
            "ranks": {name: " ".join(map(str, values)) for name, values in ranks.items()},
            "chunks": len(read),
            "tokens that the encoder reads": int(read.sum()),
            "chunks that it reads in part": int((lengths > read).sum()),
            "figures": len(drawn),
            "figure ranks": {name: " ".join(map(str, values)) for name, values in figure_ranks.items()},
        },
    )
    for name, values in ranks.items():
        print(name, np.mean([r == 1 for r in values]).round(3), np.mean([1 / r if r else 0 for r in values]).round(3))
    for name, values in figure_ranks.items():
        print(name, np.mean(np.array(values) == 1).round(2))


if __name__ == "__main__":
    main()
