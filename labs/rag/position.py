"""python -m labs.rag.position: does it matter where among seven passages the right one stands?

For each question: the right passage first, in the middle and last among six distractors, and in its place a passage of
another question. The score is the mean log-probability a token of the expected words. What the reader would say anyway
is in both, so the gain, right minus other at the same place, is what the passage gives. Writes results/position.json;
about four minutes of one core.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import DynamicCache

from labs.rag.evaluation import Query, bootstrap, queries
from labs.rag.experiments import expected, record
from labs.rag.index import load
from labs.rag.pipeline import Pipeline
from labs.rag.reading import holding, prompt

SLOTS, LENGTH, QUESTIONS = 7, 300, 16  # passages in a prompt, characters of one, test questions
PLACES = {"first": 0, "middle": SLOTS // 2, "last": SLOTS - 1}


def around(text: str, q: Query) -> str:
    """At most LENGTH characters of a passage, around the expected words if it has them."""
    places = [m.start() for e in q.expect if (m := re.search(rf"(?<!\w){re.escape(e)}(?!\w)", text, re.IGNORECASE))]
    begin = max(0, min(places, default=0) - LENGTH // 2)
    return text[begin : begin + LENGTH]


def cut(shown: str, q: Query) -> str:
    """A passage with its heading, cut."""
    head, _, text = shown.partition("\n")
    return f"{head.partition('(')[0]}\n{around(text, q)}"


class Scorer:
    """Log-probabilities of an answer; what a prompt shares with the one before is not computed again."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.ids: list[int] = []
        self.cache = DynamicCache()

    @torch.inference_mode()
    def __call__(self, question: str, passages: list[str], answer: str) -> float:
        """Mean log-probability of a token of the answer, in nats."""
        said = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = prompt(self.tokenizer, question, "\n\n".join(passages))[0].tolist() + said
        both = zip(ids[: -len(said) - 1], self.ids, strict=False)
        same = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids) - len(said) - 1, len(self.ids)))
        if surplus := len(self.ids) - same:
            self.cache.crop(-surplus)
        out = self.model(
            torch.tensor([ids[same:]]), past_key_values=self.cache, use_cache=True, logits_to_keep=len(said) + 1
        )
        self.ids = ids
        scores = out.logits[0, :-1].float().log_softmax(-1)
        return scores.gather(1, torch.tensor(said)[:, None]).mean().item()


def material(pipeline: Pipeline) -> Iterator[tuple[Query, str, list[str], str]]:
    """(question, right passage, distractors, another question's passage) of QUESTIONS random test questions."""
    rng = np.random.default_rng(0)
    able = [q for q in queries("test") if q.answers]
    held = {q: cut(holding(pipeline, q), q) for q in able}
    able = [q for q in able if expected(held[q].partition("\n")[2], q)]
    asked = [able[i] for i in sorted(rng.permutation(len(able))[:QUESTIONS])]
    for n, q in enumerate(asked):
        ranked = pipeline.rerank(q.query, pipeline.retrieve(q.query))[0]
        names = [pipeline.index.documents[d].name for d in ranked]
        found = [f"{name}\n{around(pipeline.passage(q.query, d), q)}" for name, d in zip(names, ranked, strict=True)]
        near = [t for t, name in zip(found, names, strict=True) if name not in q.answers and not expected(t, q)]
        near = near[: SLOTS - 1]
        other = next(held[o] for o in (*asked[n + 1 :], *asked[:n]) if not expected(held[o], q))
        yield q, held[q], [near[i] for i in np.random.default_rng(n).permutation(len(near))], other


def main() -> None:
    pipeline, start = Pipeline(load()), time.process_time()
    scorer, rows, example = Scorer(*pipeline.reader), [], {}
    for q, right, near, other in material(pipeline):
        example = example or {"question": q.query, "right": right, "distractors": near, "other": other}
        row = {"id": q.id, "kind": q.kind, "expect": q.expect[0]}
        for place, slot in reversed(PLACES.items()):  # from the last place: the longest shared beginnings
            for name, passage in (("right", right), ("other", other)):
                score = scorer(q.query, [*near[:slot], passage, *near[slot:]], q.expect[0])
                row[f"{name}, {place}"] = round(score, 3)
        row["right, alone"] = round(scorer(q.query, [right], q.expect[0]), 3)
        rows.append(row)
        print(row, flush=True)
    gain = {f"gain, {p}": [row[f"right, {p}"] - row[f"other, {p}"] for row in rows] for p in PLACES}
    measured = {k: [row[k] for row in rows] for k in rows[0] if k not in ("id", "kind", "expect")} | gain
    summary = {k: [round(float(np.mean(v)), 3), *np.round(bootstrap(v), 3).tolist()] for k, v in measured.items()}
    print(summary)
    seconds = round(time.process_time() - start)
    record(
        "position",
        {"what": "nats a token", "CPU seconds": seconds, "summary": summary, "rows": rows} | {"example": example},
    )


if __name__ == "__main__":
    main()
