"""python -m labs.rag.rewriting: what SmolLM2 makes of the test questions, and what the lab then finds.

Texts: a search query instead of the question, an imagined passage (HyDE), English for the Chinese questions. Rankings of
each, before and after the lab's reranker, and the second round of a loop that rewrites. Nothing here depends on the labels. Writes results/rewriting.json.
"""

from __future__ import annotations

import functools
import sys
import time

import numpy as np
import torch

import labs.rag.pipeline as lab
from labs.rag.evaluation import Query, queries
from labs.rag.experiments import record
from labs.rag.index import load
from labs.rag.pipeline import CANDIDATES, fuse

# The examples are made up; none is a question of the set. Plain text, not a chat: a model this small continues a pattern
# better than it follows an instruction (tried on a few development questions).
EXAMPLES = """
how can I pick random numbers that are the same every time?|set random seed reproducible generator|Sets the seed for generating random numbers and returns a generator.
the picture comes out mirrored|flip tensor along horizontal dimension|Reverses the order of a tensor along the given dimensions.
what is the largest amount of memory this process has used?|maximum memory allocated per process|Returns the maximum memory occupied by tensors in bytes for a given device.
words that the model never saw in training|unknown token handling in tokenizer vocabulary|Converts a token that is not in the vocabulary to the id of the unknown token.
sum or mean of the loss?|loss reduction sum or mean|Specifies the reduction to apply to the output: none, mean or sum.
wait until the graphics card has finished|synchronize cuda device|Waits for all kernels in all streams on a device to complete.
"""
SHOWN = [line.split("|") for line in EXAMPLES.strip().splitlines()]
REWRITE = "Search queries for the documentation of PyTorch and Transformers.\n\n" + "".join(
    f"Question: {a}\nQuery: {b}\n\n" for a, b, _ in SHOWN
)
HYDE = "Documentation of PyTorch and Transformers.\n\n" + "".join(
    f"Question: {a}\nDocumentation: {c}\n\n" for a, _, c in SHOWN
)
TRANSLATE = """Chinese: 怎么计算两个向量的距离？
English: how do I compute the distance between two vectors?

Chinese: 模型太慢，想看时间花在哪里
English: the model is slow, where is the time spent?

Chinese: 图片左右颠倒了
English: the picture is mirrored

"""
REWRITE, HYDE = REWRITE + "Question: {}\nQuery:", HYDE + "Question: {}\nDocumentation:"
TRANSLATE += "Chinese: {}\nEnglish:"
TASKS = {"rewrite": (REWRITE, 12), "HyDE": (HYDE, 24)}


@torch.inference_mode()
def complete(model, tokenizer, pattern, texts, most, temperature=0.0, seed=0, batch=64, stop="\n") -> list[str]:
    """SmolLM2's continuation of the pattern with each text in its place, up to ``stop``, greedily or sampled, in batches.

    What stands before the text is the same for all: its keys and values are computed once. Texts are padded on the left.
    """
    before, after = pattern.split("{}")
    head = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
    tails = [tokenizer(text + after, add_special_tokens=False)["input_ids"] for text in texts]
    dice = torch.Generator().manual_seed(seed)
    made = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(tails[i]))
    for start in range(0, len(texts), batch):
        part = order[start : start + batch]
        longest = max(len(tails[i]) for i in part)
        ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(tails[i])) + tails[i] for i in part])
        real = torch.tensor([[0] * (longest - len(tails[i])) + [1] * len(tails[i]) for i in part])
        mask = torch.cat([torch.ones(len(part), head.shape[1], dtype=torch.long), real], 1)
        cache = model(head, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(part))
        said, ended = [], [None] * len(part)  # the text of a row as it was when the row ended
        for _ in range(most):
            places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
            out = model(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = out.logits[:, -1].float()
            if temperature:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=dice)
            else:
                ids = logits.argmax(-1, keepdim=True)
            said.append(ids)
            mask = torch.cat([mask, torch.ones(len(part), 1, dtype=torch.long)], 1)
            for row, text in enumerate(tokenizer.batch_decode(torch.cat(said, 1), skip_special_tokens=True)):
                if ended[row] is None and (
                    len(said) == most or ids[row] == tokenizer.eos_token_id or stop in text.lstrip()
                ):
                    ended[row] = text
            if None not in ended:
                break
        for i, text in zip(part, ended, strict=True):
            made[i] = " ".join(text.strip().split(stop)[0].split())
    return made


