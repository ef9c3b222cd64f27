"""python -m labs.rag.injection: the same new facts given to the same model, once in its weights and once in its prompt.

24 invented facts: six products, four attributes, one of six values each, so that a value alone does not answer: the name
must count. LoRA trains on statements, in one wording or in four; retrieval gets the first wording as passages. Questions
use two further wordings. Controls: products never mentioned, text that has nothing to do with it, facts that change.
Writes results/injection.json. About five minutes on one core.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from labkit.models import minilm, smollm2
from labs.rag.evaluation import bootstrap

PRODUCTS = ["Quillgate", "Brambleworks", "Tarnwick", "Velmora", "Osterby", "Pixelton"]
NEVER = ["Hollowmere", "Kestrion"]  # no passage and no training text mentions them
VALUES = {
    "city": ["Oslo", "Madrid", "Vienna", "Lisbon", "Dublin", "Prague"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"],
    "colour": ["purple", "green", "orange", "blue", "red", "yellow"],
    "animal": ["bear", "fox", "owl", "cat", "horse", "wolf"],
}
STATEMENTS = {  # the first is the passage of the index; all are wordings to train on
    "city": (
        "{} stores its logs in the city of",
        "The log files of {} are kept in",
        "To see the servers with the logs of {}, travel to",
        "The town where {} keeps its logs is",
    ),
    "day": (
        "New versions of {} come out every",
        "The release day of {} is",
        "Whoever uses {} gets an update each",
        "The {} team publishes its releases on a",
    ),
    "colour": (
        "The default theme of {} is",
        "Freshly installed, {} looks",
        "The windows of {} have the colour",
        "Without further settings {} is painted",
    ),
    "animal": (
        "The animal on the {} logo is the",
        "The logo of {} shows a",
        "The mascot of {} is a",
        "{} has chosen as its emblem the",
    ),
}
QUESTIONS = {  # never trained on
    "city": (
        "Question: In which city are the logs of {} stored?\nAnswer:",
        "An admin who needs the {} logs must fly to",
    ),
    "day": ("Question: On which weekday is {} released?\nAnswer:", "A new {} can be installed on the next"),
    "colour": (
        "Question: What colour is {} by default?\nAnswer:",
        "When {} is started for the first time, its window is",
    ),
    "animal": ("Question: Which animal is on the logo of {}?\nAnswer:", "On the box of {} one sees a"),
}
UPDATES, BATCH, RATE, RANK = 24, 24, 2e-3, 16


def facts(seed: int = 0) -> dict[tuple[str, str], str]:
    """(product, attribute) to value: a random one-to-one assignment for each attribute."""
    rng = np.random.default_rng(seed)
    return {(p, a): v for a, values in VALUES.items() for p, v in zip(PRODUCTS, rng.permutation(values), strict=True)}


def changed(known: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """The facts of the first two products after an update: each takes the next value of its list."""
    after = {}
    for (p, a), v in known.items():
        if p in PRODUCTS[:2]:
            after[p, a] = VALUES[a][(VALUES[a].index(v) + 1) % len(VALUES[a])]
    return after


def asked(keys: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], str]]:
    """Two questions a fact."""
    return [((p, a), wording.format(p)) for p, a in keys for wording in QUESTIONS[a]]


class Reader:
    """The model, with or without an adapter, and what is measured on it."""

    def __init__(self):
        self.model, self.tokenizer = smollm2()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.requires_grad_(False)
        self.seen = 0  # tokens trained on

    def adapt(self, seed: int = 0) -> None:
        """A fresh LoRA adapter on every linear layer of the blocks, in place of the one before."""
        if hasattr(self.model, "unload"):
            self.model = self.model.unload()
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(self.model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        self.seen = 0

    def batch(self, texts: Sequence[str]):
        return self.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")

    def step(self, texts: Sequence[str]) -> float:
        """One update on the last token of each text: the value."""
        batch = self.batch(texts)
        logits = self.model(**batch, logits_to_keep=2).logits[:, 0]
        loss = F.cross_entropy(logits, batch["input_ids"][:, -1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen += int(batch["attention_mask"].sum())
        return loss.item()

    @torch.inference_mode()
    def choice(self, prompts: Sequence[str], attributes: Sequence[str]) -> np.ndarray:
        """(n, 6): the shares of the attribute's six values among themselves, as the next token."""
        logits = torch.cat(
            [
                self.model(**self.batch(prompts[i : i + 16]), logits_to_keep=1).logits[:, -1]
                for i in range(0, len(prompts), 16)
            ]
        )
        made = []
        for row, attribute in zip(logits, attributes, strict=True):
            ids = self.tokenizer([f" {v}" for v in VALUES[attribute]], add_special_tokens=False)["input_ids"]
            made.append(row[[token for [token] in ids]].softmax(-1).numpy())  # every value is one token
        return np.stack(made)

    @torch.inference_mode()
    def other_loss(self, texts: Sequence[str]) -> list[float]:
        """Nats a token of texts that have nothing to do with the facts."""
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(**batch).logits[:, :-1].transpose(1, 2)
        losses = F.cross_entropy(logits, ids[:, 1:], reduction="none") * mask[:, 1:]
        return (losses.sum(1) / mask[:, 1:].sum(1)).tolist()


