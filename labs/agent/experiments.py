"""python -m labs.agent.experiments: how many tasks a script and SmolLM2 solve, freely and held to the schema.

Writes results/tasks.json.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from labkit.hardware import machine
from labs.agent.journal import Journal
from labs.agent.loop import LOOPS, parse
from labs.agent.models import Local, Model, Reply, Scripted
from labs.agent.saga import Budget, begin
from labs.agent.shop import Shop, connect
from labs.agent.tasks import Task, tasks
from labs.vllm_throughput.__main__ import commit, write_json

RESULTS = Path(__file__).with_name("results")
EVERY = 3  # SmolLM2 tries every third task: each kind in its share, in minutes
BUDGET = Budget(turns=4, seconds=300.0)  # for SmolLM2, which seldom needs more turns to fail


class Watched:
    """A model whose replies are noted: do they follow the schema?"""

    def __init__(self, model: Model):
        self.model, self.valid, self.seconds = model, [], 0.0

    def reply(self, messages: list[dict], schema: dict) -> Reply:
        begin = time.perf_counter()
        reply = self.model.reply(messages, schema)
        self.seconds += time.perf_counter() - begin
        try:
            parse(reply.text, schema)
            self.valid.append(True)
        except ValueError:
            self.valid.append(False)
        return reply


def attempt(task: Task, model: Model, loop: str, budget: Budget) -> dict:
    """One task in a shop of its own; all that needs a person's approval gets it."""
    shop, journal, watched = Shop(connect(":memory:")), Journal(connect(":memory:")), Watched(model)
    before = shop.state()
    limits = {"budget": budget, "approve": lambda tool, arguments: True}
    run = begin(shop, journal, name=task.id, task=task.task, model="", **limits)
    LOOPS[loop](run, watched, task.task)
    made = {r["key"]: (r["tool"], r["args"]) for r in journal.all("intent", "read", "refused") if "tool" in r}
    wanted = [(call["tool"], call["args"]) for turn in task.turns for call in turn]
    end = journal.find("end")
    return {
        "id": task.id,
        "kind": task.kind,
        "solved": task.solved(before, shop.state(), journal),
        "replies": len(watched.valid),
        "valid": sum(watched.valid),
        "calls": len(wanted),
        "right tool": (Counter(t for t, _ in wanted) & Counter(t for t, _ in made.values())).total(),
        "right arguments": sum(call in made.values() for call in wanted),
        "tokens": sum(r["tokens"] for r in journal.all("said")),
        "seconds": round(watched.seconds, 2),
        "ended": end.get("answer") or end["why"],
    }


def summary(rows: list[dict]) -> dict:
    """Rates over all replies, over all calls of the reference solutions, and over all tasks, by their kind."""
    total = {name: sum(row[name] for row in rows) for name in ("replies", "valid", "calls", "tokens")}
    kinds = {
        kind: [row["solved"] for row in rows if row["kind"] == kind] for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    return {
        "valid replies": round(total["valid"] / max(1, total["replies"]), 4),
        "right tool": round(sum(row["right tool"] for row in rows) / total["calls"], 4),
        "right arguments": round(sum(row["right arguments"] for row in rows) / total["calls"], 4),
        "solved": [sum(row["solved"] for row in rows), len(rows)],
        "solved by kind": {kind: [sum(solved), len(solved)] for kind, solved in kinds.items()},
        "tokens": total["tokens"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def record(name: str, content: dict) -> None:
    """Write a result with what it depends on: device, versions, commit, date."""
    this = machine()
    origin = {
        "machine": {"device": this.name, "kind": this.device, "cores": this.cores, "memory_gib": this.memory_gib},
        "versions": {n: version(n) for n in ("torch", "transformers", "llguidance", "jsonschema")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", origin | content)


def main() -> None:
    free, held = Local(constrained=False, max_tokens=64), Local()
    settings = [
        *(("scripted", loop, lambda task, loop=loop: Scripted(task.script(loop)), 1, Budget()) for loop in LOOPS),
        *(("SmolLM2, constrained", loop, lambda task: held, EVERY, BUDGET) for loop in LOOPS),
        ("SmolLM2, free", "react", lambda task: free, EVERY, BUDGET),
    ]
    table, runs = [], {}
    for name, loop, model, every, budget in settings:
        rows = [attempt(task, model(task), loop, budget) for task in tasks()[::every]]
        table.append({"model": name, "loop": loop} | summary(rows))
        runs[f"{name}, {loop}"] = rows
        print(table[-1], flush=True)
        record("tasks", {"what": "rates over replies, reference calls and tasks", "table": table, "runs": runs})


if __name__ == "__main__":
    main()
