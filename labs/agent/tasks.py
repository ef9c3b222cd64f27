"""The task set, and how a run is judged: by what the shop looks like afterwards and what was answered, not by the calls."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from labs.agent.journal import Journal
from labs.agent.shop import State, outcome

TASKS = Path(__file__).with_name("tasks.jsonl")


@dataclass(frozen=True)
class Task:
    id: str
    kind: str  # ask, one (effect, ids given), lookup (names to look up first), several (effects), impossible
    task: str
    turns: list[list[dict]]  # one good way: the calls of each turn
    expect: State  # paths of `outcome` that must have changed, to their new values; None: gone
    says: list[str]  # each must be in the answer; "2|two" is either
    answer: str | None = None
    reason: str | None = None  # of an impossible task: instead of an answer

    def script(self, loop: str) -> list:
        """What a scripted model says to solve it."""
        if loop == "react":
            last = {"tool": "finish", "args": {"answer": self.answer}}
            if self.reason:
                last = {"tool": "give_up", "args": {"reason": self.reason}}
            return [{"calls": calls} for calls in [*self.turns, [last]]]
        if self.reason:
            return [{"steps": [{"tool": "give_up", "args": {"reason": self.reason}, "after": []}]}]
        steps: list[dict] = []
        before: list[int] = []
        for calls in self.turns:  # the calls of a turn at the same time, after those of the turn before
            steps += [call | {"after": before} for call in calls]
            before = list(range(len(steps) - len(calls) + 1, len(steps) + 1))
        return [{"steps": steps}, {"answer": self.answer}]

    def solved(self, before: State, after: State, journal: Journal) -> bool:
        """Whether the shop is as it should be, and the answer right. Of an impossible task: given up, not run aground."""
        end = journal.find("end") or {}
        if self.reason:
            return after == before and end.get("status") == "rolled back" and not end["why"].startswith("stopped")
        right = {p: v for p, v in (outcome(before) | self.expect).items() if v is not None}
        said = end.get("answer", "")
        return outcome(after) == right and all(re.search(rf"(?i)(?<!\w)({s})(?!\w)", said) for s in self.says)


def tasks() -> list[Task]:
    return [Task(**json.loads(line)) for line in TASKS.read_text(encoding="utf-8").splitlines()]
