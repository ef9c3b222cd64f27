"""The questions with their answers, and how rankings are scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

QUERIES = Path(__file__).with_name("queries.jsonl")


@dataclass(frozen=True)
class Query:
    id: str
    split: str  # dev or test: nothing is chosen on test
    kind: str  # howto, what, symptom, choose, lexical; unanswerable: outside, near, private
    query: str
    answers: frozenset[str]  # names of all documents that answer; empty: the corpus does not answer
    expect: tuple[str, ...]  # a right answer contains one of these
    zh: str | None = None
    paraphrase: str | None = None


def queries(split: str | None = None) -> list[Query]:
    """The question set, all of it or one split."""
    rows = [json.loads(line) for line in QUERIES.read_text(encoding="utf-8").splitlines()]
    made = [Query(**row | {"answers": frozenset(row["answers"]), "expect": tuple(row["expect"])}) for row in rows]
    return [q for q in made if split in (None, q.split)]


def first_hit(ranking: Sequence[str], answers: frozenset[str]) -> float:
    """The rank, from 1, of the first document that answers; infinity if none does."""
    return next((float(rank) for rank, name in enumerate(ranking, 1) if name in answers), float("inf"))


def ndcg(ranking: Sequence[str], answers: frozenset[str], k: int = 10) -> float:
    """Discounted gain of the first k over that of an ideal ranking; a document answers or does not.

    The discount is 1 / log₂(1 + rank), as in scikit-learn's ``ndcg_score``; Järvelin and Kekäläinen, TOIS 2002
    (https://doi.org/10.1145/582415.582418), who introduced the measure, discount from the second rank on.
    """
    gains = np.array([name in answers for name in ranking[:k]], dtype=float)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    return float(gains @ discounts[: len(gains)] / discounts[: min(k, len(answers))].sum())


def bootstrap(
    values: Sequence[float], statistic: Callable = np.mean, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a statistic over questions, by drawing questions with replacement."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (n, len(values)))
    low, high = np.percentile([statistic(values[d]) for d in draws], [2.5, 97.5])
    return float(low), float(high)


def scores(rankings: Sequence[Sequence[str]], asked: Sequence[Query]) -> dict[str, list[float]]:
    """Per question: recall@1, @5, @10, @20 (is an answering document among the first k), reciprocal rank, nDCG@10."""
    hits = np.array([first_hit(r, q.answers) for r, q in zip(rankings, asked, strict=True)])
    made = {f"recall@{k}": (hits <= k).astype(float).tolist() for k in (1, 5, 10, 20)}
    made["MRR"] = (1 / hits).tolist()
    made["nDCG@10"] = [ndcg(r, q.answers) for r, q in zip(rankings, asked, strict=True)]
    return made
