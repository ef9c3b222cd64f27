"""python -m labs.rag.failures: the reader on all test questions, with what was retrieved and with the right passage.

First from the two passages that the pipeline ranks first. Where the answer then lacks what is expected, again with a
passage known to hold it in the first place. The refusal threshold is not applied here: the confidence is recorded, and
whoever reads the rows can set it anywhere. Writes results/failures.json; about eight minutes of one core.
"""

from __future__ import annotations

import time

import torch

from labs.rag import reading
from labs.rag.evaluation import queries
from labs.rag.experiments import expected, record
from labs.rag.index import load
from labs.rag.pipeline import Answer, Pipeline
from labs.rag.reading import holding

MOST, BATCH = 32, 16  # new tokens, prompts at once


def chat(pipeline: Pipeline, query: str, shown: str) -> list[int]:
    """The prompt of ``Pipeline.generate``: that method answers one question at a time."""
    return pipeline.reader[1].apply_chat_template(
        [
            {"role": "system", "content": "Answer the question in one sentence, using only the documentation."},
            {"role": "user", "content": f"Documentation:\n{shown}\n\nQuestion: {query}"},
        ],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]


def finished(row: list[int], tokenizer) -> str:
    """The text before the end mark or the end of the first paragraph."""
    row = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
    return tokenizer.decode(row, skip_special_tokens=True).partition("\n\n")[0]


@torch.inference_mode()
def generate(pipeline: Pipeline, prompts: list[list[int]]) -> list[str]:
    """Greedy continuations, prompts of like length together."""
    model, tokenizer = pipeline.reader
    said: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        longest = max(len(prompts[i]) for i in part)
        pad = [longest - len(prompts[i]) for i in part]
        ids = torch.tensor([[tokenizer.eos_token_id] * n + prompts[i] for n, i in zip(pad, part, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
        cache, made = None, torch.empty(len(part), 0, dtype=torch.long)
        while made.shape[1] < MOST and not (made == tokenizer.eos_token_id).any(1).all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made, mask = torch.cat([made, ids], 1), torch.cat([mask, torch.ones_like(ids)], 1)
        said |= {i: finished(row, tokenizer) for i, row in zip(part, made.tolist(), strict=True)}
        print(f"{start + len(part)} of {len(order)}", flush=True)
    return [said[i] for i in range(len(prompts))]


def verified(pipeline: Pipeline, query: str, said: str, rows: list[int]) -> dict:
    """What the pipeline makes of the reader's words: the text with its citations, and what it dropped."""
    made = Answer("", [], 0.0, False)
    owners, passages = [int(pipeline.index.owner[r]) for r in rows], [pipeline.index.passages[r] for r in rows]
    pipeline._verify(query, said, owners, passages, made)
    dropped = sum(line.startswith("not supported") for line in made.trace)
    return {"said": said, "text": made.text, "citations": made.citations, "dropped": dropped}


def main() -> None:
    pipeline, start = Pipeline(load()), time.process_time()
    index, asked = pipeline.index, queries("test")
    names = [d.name for d in index.documents]

    def shown(rows: list[int]) -> str:
        heads = [f"{names[d]}{index.documents[d].signature[:100]}" for d in index.owner[rows]]
        return "\n\n".join(f"{head}\n{index.passages[r]}" for head, r in zip(heads, rows, strict=True))

    def chunk(query: str, document: int) -> int:
        return next(r for r in pipeline.rows[document] if index.passages[r] == pipeline.passage(query, document))

    rows = []
    for q in asked:
        ranked, scores, features = pipeline.rerank(q.query, pipeline.retrieve(q.query))
        read = [chunk(q.query, d) for d in ranked[:2]]
        rank = next((i for i, d in enumerate(ranked, 1) if names[d] in q.answers), None)
        sure = pipeline.confidence(pipeline.signals(q.query, scores, features))
        holds = any(expected(shown([r]), q) for r in read)
        rows.append({"id": q.id, "confidence": round(sure, 4), "rank": rank, "rows": read, "passages hold it": holds})
    said = generate(pipeline, [chat(pipeline, q.query, shown(row["rows"])) for q, row in zip(asked, rows, strict=True)])
    for q, row, text in zip(asked, rows, said, strict=True):
        row |= verified(pipeline, q.query, text, row["rows"])
        row["says what is expected"] = expected(row["text"], q)

    # The failures again, with a passage that holds the answer in the first place.
    again = [(q, row) for q, row in zip(asked, rows, strict=True) if q.answers and not row["says what is expected"]]
    for q, row in again:
        candidates = [r for d, name in enumerate(names) if name in q.answers for r in pipeline.rows[d]]
        right = next(
            r for r in candidates if reading.shown(pipeline, index.owner[r], index.passages[r]) == holding(pipeline, q)
        )
        other = [r for r in row["rows"] if index.owner[r] != index.owner[right]]
        row["oracle"] = {"rows": [right, *other[:1]], "passages hold it": expected(shown([right, *other[:1]]), q)}
    said = generate(pipeline, [chat(pipeline, q.query, shown(row["oracle"]["rows"])) for q, row in again])
    for (q, row), text in zip(again, said, strict=True):
        row["oracle"] |= verified(pipeline, q.query, text, row["oracle"]["rows"])
        row["oracle"]["says what is expected"] = expected(row["oracle"]["text"], q)
    seconds = round(time.process_time() - start)
    record("failures", {"what": "the reader on every test question", "CPU seconds": seconds, "rows": rows})
    right = sum(row["says what is expected"] for row in rows)
    print(f"{right} of {sum(bool(q.answers) for q in asked)} right; {len(again)} read again, of them")
    print(sum(row["oracle"]["says what is expected"] for _, row in again), "right;", seconds, "CPU s")


if __name__ == "__main__":
    main()
