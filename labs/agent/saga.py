"""Calls that survive: each is meant, done and acknowledged in the log, and a run ends with all its effects or with none.

A saga (Garcia-Molina and Salem, 1987, https://doi.org/10.1145/38713.38742) is a sequence of transactions with an undo for
each. What has no undo, a message, is held until the run commits; from there on the run only goes forward.

Resuming needs no code of its own: the loop runs again from its beginning, and what the log already holds (the model's
words, the shop's answers, a person's approvals) is taken from there. So a loop must do the same when it is told the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import jsonschema

from labs.agent.journal import ENDED, Journal
from labs.agent.models import Model
from labs.agent.shop import TOOLS, Refused, Shop, Tool

ATTEMPTS = 3


class Unreachable(Exception):
    """No answer after all attempts. Whether the call arrived is not known."""


class Stuck(Exception):
    """An undo was refused: a person has to look, then the rollback can be tried again."""


class GiveUp(Exception):
    """The run cannot or must not go on: everything is undone."""


@dataclass(frozen=True)
class Policy:
    """What a run may do. It is in the log's first record, so a resumed run may do the same."""

    tools: tuple[str, ...] = tuple(TOOLS)
    customers: tuple[str, ...] | None = None  # only for these; None: for all

    def objection(self, tool: str, arguments: dict) -> str | None:
        """Why this call is not allowed, or None. Only what the call itself says counts, never what a text claims.

        ``customers`` cannot limit a tool that names none (restock): do not list it in ``tools`` then.
        """
        if tool not in self.tools:
            return f"{tool} is not allowed in this run"
        customer = arguments.get("customer")
        if self.customers is not None and customer is not None and customer not in self.customers:
            return f"this run may not act for customer {customer}"
        return None


@dataclass(frozen=True)
class Budget:
    turns: int = 8  # replies of the model
    calls: int = 24
    tokens: int = 2000  # written by the model
    seconds: float = 600.0  # since this process began: a resumed run gets them anew


