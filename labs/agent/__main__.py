"""python -m labs.agent "Order 2 of product P3 for customer C1." does it in a scratch shop, and shows plan, calls, receipts.

Every run can be audited, resumed after a crash, and undone:

    python -m labs.agent --audit [RUN]        verify the log, compare it with the shop, explain what it did
    python -m labs.agent --resume RUN         go on where it was interrupted
    python -m labs.agent --rollback RUN       undo all of it
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from labkit.models import cache_dir
from labs.agent.journal import ENDED, Journal, Tampered, audit, explain, plain, show
from labs.agent.loop import parse, plan_and_execute, plan_schema
from labs.agent.models import Local, Model, ModelError, Scripted, Served
from labs.agent.saga import Policy, Run, Stuck, Unreachable, begin, resume
from labs.agent.shop import Shop, Tool, connect
from labs.agent.tasks import tasks

ASKED = "asked for"  # why a run was rolled back


class Problem(Exception):
    """What the user has to know; the message is all of it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m labs.agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", help="what to do, in words")
    parser.add_argument("--model", default="smollm2", help='a base URL, "scripted", or "smollm2" (the default)')
    parser.add_argument("--audit", metavar="RUN", nargs="?", const="", help="without RUN: the last one")
    parser.add_argument("--resume", metavar="RUN")
    parser.add_argument("--rollback", metavar="RUN")
    options = parser.parse_args(argv)
    if sum(given is not None for given in (options.task, options.audit, options.resume, options.rollback)) != 1:
        parser.error("give a task, or one of --audit, --resume, --rollback")
    name = ""
    try:
        if options.task is not None:
            task = check_task(options.task)
            model = model_for(options.model, task)  # before a run is begun: no server, no run
            name = new_run()
            with opened(name) as (shop, journal):
                run = begin(shop, journal, name=name, task=task, model=options.model, approve=ask_a_person)
                return finished(run, lambda: plan_and_execute(run, model, task))
        name = options.resume if options.resume is not None else options.rollback
        if options.audit is not None:
            name = options.audit or last_run()
        with opened(name) as (shop, journal):
            if not journal.records:
                raise Problem(f"run {name} was interrupted before it began: there is nothing in its log")
            if options.audit is not None:
                return audited(name, shop, journal)
            run = Run(shop, journal, approve=ask_a_person)
            if options.rollback is not None:
                return finished(run, lambda: run.rollback(ASKED))
            task, model = journal.records[0]["task"], journal.records[0]["model"]
            # The model is made only if it is needed: an undo is finished without it.
            return finished(run, lambda: resume(run, lambda: plan_and_execute(run, model_for(model, task), task)))
    except KeyboardInterrupt:
        print(f"\ninterrupted{how_to_go_on(name)}", file=sys.stderr)
        return 130
    except (Unreachable, Stuck, ModelError) as error:  # the run, if one was begun, stays as it is
        print(f"error: {error}{how_to_go_on(name)}", file=sys.stderr)
    except (Problem, Tampered, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def finished(run: Run, work) -> int:
    """Do it, showing each record as it is written. 0: the run is as it was asked for; 1: it gave up and was undone."""
    print(f"run {run.name}: {run.journal.records[0]['task']}")
    run.journal.listen = tell
    work()
    end = run.journal.find("end")
    kept = [r["key"] for r in run.journal.all("undone") if r["how"] == "kept"] if end["status"] != "done" else []
    print(
        f"{end['status']}: {plain(end.get('answer', end.get('why')))}" + (f"; cannot be undone: {kept}" if kept else "")
    )
    print(f"head of the log: {run.journal.head}")
    return 0 if end["status"] == "done" or end["why"] == ASKED else 1


def tell(record: dict) -> None:
    """A record as it is written; a plan step by step."""
    print(show(record), flush=True)
    with suppress(ValueError, KeyError):  # not every reply is a plan
        for n, step in enumerate(parse(record["text"], plan_schema(Policy()))["steps"], 1):
            after = f" after {', '.join(map(str, step['after']))}" if step["after"] else ""
            args = " ".join(f"{name}={plain(value)}" for name, value in step["args"].items())
            print(f"     {n}. {step['tool']} {args}{after}")


def audited(name: str, shop: Shop, journal: Journal) -> int:
    for record in journal.records:
        print(show(record))
    waiting = audit(journal, shop)
    print("\n" + "\n".join(explain(journal.records) or ["nothing was changed"]))
    print(f"\nthe chain of {len(journal.records)} records is intact")
    if journal.status in ENDED:
        print("the log explains the shop's state")
    else:
        print(f"the run is {journal.status}; open: {', '.join(waiting) or 'nothing'}{how_to_go_on(name)}")
    print(f"head of the log: {journal.head}")
    return 0


def model_for(name: str, task: str) -> Model:
    if name == "smollm2":
        return Local()
    if name == "scripted":
        known = {t.task: t for t in tasks()}
        if task not in known:
            raise Problem(f'the scripted model knows only the tasks of tasks.jsonl, such as "{tasks()[14].task}"')
        return Scripted(known[task].script("plan"))
    if not name.startswith(("http://", "https://")):
        raise Problem(f"there is no model {name}: give a base URL, scripted or smollm2")
    return Served(name)


def check_task(text: str) -> str:
    """The task without control characters and outer white space. Raises ``Problem`` if nothing is left or far too much."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text:
        raise Problem("the task is empty: say in words what to do")
    if len(text) > 1000:
        raise Problem(f"the task has {len(text):,} characters; the limit is 1,000")
    return text


def ask_a_person(tool: Tool, arguments: dict) -> bool:
    """Yes must be typed; the end of the input is a no."""
    try:
        return input(f"allow {tool.name} {arguments}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def how_to_go_on(name: str) -> str:
    return (
        f"\ngo on: python -m labs.agent --resume {name}   undo: python -m labs.agent --rollback {name}" if name else ""
    )


# -- runs on the disk -----------------------------------------------------------------------------------------------


def runs() -> Path:
    return cache_dir() / "agent-runs"


def numbers() -> list[int]:
    return sorted(int(folder.name) for folder in runs().glob("*") if folder.name.isdigit())


def last_run() -> str:
    if not numbers():
        raise Problem("there is no run yet")
    return str(numbers()[-1])


def new_run() -> str:
    runs().mkdir(parents=True, exist_ok=True)
    while True:
        name = str(max(numbers(), default=0) + 1)
        try:
            (runs() / name).mkdir()
            return name
        except FileExistsError:  # another process was faster
            continue


@contextmanager
def opened(name: str) -> Iterator[tuple[Shop, Journal]]:
    """The shop and the log of a run, for this process alone."""
    folder = runs() / name
    if not name.isdigit() or not folder.is_dir():
        raise Problem(f"there is no run {name}")
    try:
        with ExitStack() as stack:
            stack.enter_context(FileLock(folder / "lock", timeout=0))
            shop, log = (stack.enter_context(closing(connect(folder / f"{n}.db"))) for n in ("shop", "journal"))
            yield Shop(shop), Journal(log)
    except Timeout:
        raise Problem(f"another process is working on run {name}") from None
    except sqlite3.DatabaseError as error:
        raise Tampered(f"the files of run {name} cannot be used: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
