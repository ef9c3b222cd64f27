"""python -m labs.rag.reading: how likely the reader finds the right words, over all answerable test questions.

Four conditions for the same question: no passage, the passage that the pipeline ranks first, a passage that is known to
hold the answer, and a passage that belongs to another question. Writes results/reading.json.
"""

from __future__ import annotations

import numpy as np
import torch

from labs.rag.evaluation import Query, bootstrap, queries
from labs.rag.experiments import expected, record
from labs.rag.index import SIZE, load
from labs.rag.pipeline import Pipeline

LENGTH = SIZE  # characters of a passage: one chunk, whole, as the pipeline shows it


def shown(pipeline: Pipeline, document: int, passage: str) -> str:
    """A passage as the reader sees it: name and arguments above the text."""
    d = pipeline.index.documents[document]
    return f"{d.name}{d.signature[:100]}\n{passage[:LENGTH]}"


def retrieved(pipeline: Pipeline, q: Query) -> str:
    """The passage that the pipeline ranks first."""
    first = pipeline.rerank(q.query, pipeline.retrieve(q.query))[0][0]
    return shown(pipeline, first, pipeline.passage(q.query, first))


def holding(pipeline: Pipeline, q: Query) -> str:
    """Of the answering documents' chunks that hold an expected string, the one nearest to the question.

    Where none holds one, the nearest of all: ask ``expected`` of what comes back.
    """
    index = pipeline.index
    rows = [r for d, document in enumerate(index.documents) if document.name in q.answers for r in pipeline.rows[d]]
    texts = [shown(pipeline, int(index.owner[r]), index.passages[r]) for r in rows]
    cosines = pipeline.matrix[rows] @ index.encoder.encode(q.query, normalize_embeddings=True)
    return max(zip(texts, cosines, strict=True), key=lambda pair: (expected(pair[0], q), pair[1]))[0]


def prompt(tokenizer, question: str, passage: str = "") -> torch.Tensor:
    """Token ids (1, n) of the chat: the same instruction, with or without the documentation."""
    system = "Answer with one short phrase" + (", using only the documentation." if passage else ".")
    user = (f"Documentation:\n{passage}\n\n" if passage else "") + f"Question: {question}"
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    made = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return made["input_ids"]


@torch.inference_mode()
def log_probability(model, tokenizer, ids: torch.Tensor, answer: str) -> float:
    """Mean log-probability of a token of the answer, in nats, when the model has read ``ids``."""
    said = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = model(torch.cat([ids, said], 1), logits_to_keep=said.shape[1] + 1).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, said.T).mean().item()


def main() -> None:
    pipeline = Pipeline(load())
    model, tokenizer = pipeline.reader
    asked = [q for q in queries("test") if q.answers]
    right = [holding(pipeline, q) for q in asked]
    passages = {
        "no passage": [""] * len(asked),
        "retrieved": [retrieved(pipeline, q) for q in asked],
        "right passage": right,
        "another question's": [*right[1:], right[0]],
    }
    rows, summary = [{"id": q.id, "kind": q.kind} for q in asked], {}
    for name, texts in passages.items():
        for row, q, text in zip(rows, asked, texts, strict=True):
            score = log_probability(model, tokenizer, prompt(tokenizer, q.query, text), q.expect[0])
            row[name] = {"log-probability": round(score, 3), "passage holds it": expected(text, q)}
        summary[name] = {
            measure: [round(float(np.mean(v)), 4), *np.round(bootstrap(v), 4).tolist()]
            for measure in ("log-probability", "passage holds it")
            if (v := [float(row[name][measure]) for row in rows])
        }
        print(name, summary[name], flush=True)
    record(
        "reading", {"what": "mean and 95 % bootstrap interval over test questions", "summary": summary, "rows": rows}
    )


if __name__ == "__main__":
    main()