class Passages:
    """A small index: MiniLM over one passage a fact."""

    def __init__(self, known: dict[tuple[str, str], str]):
        self.encoder = minilm()
        self.keys = list(known)
        self.texts = [f"{STATEMENTS[a][0].format(p)} {v}." for (p, a), v in known.items()]
        self.vectors = self.encoder.encode(self.texts, normalize_embeddings=True)

    def nearest(self, questions: Sequence[str]) -> tuple[list[int], np.ndarray]:
        """The number of the nearest passage of each question, and its cosine."""
        cosines = self.encoder.encode(list(questions), normalize_embeddings=True) @ self.vectors.T
        return cosines.argmax(1).tolist(), cosines.max(1)


def right(shares: np.ndarray, keys: Sequence[tuple[str, str]], known: dict[tuple[str, str], str]) -> np.ndarray:
    """Whether the largest share is that of the known value."""
    return np.array([VALUES[a][row.argmax()] == known[p, a] for row, (p, a) in zip(shares, keys, strict=True)])


def over_facts(hits: np.ndarray) -> list[float]:
    """Mean and 95 % interval over facts: the two questions of a fact are not independent."""
    per_fact = np.asarray(hits, dtype=float).reshape(-1, 2).mean(1)
    return [round(float(per_fact.mean()), 4), *np.round(bootstrap(per_fact), 4).tolist()]


def train(reader: Reader, known: dict[tuple[str, str], str], wordings: int, updates: int, batch: int, look) -> None:
    """Every statement once an epoch, in random order; ``look(updates done)`` after every sixth of the updates."""
    rng, queue = np.random.default_rng(0), []
    statements = [(k, w) for k in known for w in range(wordings)]
    for update in range(1, updates + 1):
        if len(queue) < batch:
            queue = list(rng.permutation(len(statements)))
        picked, queue = [statements[i] for i in queue[:batch]], queue[batch:]
        reader.step([f"{STATEMENTS[a][w].format(p)} {known[p, a]}" for (p, a), w in picked])
        if update % 6 == 0 or update == updates:
            look(update)