class Run:
    """One run: its shop, its log, and what it may do. Make it with `begin`, or from the log of a run that began earlier."""

    def __init__(
        self,
        shop: Shop,
        journal: Journal,
        *,
        approve: Callable[[Tool, dict], bool] = lambda tool, arguments: False,
        workers: int = 4,  # calls at the same time
        timeout: float = 10.0,  # seconds for an attempt
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.shop, self.journal, self.approve = shop, journal, approve
        self.workers, self.timeout, self.sleep, self.clock = workers, timeout, sleep, clock
        first = journal.records[0]
        self.name, self.policy, self.budget = first["run"], Policy(**first["policy"]), Budget(**first["budget"])
        self._calls = self._turns = self._tokens = 0
        self._began = clock()

    # -- forward ----------------------------------------------------------------------------------------------------

    def ask(self, model: Model, messages: list[dict], schema: dict) -> str:
        """The model's next reply: from the log if it is there. Raises ``GiveUp`` when a budget is used up."""
        said = self.journal.all("said")
        if self._turns >= self.budget.turns:
            raise GiveUp(f"stopped: no result after {self.budget.turns} turns")
        if self._tokens >= self.budget.tokens:
            raise GiveUp(f"stopped: no result after {self._tokens} tokens")
        if self._turns < len(said):
            record = said[self._turns]
        else:
            if self.clock() - self._began > self.budget.seconds:
                raise GiveUp(f"stopped: no result after {self.budget.seconds:g} s")
            reply = model.reply(messages, schema)
            record = self.journal.append("said", text=reply.text, tokens=reply.tokens)
        self._turns += 1
        self._tokens += record["tokens"]
        return record["text"]

    def call_all(self, calls: list[dict]) -> list[dict]:
        """Results of independent calls, done at the same time: {"tool": …, "args": …} to a result or {"error": why}.

        Raises ``Unreachable`` if the shop does not answer and a call could not be withdrawn either; the run stays open.
        """
        self._calls += len(calls)
        if self._calls > self.budget.calls:
            raise GiveUp(f"stopped: more than {self.budget.calls} calls")
        keyed = [(f"{self.name}-{self._calls - len(calls) + n}", c["tool"], c["args"]) for n, c in enumerate(calls, 1)]
        admitted = [self._admit(*call) for call in keyed]  # one after another: a person answers one question at a time
        todo = [(n, call) for n, call in enumerate(keyed) if admitted[n] is None]
        if self.workers == 1 or len(todo) == 1:
            answers = [self._perform(*call) for _, call in todo]
        else:
            pool = ThreadPoolExecutor(self.workers)
            try:
                answers = list(pool.map(lambda item: self._perform(*item[1]), todo))
            finally:
                pool.shutdown(cancel_futures=True)  # nothing is written after this returns, not even when interrupted
        for (n, _), answer in zip(todo, answers, strict=True):
            admitted[n] = answer
        return admitted

    def _admit(self, key: str, tool: str, args: dict) -> dict | None:
        """None if the call may be done; an effect's intent is in the log then. Otherwise why not, as data."""
        if old := self.journal.find("refused", key):
            return {"error": old["error"]}
        if old := self.journal.find("intent", key):
            _same(old, tool, args)
            return None
        why = self._objection(key, tool, args)
        if why:
            return self._refuse(key, tool, args, why)
        if TOOLS[tool].effect:
            self.journal.append("intent", key=key, tool=tool, args=args)
        return None

    def _objection(self, key: str, name: str, args: dict) -> str | None:
        if name not in TOOLS:
            return f"there is no tool {name}"
        tool = TOOLS[name]
        if why := mismatch(args, tool.parameters):
            return why
        if why := self.policy.objection(name, args):
            return why
        if (
            tool.held or tool.needs_approval
        ):  # nobody is asked about what cannot be done; what is held must not fail later
            try:
                self._send(self.shop.rehearse, name, args)
            except (Refused, Unreachable) as error:
                return str(error)
        if tool.needs_approval:
            if not (asked := self.journal.find("approval", key)):
                granted = bool(self.approve(tool, args))
                asked = self.journal.append("approval", key=key, tool=name, args=args, granted=granted)
            _same(asked, name, args)  # what was approved is this call and no other
            if not asked["granted"]:
                return f"a person did not approve {name}"
        return None

    def _perform(self, key: str, tool: str, args: dict) -> dict:
        """Do an admitted call, or find in the log that it was done."""
        if not TOOLS[tool].effect:
            if old := self.journal.find("read", key):
                return old["result"]
            try:
                result = self._send(self.shop.call, tool, args)["result"]
            except (Refused, Unreachable) as error:
                return self._refuse(key, tool, args, str(error))
            return self.journal.append("read", key=key, tool=tool, args=args, result=result)["result"]
        if TOOLS[tool].held:
            return {"held": "will be done when the run finishes"}
        if not self.journal.find("withdraw", key):
            if old := self.journal.find("receipt", key):
                return old["result"]
            try:
                return self._acknowledge(key, self._send(self.shop.call, tool, args, key))
            except Refused as error:
                return self._refuse(key, tool, args, str(error))
            except Unreachable as error:  # done or not? Decide that it was not, and make it so
                self.journal.append("withdraw", key=key, error=str(error))
        self._take_back(key)
        return {"error": f"{tool} did not answer and was withdrawn"}

    def _acknowledge(self, key: str, answer: dict) -> dict:
        return self.journal.append("receipt", key=key, **answer)["result"]

    def _refuse(self, key: str, tool: str, args: dict, why: str) -> dict:
        self.journal.append("refused", key=key, tool=tool, args=args, error=why)
        return {"error": why}

    def _send(self, function: Callable, *arguments):
        """The shop's answer, asking again where none comes: the key makes that safe. Raises ``Unreachable``, ``Refused``."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self.sleep(0.1 * 2**attempt)
            try:
                return within(self.timeout, function, *arguments)
            except (ConnectionError, TimeoutError) as error:
                last = error
        raise Unreachable(f"no answer after {ATTEMPTS} attempts ({type(last).__name__})")

    # -- the two ends -----------------------------------------------------------------------------------------------

    def commit(self, answer: str) -> None:
        """Do what was held, then end the run. From the first record on there is no way back but an explicit rollback."""
        if not self.journal.find("commit"):
            self.journal.append("commit", answer=answer)
        for intent in self.journal.all("intent"):
            key, tool, args = intent["key"], intent["tool"], intent["args"]
            if TOOLS[tool].held and not (self.journal.find("receipt", key) or self.journal.find("refused", key)):
                try:
                    self._acknowledge(key, self._send(self.shop.call, tool, args, key))
                except Refused as error:
                    self._refuse(key, tool, args, str(error))
        self.journal.append("end", status="done", answer=self.journal.find("commit")["answer"])

    def rollback(self, why: str) -> None:
        """Undo every effect, the last one first. May be interrupted and called again; each is undone once.

        Raises ``Stuck`` if the shop refuses an undo, ``Unreachable`` if it does not answer: the run stays as it is.
        """
        if self.journal.status == "rolled back":
            raise ValueError(f"run {self.name} is rolled back already")
        if self.journal.status != "rolling back":
            self.journal.append("rollback", why=why)
        for intent in reversed(self.journal.all("intent")):
            if not self.journal.find("refused", intent["key"]):
                self._take_back(intent["key"])
        self.journal.append("end", status="rolled back", why=self.journal.find("rollback")["why"])

    def _take_back(self, key: str) -> None:
        """Undo one call, or bar it if it never arrived. The decision to do so is in the log already."""
        if self.journal.find("undone", key):
            return
        try:
            answer = self._send(self.shop.undo, key)
        except Refused as error:
            raise Stuck(f"{key} cannot be undone: {error}") from None
        done = answer.pop("done")
        if done and not self.journal.find("receipt", key):
            self._acknowledge(key, done)
        self.journal.append("undone", key=key, **answer)


def begin(
    shop: Shop, journal: Journal, *, name: str, task: str, model: str, policy=None, budget=None, **options
) -> Run:
    """A new run; the log begins with what it may do and with the shop as it is."""
    limits = {"policy": asdict(policy or Policy()), "budget": asdict(budget or Budget())}
    journal.append("begin", run=name, task=task, model=model, **limits, state=shop.state())
    return Run(shop, journal, **options)


def resume(run: Run, loop: Callable[[], None]) -> None:
    """Take a run to its end, wherever it was interrupted. ``loop`` is the one it began with."""
    match run.journal.status:
        case "rolling back":
            run.rollback("")
        case "committing":
            run.commit("")
        case status if status in ENDED:
            raise ValueError(f"run {run.name} has ended: {status}")
        case _:
            loop()


def _same(record: dict, tool: str, args: dict) -> None:
    """Raise ``ValueError`` if a record of an earlier life is of another call: the loop did not do the same again."""
    if (record["tool"], record["args"]) != (tool, args):
        raise ValueError(
            f"{record['key']} was {record['tool']} {record['args']} before the interruption and is {tool} {args} now: "
            "the loop diverged"
        )


def mismatch(value, schema: dict) -> str | None:
    """Why a value does not follow a schema, or None."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    while error and error.context:  # none of several alternatives fits: speak of the one for the tool that was named
        branches: dict[int, list] = {}
        for inner in error.context:
            branches.setdefault(inner.schema_path[0], []).append(inner)
        named = [branch for branch in branches.values() if all(e.validator != "const" for e in branch)]
        if not named:
            return (
                f"there is no tool {error.instance.get('tool') if isinstance(error.instance, dict) else error.instance}"
            )
        error = named[0][0]
    return error and f"{'/'.join(map(str, error.absolute_path)) or 'here'}: {error.message[:200]}"


def within(seconds: float, function: Callable, *arguments):
    """The function's result, or ``TimeoutError``. It is not stopped then: like a request on its way, it may still arrive."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)
