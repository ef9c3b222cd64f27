"""What a run meant to do and what came of it: an append-only log, each record bound to the one before by a hash.

The order of writing is the whole idea. A decision is in the log before anything is done about it, and what came of it after:

    intent     → (the shop acts)        → receipt, or refused
    withdraw   → (the shop undoes it)   → undone          one call whose answer never came
    rollback   → (the shop undoes all)  → undone …, end
    commit     → (what was held is sent) → receipt …, end

A process that dies anywhere leaves a log whose last decision says what to do next.

What the chain proves: a record that is altered, taken out, put in or moved changes every later hash, so whoever kept the
head (the last hash) elsewhere sees it. What it does not prove: somebody who may write the file can compute a whole new
chain, or cut off the end. So `--audit` shows the head, to be kept where the writer cannot reach it, and compares the log
with what the shop itself remembers.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable

from labs.agent.shop import Shop, State

GENESIS = "0" * 64
ENDED = ("done", "rolled back")
TABLE = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""


class Tampered(Exception):
    """The log is not the one that was written, or does not explain the shop's state."""


class Journal:
    """The log of one run. Opening it verifies it: ``Tampered`` if it was changed. Threads may share one."""

    def __init__(self, db: sqlite3.Connection, listen: Callable[[dict], None] = lambda record: None):
        db.executescript(TABLE)
        self.db, self.listen, self._lock = db, listen, threading.Lock()
        self.records, self.head = verify(db.execute("SELECT seq, body, hash FROM log ORDER BY seq").fetchall())

    def append(self, kind: str, **fields) -> dict:
        """Write a record; it is on the disk when this returns."""
        with self._lock:
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            record = {"seq": len(self.records) + 1, "kind": kind, "time": time, **fields}
            body = json.dumps(record, sort_keys=True)
            head = link(self.head, body)
            self.db.execute("INSERT INTO log VALUES (?, ?, ?)", [record["seq"], body, head])
            self.records.append(record)
            self.head = head
            self.listen(record)
            return record

    def all(self, *kinds: str) -> list[dict]:
        return [record for record in list(self.records) if record["kind"] in kinds]

    def find(self, kind: str, key: str | None = None) -> dict | None:
        """The last record of a kind, or of a kind and key."""
        return next((r for r in reversed(self.all(kind)) if key is None or r["key"] == key), None)

    @property
    def status(self) -> str:
        """What the log says about its run: running, committing, done, rolling back, rolled back."""
        last = (self.all("begin", "commit", "rollback", "end") or [{"kind": "begin"}])[-1]
        names = {"begin": "running", "commit": "committing", "rollback": "rolling back"}
        return names.get(last["kind"]) or last["status"]


def link(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()


def verify(rows: list[tuple[int, str, str]], head: str | None = None) -> tuple[list[dict], str]:
    """The records and their head. Raises ``Tampered``; with ``head``, kept elsewhere, also if all was written anew."""
    last, records = GENESIS, []
    for place, (seq, body, digest) in enumerate(rows, 1):
        if seq != place:
            raise Tampered(f"the log was tampered with: record {place} is missing")
        if link(last, body) != digest or json.loads(body)["seq"] != seq:
            raise Tampered(f"the log was tampered with: record {seq} is not what was written")
        last = digest
        records.append(json.loads(body))
    if head is not None and head != last:
        raise Tampered("the log was tampered with: its head is not the one that was kept")
    return records, last


def replay(records: list[dict]) -> State:
    """The state that the log alone gives: what was there at the beginning, and each receipt's changes in the shop's order.

    Raises ``Tampered`` where a change does not start from what the others left.
    """
    state = dict(records[0]["state"])
    for record in sorted((r for r in records if r.get("changes")), key=lambda r: r["at"]):
        for path, (before, after) in record["changes"].items():
            if state.get(path) != before:
                raise Tampered(f"record {record['seq']} changes {path} from {before}, which was {state.get(path)}")
            state[path] = after
            if after is None:
                del state[path]
    return state


def audit(journal: Journal, shop: Shop) -> list[str]:
    """What is still open; nothing if all that was begun has its receipt. Raises ``Tampered`` if log and shop disagree."""
    count = Counter((r["kind"], r["key"]) for r in journal.all("intent", "receipt", "undone"))
    if twice := [key for (kind, key), n in count.items() if n > 1]:
        raise Tampered(f"{twice[0]} has more than one record of a kind")
    meant = {r["key"] for r in journal.all("intent")}
    receipts = {r["key"] for r in journal.all("receipt")}
    undone = {f"{r['key']}/undo" for r in journal.all("undone")}
    known = shop.keys()
    if missing := sorted((receipts | undone) - known):
        raise Tampered(f"the log has a receipt for {missing[0]}, which the shop does not know")
    if unknown := sorted(key for key in known if key.removesuffix("/undo") not in meant):
        raise Tampered(f"the shop has done {unknown[0]}, which the log does not mention")
    if pending := sorted(known - receipts - undone):
        if journal.status in ENDED:
            raise Tampered(f"the shop has done {pending[0]}, of which the log has no receipt")
        return pending  # killed between effect and receipt: resuming asks the shop again, with the same key
    if replay(journal.records) != shop.state():
        raise Tampered("the shop's state is not what the log explains")
    settled = receipts | {r["key"] for r in journal.all("refused", "undone")}
    return sorted(meant - settled)


def explain(records: list[dict]) -> list[str]:
    """For everything that was touched: its value at the beginning, and each record that changed it, in the shop's order."""
    tools = {r["key"]: r["tool"] for r in records if r["kind"] == "intent"}
    story: dict[str, list[str]] = {}
    for record in sorted((r for r in records if r.get("changes")), key=lambda r: r["at"]):
        name = ("undo of " if record["kind"] == "undone" else "") + tools[record["key"]]
        for path, (before, after) in record["changes"].items():
            story.setdefault(path, [f"{path}: {plain(before)}"])
            story[path].append(f"→ {plain(after)} by {name} (#{record['seq']})")
    return [" ".join(steps) for _, steps in sorted(story.items())]


def show(record: dict) -> str:
    """One line for people."""
    hidden = {"seq", "kind", "time", "key", "tool", "changes", "at", "state", "text", "policy", "budget"}
    parts = [record.get("key"), record.get("tool")]
    for name, value in record.items():
        if name not in hidden:
            shown = value if isinstance(value, dict) else {name: value}
            parts += [f"{k}={plain(v)}" for k, v in shown.items()]
    return f"#{record['seq']:<3} {record['kind']:9} " + " ".join(str(p) for p in parts if p)


def plain(value) -> str:
    """For a terminal: what a model or a stranger wrote must not move the cursor."""
    if value is None:
        return "nothing"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)