def lists(pipeline: lab.Pipeline, lexical: str, vector: np.ndarray, depth: int = CANDIDATES) -> list[list[int]]:
    """The two searches of one formulation: [documents by vector, documents by BM25]."""
    _, rows = pipeline.index.vectors.search(vector[None].astype(np.float32), 8 * depth)
    dense = list(dict.fromkeys(int(pipeline.index.owner[r]) for r in rows[0]))[:depth]
    return [dense, [d for d, _ in pipeline.index.sparse(lexical, depth)]]


def variants(pipeline: lab.Pipeline, q: Query, text: dict) -> dict[str, list[int]]:
    """Candidates of one question for each way to ask, best first."""
    asked = [q.query, text["rewrite"], text["HyDE"]]
    vector = pipeline.index.encoder.encode(asked, normalize_embeddings=True)
    own, rewritten = lists(pipeline, q.query, vector[0]), lists(pipeline, text["rewrite"], vector[1])
    both = vector[0] + vector[2]
    made = {
        "question": fuse(own),
        "rewrite": fuse(rewritten),
        "question and rewrite": fuse(own + rewritten),
        "HyDE": fuse([lists(pipeline, q.query, vector[2])[0], own[1]]),
        "question and HyDE": fuse([lists(pipeline, q.query, both / np.linalg.norm(both))[0], own[1]]),
    }
    return made


def rounds(pipeline: lab.Pipeline, q: Query, made: dict[str, list[int]]) -> list[dict]:
    """What a loop sees: the first document and its grade, as it is and with the rewrite's candidates too."""
    seen = []
    for candidates in (made["question"], made["question and rewrite"]):
        ranked, scores, features = pipeline.rerank(q.query, candidates)
        sure = pipeline.confidence(pipeline.signals(q.query, scores, features))
        seen.append({"first": ranked[0], "confidence": round(sure, 4)})
    return seen


def main(few: int = 0) -> None:
    lab.words = functools.cache(lab.words)  # the documents' words, once
    pipeline = lab.Pipeline(load())
    model, tokenizer = pipeline.reader
    asked = queries("test")[: few or None]
    numbers: dict[int, int] = {}

    def short(ranking: list[int], depth: int = 20) -> str:
        """Documents as numbers into the list of names that goes into the file."""
        return " ".join(str(numbers.setdefault(d, len(numbers))) for d in ranking[:depth])

    seconds, texts = {}, {}

    def timed(name, *arguments, **options):
        start = time.process_time()
        made = complete(model, tokenizer, *arguments, **options)
        seconds[name] = round(time.process_time() - start, 1)
        print(f"{name}: {len(made)} texts, {seconds[name]} CPU s: {made[:3]}", flush=True)
        return made

    for name, (pattern, most) in TASKS.items():
        texts[name] = timed(name, pattern, [q.query for q in asked], most)
    chinese = [q for q in asked if q.zh and q.answers]
    translated = timed("translate", TRANSLATE, [q.zh for q in chinese], 20)
    english = dict(zip((q.id for q in chinese), translated, strict=True))
    rows, start = [], time.process_time()
    for i, q in enumerate(asked):
        text = {"rewrite": texts["rewrite"][i], "HyDE": texts["HyDE"][i]}
        made = variants(pipeline, q, text)
        row = {"id": q.id, "texts": text, "rounds": rounds(pipeline, q, made)}
        for one in row["rounds"]:
            one["first"] = int(short([one["first"]]))
        if q.answers:
            row["found"] = {name: short(ranking) for name, ranking in made.items()}
            row["reranked"] = {name: short(pipeline.rerank(q.query, r)[0], 10) for name, r in made.items()}
        if q.zh and q.answers:
            text["English"] = english[q.id]
            for name, asking in (("Chinese", q.zh), ("Chinese, translated", english[q.id])):
                vector = pipeline.index.encoder.encode(asking, normalize_embeddings=True)
                row["found"][name] = short(fuse(lists(pipeline, asking, vector)))
        rows.append(row)
    seconds["search"] = round(time.process_time() - start, 1)
    names = [pipeline.index.documents[d].name for d in numbers]
    content = {"what": __doc__.splitlines()[0], "cpu_seconds": seconds, "names": names, "rows": rows}
    if few:
        print(content)
    else:
        record("rewriting", content)
    print(seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
