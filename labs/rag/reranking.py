"""python -m labs.rag.reranking: a cross-encoder trained on the development questions.

It orders the first ten of the lab's reranker on the test questions. Writes results/reranking.json with its scores, so
that metrics can be computed from today's labels.
"""

from __future__ import annotations

import functools
import sys
import time

import numpy as np
import torch
from torch import nn

import labs.rag.pipeline as lab
from labkit.models import minilm
from labs.rag.evaluation import Query, queries
from labs.rag.experiments import record
from labs.rag.index import load

DEPTH = 10  # candidates that are scored
NEGATIVES = 4  # hard negatives for each positive
LENGTH = 96  # word pieces of question and passage together


class CrossEncoder(nn.Module):
    """MiniLM over question and passage at once: every token attends to both.

    The score is the cosine of the two parts' means, scaled, plus a linear head that begins at zero: before training it is
    close to what the bi-encoder says.
    """

    def __init__(self):
        super().__init__()
        encoder = minilm()
        self.tokenizer, self.body = encoder.tokenizer, encoder[0].auto_model
        self.head = nn.Linear(self.body.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, query: str, passages: list[str]) -> torch.Tensor:
        """Scores (passages,)."""
        options = {"truncation": "only_second", "max_length": LENGTH, "padding": True, "return_tensors": "pt"}
        made = self.tokenizer([query] * len(passages), passages, **options)
        ids, mask, part = made["input_ids"], made["attention_mask"], made["token_type_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.body(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (passages, tokens, 384)
        asked, read = (((part == p) & (mask == 1))[..., None].float() for p in (0, 1))
        a, b = ((out * m).sum(1) / m.sum(1).clamp(min=1) for m in (asked, read))
        return self.scale * nn.functional.cosine_similarity(a, b) + self.head(a * b)[:, 0]


def shown(pipeline: lab.Pipeline, q: Query, document: int) -> str:
    """A candidate as the cross-encoder sees it: its name above the chunk nearest to the question."""
    return f"{pipeline.index.documents[document].name}\n{pipeline.passage(q.query, document)}"


def train(pipeline: lab.Pipeline, asked: list[Query], epochs: int = 1, batch: int = 4, seed: int = 0):
    """Listwise: the answering passage against hard negatives, which the lab's search found with it."""
    _ = torch.manual_seed(seed)
    model, dice = CrossEncoder(), np.random.default_rng(seed)
    number = {d.name: i for i, d in enumerate(pipeline.index.documents)}
    lists = []
    for q in asked:
        found = pipeline.rerank(q.query, pipeline.retrieve(q.query))[0]
        gold = [number[name] for name in sorted(q.answers)]
        right = [d for d in found if d in gold] or gold  # not found: the label itself
        lists.append((q, right, [d for d in found if d not in gold][: 2 * NEGATIVES]))
    parts = [
        {"params": model.body.parameters(), "lr": 5e-5},
        {"params": [*model.head.parameters(), model.scale], "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.01)
    steps = epochs * -(-len(lists) // batch)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / (0.1 * steps)) * (1 - s / steps))
    losses = []
    for _ in range(epochs):
        order = dice.permutation(len(lists))
        for start in range(0, len(order), batch):
            part, total = order[start : start + batch], 0.0
            for i in part:
                q, right, wrong = lists[i]
                chosen = [dice.choice(right), *dice.permutation(wrong)[:NEGATIVES]]
                scores = model(q.query, [shown(pipeline, q, int(d)) for d in chosen])
                loss = -scores.log_softmax(0)[0] / len(part)
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), rate.step(), optimizer.zero_grad()
            losses.append(round(total, 3))
            print(f"step {len(losses)} of {steps}: loss {total:.2f}", flush=True)
    return model.eval(), losses


def main(few: int = 0) -> None:
    lab.words = functools.cache(lab.words)  # the documents' words, once
    pipeline = lab.Pipeline(load())
    dev, test = ([q for q in queries(s) if q.answers][: few or None] for s in ("dev", "test"))
    start = time.process_time()
    cross, losses = train(pipeline, dev)
    seconds = {"training": round(time.process_time() - start, 1)}
    rows = []
    for q in test:
        first = pipeline.rerank(q.query, pipeline.retrieve(q.query))[0][:DEPTH]
        texts = [shown(pipeline, q, d) for d in first]
        start = time.process_time()
        with torch.inference_mode():
            scores = cross(q.query, texts).tolist()
        seconds["scoring"] = seconds.get("scoring", 0) + time.process_time() - start
        rows.append(
            {
                "id": q.id,
                "first": [pipeline.index.documents[d].name for d in first],
                "cross-encoder": " ".join(f"{s:.3f}" for s in scores),
            }
        )
    content = {
        "what": "scores of the lab's first ten test candidates",
        "training": {"questions": len(dev), "negatives": NEGATIVES, "losses": losses},
        "cpu_seconds": {name: round(s, 1) for name, s in seconds.items()},
        "pairs": {"scored": DEPTH * len(test)},
        "rows": rows,
    }
    if few:
        print(content)
    else:
        record("reranking", content)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
