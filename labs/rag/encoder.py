"""python -m labs.rag.encoder: MiniLM itself trained on the failed development questions, with sentence-transformers.

A failure is a development question whose first document, by MiniLM, does not answer. Each is paired with the nearest chunk
that answers and the nearest two of documents that do not (hard negatives); the other pairs of a batch are negatives too.
A trained encoder makes every stored vector stale, so the corpus is embedded anew: here 600 documents, all that answer and
those that BM25 confuses with them. Stored is the rank of the first answering document before and after, for every
answerable question. Settings were fixed beforehand; one run. Writes results/encoder.json. About six minutes on one core.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from labkit.models import minilm
from labs.rag.chunking import subcorpus
from labs.rag.evaluation import Query, queries
from labs.rag.experiments import record
from labs.rag.index import load

DOCUMENTS, NEGATIVES, EPOCHS, BATCH, RATE, SEED = 600, 2, 3, 16, 2e-5, 0


def encode(encoder: SentenceTransformer, texts: list[str]) -> np.ndarray:
    return encoder.encode(texts, normalize_embeddings=True)


def examples(asked: list[Query], texts: list[str], owner: np.ndarray, scores: np.ndarray, ranks: list[int]) -> Dataset:
    """One row a failure: the question, the nearest chunk that answers, the nearest chunks that do not."""
    rows = []
    for q, row, rank in zip(asked, scores, ranks, strict=True):
        if q.split == "dev" and rank > 1:
            right, order = np.isin(owner, list(q.answers)), np.argsort(-row, kind="stable")
            wrong = [texts[i] for i in order if not right[i]][:NEGATIVES]
            rows.append([q.query, texts[next(i for i in order if right[i])], *wrong])
    columns = ["anchor", "positive", *(f"negative_{n}" for n in range(NEGATIVES))]
    return Dataset.from_dict(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))


def train(encoder: SentenceTransformer, data: Dataset) -> list[float]:
    """Train in place; the loss of every step."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            seed=SEED,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = MultipleNegativesRankingLoss(encoder)
        trainer = SentenceTransformerTrainer(model=encoder, args=settings, train_dataset=data, loss=loss)
        trainer.train()
    encoder.eval()
    return [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line]


def first_ranks(asked: list[Query], owner: np.ndarray, scores: np.ndarray) -> list[int]:
    """For each question the rank of the first document that answers; a document counts by its nearest chunk."""
    found = []
    for q, row in zip(asked, scores, strict=True):
        best: dict[str, float] = {}
        for name, score in zip(owner, row, strict=True):
            best[name] = max(best.get(name, -1.0), float(score))
        found.append(1 + sum(s > max(best[n] for n in q.answers if n in best) for s in best.values()))
    return found


def main() -> None:
    begin = time.process_time()
    index, encoder = load(), minilm()
    asked = [q for q in queries() if q.answers]
    kept = {d.name for d in subcorpus(index, asked, DOCUMENTS)}
    rows = [i for i, d in enumerate(index.owner) if index.documents[d].name in kept]
    owner = np.array([index.documents[index.owner[i]].name for i in rows])
    documents = [index.documents[index.owner[i]] for i in rows]
    texts = [f"{d.name}{d.signature[:200]}\n{index.passages[i]}" for d, i in zip(documents, rows, strict=True)]
    stored = np.stack([index.vectors.reconstruct(i) for i in rows])
    scores = encode(encoder, [q.query for q in asked]) @ stored.T
    before = first_ranks(asked, owner, scores)
    data = examples(asked, texts, owner, scores, before)
    print(f"{len(kept)} documents, {len(texts):,} chunks, {len(data)} failures", flush=True)
    losses = train(encoder, data)
    print("losses", losses, flush=True)
    questions = encode(encoder, [q.query for q in asked])
    stale = first_ranks(asked, owner, questions @ stored.T)
    after = first_ranks(asked, owner, questions @ encode(encoder, texts).T)
    record(
        "encoder",
        {
            "what": "rank of the first answering document by MiniLM, before and after training on failures",
            "settings": {"negatives": NEGATIVES, "epochs": EPOCHS, "batch": BATCH, "rate": RATE, "seed": SEED},
            "documents": len(kept),
            "chunks": len(texts),
            "failures": len(data),
            "losses": losses,
            "CPU seconds": round(time.process_time() - begin),
            "rows": [
                {"id": q.id, "split": q.split, "before": b, "new questions, old vectors": s, "after": a}
                for q, b, s, a in zip(asked, before, stale, after, strict=True)
            ],
        },
    )
    for split in ("dev", "test"):
        for name, ranks in (("before", before), ("new questions, old vectors", stale), ("after", after)):
            mine = [1 / r for q, r in zip(asked, ranks, strict=True) if q.split == split]
            print(f"{split:5}{name:28} MRR {np.mean(mine):.3f}")


if __name__ == "__main__":
    main()