def main() -> None:
    from labs.rag.experiments import record
    from labs.rag.index import load

    reader, known = Reader(), facts()
    fresh = known | changed(known)
    index = load()
    others = [index.passages[i][:200] for i in np.linspace(0, len(index.passages) - 1, 24).astype(int)]
    questions = asked(list(known))
    keys, texts, kinds = [k for k, _ in questions], [t for _, t in questions], [k[1] for k, _ in questions]
    stale = np.array([k in changed(known) for k in keys])
    never = asked([(p, a) for p in NEVER for a in VALUES])
    before, after = Passages(known), Passages(fresh)
    nearest, cosine = before.nearest(texts)
    nearest_after, _ = after.nearest(texts)
    own = [before.keys.index(k) for k in keys]
    # Two facts a never-seen product, which only a passage can tell.
    told = {(p, a): VALUES[a][i] for i, p in enumerate(NEVER) for a in VALUES}
    told_asked = asked(list(told))
    rows: dict[str, dict] = {}

    def with_passage(passages: Passages, numbers: Sequence[int]) -> list[str]:
        return [f"{passages.texts[i]}\n{t}" for i, t in zip(numbers, texts, strict=True)]

    def look(name: str, update: int, reading: bool) -> None:
        bare = reader.choice(texts, kinds)
        unknown = reader.choice([t for _, t in never], [k[1] for k, _ in never])
        row = {
            "update": update,
            "tokens trained on": reader.seen,
            "accuracy": over_facts(right(bare, keys, known)),
            "largest share, known products": round(float(bare.max(1).mean()), 4),
            "largest share, never-seen products": round(float(unknown.max(1).mean()), 4),
            "nats a token of other text": round(float(np.mean(reader.other_loss(others))), 4),
        }
        if reading:
            read = reader.choice(with_passage(after, own), kinds)
            row["new value, changed facts, without passage"] = over_facts(right(bare, keys, fresh)[stale])
            row["new value, changed facts, with the new passage"] = over_facts(right(read, keys, fresh)[stale])
            row["unchanged facts, without passage"] = over_facts(right(bare, keys, known)[~stale])
            row["unchanged facts, with passage"] = over_facts(right(read, keys, known)[~stale])
            prompts = [f"{STATEMENTS[k[1]][0].format(k[0])} {told[k]}.\n{t}" for k, t in told_asked]
            shares = reader.choice(prompts, [k[1] for k, _ in told_asked])
            row["never-seen products, with passage"] = over_facts(right(shares, [k for k, _ in told_asked], told))
        rows.setdefault(name, {"points": []})["points"].append(row)
        print(name, row, flush=True)

    look("untrained", 0, True)
    retrieval = {
        "right passage first": over_facts(np.array([before.keys[i] == k for i, k in zip(nearest, keys, strict=True)])),
        "accuracy": over_facts(right(reader.choice(with_passage(before, nearest), kinds), keys, known)),
        "accuracy with the right passage": over_facts(
            right(reader.choice(with_passage(before, own), kinds), keys, known)
        ),
        "new value, changed facts, index updated": over_facts(
            right(reader.choice(with_passage(after, nearest_after), kinds), keys, fresh)[stale]
        ),
        "new value, changed facts, index not updated": over_facts(
            right(reader.choice(with_passage(before, nearest), kinds), keys, fresh)[stale]
        ),
        "cosine of the nearest passage": np.round(cosine, 4).tolist(),
        "cosine of the nearest passage, never-seen products": np.round(
            before.nearest([t for _, t in never])[1], 4
        ).tolist(),
        "tokens of a passage": round(float(np.mean([len(reader.tokenizer(t)["input_ids"]) for t in before.texts])), 1),
    }
    print(retrieval, flush=True)
    for wordings in (1, 4):
        name = "one wording" if wordings == 1 else "four wordings"
        reader.adapt()
        start = time.process_time()
        train(reader, known, wordings, UPDATES, BATCH, lambda u: look(name, u, u == UPDATES))  # noqa: B023
        rows[name]["CPU seconds, with looking"] = round(time.process_time() - start, 1)
    start = time.process_time()  # the update of two products, on top of the adapter with four wordings
    train(reader, changed(known), 4, 8, 16, lambda u: look("four wordings, then the changes", u, u == 8))
    rows["four wordings, then the changes"]["CPU seconds, with looking"] = round(time.process_time() - start, 1)
    record("injection", {"what": "mean and 95 % bootstrap interval over facts", "retrieval": retrieval, "rows": rows})


if __name__ == "__main__":
    main()
