"""python -m labs.rag.judge: claims that a passage supports and claims that it does not, put to a small model as a judge.

From 24 random passages one sentence each: verbatim, negated, with another number, and the sentence of another passage.
SmolLM2 is asked whether the passage supports the claim; the score is ln p(Yes) - ln p(No). Writes results/judge.json with
the claims, on which a rule of words can be tried too. About a minute and a half of one core.
"""

from __future__ import annotations

import re
import time

import numpy as np
import torch

from labkit.models import smollm2
from labs.rag.experiments import record
from labs.rag.index import load

PASSAGES = 24
VERB = re.compile(r" (is|are|must|should|will|was|were) (?!not\b)")
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.]*\w)")


def sentences(passage: str) -> list[str]:
    """Whole sentences of 40 to 200 characters, on one line."""
    found = re.findall(r"(?:(?<=[.!?]\s)|(?<=\n\n))[A-Z][^.!?]*(?:[.!?](?!\s)[^.!?]*)*[.!?](?=\s)", passage)
    found = [" ".join(s.split()) for s in found]
    return [s for s in found if 40 <= len(s) <= 200 and not re.search(r">>>|::|Args|Example", s)]


def usable(sentence: str, passage: str) -> bool:
    """It can be negated and has a number that can be changed into one that the passage has not."""
    number = NUMBER.search(sentence)
    return bool(number and VERB.search(sentence)) and str(int(number[0]) + 3) not in passage


def variants(sentence: str, foreign: str) -> dict[str, str]:
    return {
        "verbatim": sentence,
        "negated": VERB.sub(r" \1 not ", sentence, count=1),
        "another number": NUMBER.sub(lambda m: str(int(m[0]) + 3), sentence, count=1),
        "another passage's": foreign,
    }


def claims(passages: list[str], seed: int = 0) -> list[tuple[int, dict[str, str]]]:
    """(chunk, four claims) of random chunks, no two with the same sentence."""
    picked: dict[str, int] = {}
    for i in np.random.default_rng(seed).permutation(len(passages)):
        sentence = next((s for s in sentences(passages[i]) if usable(s, passages[i])), None)
        if sentence and sentence not in picked:
            picked[sentence] = int(i)
        if len(picked) == PASSAGES:
            break
    said = list(picked)
    return [(picked[s], variants(s, said[n - 1])) for n, s in enumerate(said)]


@torch.inference_mode()
def judge(model, tokenizer, passage: str, asked: list[str]) -> list[float]:
    """ln p(Yes) - ln p(No) of each claim."""
    scores = []
    for claim in asked:
        chat = [
            {
                "role": "user",
                "content": f"Documentation:\n{passage}\n\nClaim: {claim}\n\n"
                "Does the documentation support the claim? Answer Yes or No.",
            }
        ]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        logits = model(ids["input_ids"], logits_to_keep=1).logits[0, -1].float()
        yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
        scores.append(round((logits[yes] - logits[no]).item(), 3))
    return scores


def main() -> None:
    index, start = load(), time.process_time()
    model, tokenizer = smollm2(dtype=torch.bfloat16)
    rows = []
    for chunk, made in claims(index.passages):
        passage = index.passages[chunk]
        scores = judge(model, tokenizer, passage, list(made.values()))
        rows.append({"chunk": chunk, "claims": made, "scores": dict(zip(made, scores, strict=True))})
        print(rows[-1]["scores"], flush=True)
    record("judge", {"what": "ln p(Yes) - ln p(No)", "CPU seconds": round(time.process_time() - start), "rows": rows})


if __name__ == "__main__":
    main()
