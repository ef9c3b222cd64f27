"""From a question to a cited answer or a refusal, each stage timed.

retrieve: BM25 and MiniLM side by side, merged by reciprocal ranks.
rerank:   a linear score over what is known of each candidate, its weights learned on the development questions.
decide:   the chance that the first document answers, by a logistic model; below a threshold, the system refuses.
read:     SmolLM2 answers from the best passages.
verify:   a sentence that says what its passages do not is replaced by the passage's own sentence.

The learned numbers stand in tuned.json, written by ``python -m labs.rag.experiments``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from bm25s.stopwords import STOPWORDS_EN_PLUS

from labkit.hardware import quick_dtype
from labkit.models import smollm2
from labs.rag.index import Index, words

TUNED = Path(__file__).with_name("tuned.json")
CANDIDATES = 20  # documents that each search hands on
# words that carry no topic
STOP = frozenset(STOPWORDS_EN_PLUS)


def fuse(rankings: Iterable[list[int]], k: int = 60) -> list[int]:
    """Reciprocal-rank fusion: documents by the sum of 1 / (k + rank), ranks from 1.

    Source: Cormack, Clarke and Büttcher, SIGIR 2009, https://doi.org/10.1145/1571941.1572114
    """
    score: dict[int, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, 1):
            score[document] = score.get(document, 0.0) + 1 / (k + rank)
    return sorted(score, key=lambda d: (-score[d], d))


@dataclass
class Answer:
    """What the system says: ``text`` with the numbers of its citations, or a refusal without any."""

    text: str
    citations: list[str]  # names of the documents, in the order of their numbers
    confidence: float  # the chance that the first document answers
    refused: bool
    seconds: dict[str, float] = field(default_factory=dict)  # stage: time; "first token" runs from the question
    trace: list[str] = field(default_factory=list)  # what each stage decided, for people


class Pipeline:
    def __init__(self, index: Index, tuned: dict | None = None):
        self.index = index
        self.tuned = json.loads(TUNED.read_text(encoding="utf-8")) if tuned is None else tuned
        self.rows: list[list[int]] = [[] for _ in index.documents]  # the chunks of each document
        for row, document in enumerate(index.owner):
            self.rows[document].append(row)

    @cached_property
    def matrix(self) -> np.ndarray:
        return self.index.vectors.reconstruct_n(0, self.index.vectors.ntotal)

    @cached_property
    def reader(self):
        return smollm2(dtype=quick_dtype())

    # -- retrieval --------------------------------------------------------------------------------------------------

    def retrieve(self, query: str) -> list[int]:
        """Candidates by both searches, merged: at most twice CANDIDATES documents."""
        dense = [d for d, _ in self.index.dense(query, CANDIDATES)]
        sparse = [d for d, _ in self.index.sparse(query, CANDIDATES)]
        return fuse([dense, sparse])

    def features(self, query: str, candidates: list[int]) -> np.ndarray:
        """One row a candidate, see FEATURES. Cosines and BM25 scores are computed for all, whichever search found them."""
        vector = self.index.encoder.encode(query, normalize_embeddings=True)
        bm25 = self.index.lexical.get_scores(words(query))
        asked = {w for w in words(query) if w not in STOP}
        ceiling = bm25.max() or 1.0
        table = []
        for rank, d in enumerate(candidates, 1):
            document = self.index.documents[d]
            cosines = np.sort(self.matrix[self.rows[d]] @ vector)[::-1]
            name, last = set(words(document.name)), document.name.rpartition(".")[2].lower()
            table.append(
                (
                    cosines[0],
                    float(cosines[:3].mean()),
                    bm25[d] / ceiling,
                    1 / (10 + rank),
                    len(asked & name) / max(1, len(asked)),
                    len(asked & set(words(document.text))) / max(1, len(asked)),
                    float(last in words(query) and "_" in last),
                    float(document.package == "torch"),
                    document.name.count("."),
                    np.log(len(document.text)),
                )
            )
        return np.array(table, dtype=float).reshape(len(candidates), len(FEATURES))

    def rerank(self, query: str, candidates: list[int]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(documents, scores, features) by the learned score, best first."""
        features = self.features(query, candidates)
        scores = features @ np.array([self.tuned["rerank"][name] for name in FEATURES])
        order = np.argsort(-scores, kind="stable")
        return [candidates[i] for i in order], scores[order], features[order]

    # -- deciding ---------------------------------------------------------------------------------------------------

    def signals(self, query: str, scores: np.ndarray, features: np.ndarray) -> np.ndarray:
        """What tells an answerable question, see SIGNALS; from the reranked candidates of one question."""
        asked = [w for w in dict.fromkeys(words(query)) if w not in STOP]
        known = sum(w in self.index.lexical.vocab_dict for w in asked) / max(1, len(asked))
        first, coverage = features[0], features[:, FEATURES.index("share of the question's words in the text")]
        return np.array(
            [
                first[0],
                scores[0],
                scores[0] - scores[min(1, len(scores) - 1)],
                first[2],
                first[5],
                coverage.max(),
                known,
            ]
        )

    def confidence(self, signals: np.ndarray) -> float:
        """The chance that the first document answers: a logistic model of the signals."""
        model = self.tuned["decide"]
        z = sum(model[name] * value for name, value in zip(SIGNALS, signals, strict=True)) + model["constant"]
        return float(1 / (1 + np.exp(-z)))

    # -- reading and verifying --------------------------------------------------------------------------------------

    def passage(self, query: str, document: int) -> str:
        """The chunk of a document that is nearest to the question."""
        rows = self.rows[document]
        vector = self.index.encoder.encode(query, normalize_embeddings=True)
        return self.index.passages[rows[int(np.argmax(self.matrix[rows] @ vector))]]

    def generate(self, query: str, documents: list[int], passages: list[str], most: int = 48) -> Iterator[str]:
        """SmolLM2's answer, token by token, greedily; it ends with the first paragraph."""
        model, tokenizer = self.reader
        shown = "\n\n".join(
            f"{self.index.documents[d].name}{self.index.documents[d].signature[:100]}\n{p}"
            for d, p in zip(documents, passages, strict=True)
        )
        chat = [
            {"role": "system", "content": "Answer the question in one sentence, using only the documentation."},
            {"role": "user", "content": f"Documentation:\n{shown}\n\nQuestion: {query}"},
        ]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        cache, said = None, []
        with torch.inference_mode():
            for _ in range(most):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                said.append(int(ids))
                text = tokenizer.decode(said, skip_special_tokens=True)
                if said[-1] == tokenizer.eos_token_id or "\n\n" in text:
                    return
                yield text

    def supported(self, sentence: str, evidence: str) -> bool:
        """Whether the evidence has all names and numbers of the sentence, and at least 60 % of its other words.

        A necessary condition only: the same words may say the opposite.
        """
        there = set(words(evidence))
        strict = {w.lower() for w in re.findall(r"\w*(?:_\w+|\d\w*|[a-z][A-Z]\w*)", sentence)}
        plain = {w for w in words(sentence) if w not in STOP and w not in strict}
        return strict <= there and len(plain & there) >= 0.6 * len(plain)

    def quote(self, query: str, passage: str) -> str:
        """The sentence of a passage that is nearest to the question."""
        sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+(?=[A-Z`:])|\n\s*\n", passage)]
        sentences = [s for s in sentences if len(s) > 20] or [" ".join(passage.split())]
        vectors = self.index.encoder.encode([query, *sentences], normalize_embeddings=True)
        return sentences[int(np.argmax(vectors[1:] @ vectors[0]))]

    # -- the whole --------------------------------------------------------------------------------------------------

    def answer(self, query: str) -> Answer:
        """Answer from the corpus with citations, or refuse. Raises ``ValueError`` for an empty or endless question."""
        query = check_question(query)
        result = Answer("", [], 0.0, False)
        begin = time.perf_counter()

        @contextmanager
        def stage(name: str):
            start = time.perf_counter()
            yield
            result.seconds[name] = time.perf_counter() - start

        with stage("retrieve"):
            candidates = self.retrieve(query)
        with stage("rerank"):
            ranked, scores, features = self.rerank(query, candidates)
        result.trace += [f"{s:6.2f}  {self.index.documents[d].name}" for d, s in zip(ranked[:5], scores, strict=False)]
        with stage("decide"):
            result.confidence = self.confidence(self.signals(query, scores, features))
        result.trace.append(f"confidence {result.confidence:.2f}, threshold {self.tuned['threshold']:.2f}")
        if result.confidence < self.tuned["threshold"]:
            result.refused = True
            result.text = "I do not find an answer to this in the documentation of torch and transformers."
            return result
        with stage("read"):
            top = ranked[:2]
            passages = [self.passage(query, d) for d in top]
            said = ""
            for text in self.generate(query, top, passages):
                said = text
                result.seconds.setdefault("first token", time.perf_counter() - begin)
        with stage("verify"):
            self._verify(query, said, top, passages, result)
        return result

    def _verify(self, query: str, said: str, top: list[int], passages: list[str], result: Answer) -> None:
        """Keep the sentences that one passage supports and cite it; where none is left, quote the first passage."""
        kept, cited = [], []
        for sentence in re.findall(
            r"[^.!?]+(?:[.!?](?!\s)[^.!?]*)*[.!?](?=\s|$)", said
        ):  # a cut-off end is no sentence
            for d, passage in zip(top, passages, strict=True):
                if self.supported(
                    sentence, f"{self.index.documents[d].name} {self.index.documents[d].signature} {passage}"
                ):
                    cited += [] if d in cited else [d]
                    kept.append(f"{sentence.strip()} [{cited.index(d) + 1}]")
                    break
            else:
                result.trace.append(f"not supported: {sentence.strip()!r}")
        if not kept:
            cited = top[:1]
            kept = [f'{self.index.documents[top[0]].name}: "{self.quote(query, passages[0])}" [1]']
        result.text, result.citations = " ".join(kept), [self.index.documents[d].name for d in cited]


def check_question(query: str) -> str:
    """The question without control characters and outer white space. Raises ``ValueError`` if nothing can be searched."""
    query = " ".join("".join(c if c.isprintable() else " " for c in query).split())
    if not words(query):
        raise ValueError("the question is empty: ask something in words")
    if len(query) > 1000:
        raise ValueError(f"the question has {len(query):,} characters; the limit is 1,000")
    return query


FEATURES = (
    "cosine of the nearest chunk",
    "mean cosine of the three nearest chunks",
    "BM25 over the best BM25",
    "reciprocal fused rank",
    "share of the question's words in the name",
    "share of the question's words in the text",
    "the question names it",
    "is in torch",
    "depth of the name",
    "log length",
)
SIGNALS = (
    "cosine of the first",
    "score of the first",
    "lead over the second",
    "BM25 of the first over the best",
    "share of the question's words in the first",
    "largest share in any candidate",
    "share of the question's words that the corpus knows",
)
