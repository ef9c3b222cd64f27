"""python -m labs.agent.faults: what becomes of a run when calls fail and the process dies, with the machinery and without.

Each seeded run is a random plan of three to six effects and a message. Judged is the shop, not the log: it must be as if all
had happened once, or nothing. Writes results/faults.json.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from labs.agent.journal import ENDED, Journal, Tampered, audit
from labs.agent.loop import plan_and_execute
from labs.agent.models import Model, Scripted
from labs.agent.saga import ATTEMPTS, Budget, Policy, Run, Stuck, Unreachable, begin, resume
from labs.agent.shop import Refused, Shop, State, connect, outcome

# What happens, how often in a row, and how many times in a run. Three in a row use up all attempts.
FAULTS = {
    "none": ("", 0, 0),
    "the call fails": ("fails", 1, 1),
    "the call fails for good": ("fails", ATTEMPTS, 1),
    "the answer is lost": ("answer lost", 1, 1),
    "the answer is lost for good": ("answer lost", ATTEMPTS, 1),
    "the call arrives late": ("late", 1, 1),
    "all attempts arrive late": ("late", ATTEMPTS, 1),
    "the call arrives twice": ("twice", 1, 1),
    "the process dies": ("dies", 1, 1),
    "the process dies three times": ("dies", 1, 3),
    "four faults of any kind": ("any", 1, 4),
    "four faults, parallel steps": ("any", 1, 4),
}


class Killed(BaseException):
    """The process is dead: nothing in it runs any more, so nothing may catch this but the next life."""


class World:
    """A shop behind a bad network and a process that may die, before or after each single write, to the shop or the log.

    ``faults``: (step, kind) in the order of steps; steps are counted over all lives. A fault of the network strikes the
    first call to the shop at or after its step.
    """

    def __init__(self, faults: list[tuple[int, str]] = (), die=None, folder: Path | None = None):
        files = (folder / "shop.db", folder / "journal.db") if folder else (":memory:", ":memory:")
        self.shop, self.log = Shop(connect(files[0])), connect(files[1])
        self.faults, self.step, self.dead = list(faults), 0, False
        self.late: list[tuple[int, tuple]] = []  # (step at which it arrives, the call)
        self.die, self.rng, self._lock = die or self._die, random.Random(str(faults)), threading.RLock()

    def _die(self) -> None:
        self.dead = True
        raise Killed

    def write(self, function, *arguments):
        """A write to the log: it can only be the last thing that a life does, or not be done any more."""
        return self._through(("dies before", "dies after"), function, arguments)

    def send(self, function, *arguments):
        """A call to the shop."""
        return self._through(None, function, arguments)

    def _through(self, here: tuple | None, function, arguments):
        with self._lock:
            self.step += 1
            if self.dead:
                raise Killed
            self.deliver(self.step)
            fault = next((f for f in self.faults if f[0] <= self.step and (here is None or f[1] in here)), None)
            kind = fault and self.faults.pop(self.faults.index(fault))[1]
            match kind:
                case "dies before":
                    self.die()
                case "fails":
                    raise ConnectionError("the network failed")
                case "late":
                    self.late.append((self.step + self.rng.randint(1, 15), (function, arguments)))
                    raise TimeoutError("no answer in time")
                case "twice":
                    self._ignore(function, arguments)
        result = function(*arguments)  # outside the lock: calls may overlap
        with self._lock:
            if kind == "dies after":
                self.die()
        if kind == "answer lost":
            raise TimeoutError("no answer in time")
        return result

    def deliver(self, step: float) -> None:
        """What was late and is due arrives; nobody waits for its answer any more."""
        due, self.late = [c for s, c in self.late if s <= step], [(s, c) for s, c in self.late if s > step]
        for function, arguments in due:
            self._ignore(function, arguments)

    def _ignore(self, function, arguments) -> None:
        with suppress(Refused):
            function(*arguments)


class FaultyShop:
    """What a process sees of the world's shop."""

    def __init__(self, world: World):
        self.world, self.state, self.keys = world, world.shop.state, world.shop.keys

    def call(self, *arguments):
        return self.world.send(self.world.shop.call, *arguments)

    def undo(self, *arguments):
        return self.world.send(self.world.shop.undo, *arguments)

    def rehearse(self, *arguments):
        return self.world.send(self.world.shop.rehearse, *arguments)


class MortalJournal(Journal):
    def __init__(self, world: World):
        super().__init__(world.log)
        self.world = world

    def append(self, kind: str, **fields) -> dict:
        return self.world.write(lambda: super(MortalJournal, self).append(kind, **fields))


class Bare:
    """The same calls without the machinery: tried three times, no keys, no log, no way back."""

    def __init__(self, shop: FaultyShop):
        self.shop, self.policy = shop, Policy()

    def ask(self, model: Model, messages: list[dict], schema: dict) -> str:
        return model.reply(messages, schema).text

    def call_all(self, calls: list[dict]) -> list[dict]:
        return [self._call(call["tool"], call["args"]) for call in calls]

    def _call(self, tool: str, args: dict) -> dict:
        for _ in range(ATTEMPTS):
            try:
                return self.shop.call(tool, args)["result"]
            except Refused as error:
                return {"error": str(error)}
            except (ConnectionError, TimeoutError):
                continue
        return {"error": "no answer"}

    def commit(self, answer: str) -> None: ...
    def rollback(self, why: str) -> None: ...


def live(world: World, steps: list[dict], workers: int = 1) -> str:
    """One life with the machinery: begin, or go on where the last one ended. How the run stands after it."""
    journal, shop = MortalJournal(world), FaultyShop(world)
    if journal.status in ENDED:  # died after its last word
        return journal.status
    options = {"approve": lambda tool, arguments: True, "workers": workers, "sleep": lambda s: None}
    if journal.records:
        run = Run(shop, journal, **options)
    else:
        run = begin(shop, journal, name="1", task="", model="", budget=Budget(), **options)
    resume(run, lambda: plan_and_execute(run, Scripted([{"steps": steps}, {"answer": "done"}]), ""))
    return journal.status


def survive(world: World, steps: list[dict], workers: int = 1) -> str:
    """As many lives as it takes."""
    while True:
        try:
            return live(world, steps, workers)
        except (Killed, Unreachable):
            world.dead = False
        except Stuck:
            return "stuck"


def stumble(world: World, steps: list[dict]) -> None:
    """Without the machinery: after a death somebody starts the task again."""
    while True:
        try:
            return plan_and_execute(Bare(FaultyShop(world)), Scripted([{"steps": steps}, {"answer": "done"}]), "")
        except Killed:
            world.dead = False


def plan(rng: random.Random, parallel: bool = False) -> list[dict]:
    """Three to six effects and a message. In sequence some fail: the goods or the money are used up. In parallel none does."""
    customers, products = [f"C{n}" for n in range(1, 9)], [f"P{n}" for n in range(1, 13)]
    orders = [("C1", "O1"), ("C2", "O2"), ("C3", "O3"), ("C5", "O4"), ("C8", "O5"), ("C1", "O6")]
    if parallel:  # no two steps touch the same thing
        customers, products = ["C3", "C5", "C6", "C7", "C8"], ["P1", "P2", "P5", "P6", "P11", "P12"]
        orders = [("C1", "O1")]
    for names in (customers, products, orders):
        rng.shuffle(names)
    take = (lambda names: names.pop()) if parallel else rng.choice
    steps = []
    kinds = ["place_order", "place_order", "give_credit", "update_address", "restock", "set_price", "cancel_order"]
    for tool in [*rng.sample(kinds, rng.randint(3, 5)), "place_order", "send_message"]:
        args: dict = {}
        if tool == "cancel_order":
            args["customer"], args["order"] = take(orders)
        elif tool not in ("restock", "set_price"):
            args["customer"] = "C2" if parallel and tool == "send_message" else take(customers)
        if tool in ("place_order", "restock", "set_price"):
            args["product"] = take(products)
        if tool in ("place_order", "restock"):
            args["quantity"] = 1 if parallel else rng.randint(1, 3)
        if tool in ("give_credit", "set_price"):
            args["cents"] = rng.randint(100, 2000)
        if tool == "update_address":
            args["address"] = f"{rng.randint(1, 99)} New Street"
        if tool == "send_message":
            args["text"] = "All is done."
        steps.append({"tool": tool, "args": args, "after": [] if parallel or not steps else [len(steps)]})
    return steps


def faultless(steps: list[dict]) -> tuple[State, State]:
    """The shop before, and after all steps; where one is refused nothing is to happen."""
    shop = Shop(connect(":memory:"))
    before = outcome(shop.state())
    try:
        for step in steps:
            shop.call(step["tool"], step["args"])
    except Refused:
        return before, before
    return before, outcome(shop.state())


def broken(world: World, steps: list[dict], status: str | None) -> set[str]:
    """Which promises the run has broken. Without a status (nobody kept one) both ends are right."""
    world.deliver(float("inf"))
    before, after = faultless(steps)
    right = {"done": [after], "rolled back": [before], "stuck": [before]}.get(status, [before, after])
    now = outcome(world.shop.state())
    wrong = min(({p for p in now.keys() | r.keys() if now.get(p) != r.get(p)} for r in right), key=len)
    found = {"not ended"} if status == "stuck" else set()
    for path in wrong:
        kind = path.split("/")[0]
        if kind == "orders":
            _, customer, product, quantity, _ = path.split("/")
            order = {"customer": customer, "product": product, "quantity": int(quantity)}
            asked = before.get(path, 0) + sum(s["tool"] == "place_order" and s["args"] == order for s in steps)
            found.add("an order twice" if now.get(path, 0) > asked else "an order lost or not taken back")
        elif kind == "messages":
            found.add("a message lost, false or twice")
        else:
            money = kind == "till" or path.endswith("/balance")
            found.add("money lost" if money else "stock wrong" if path.endswith("/stock") else "half done")
    if any(value < 0 for path, value in now.items() if path.endswith("/stock")):
        found.add("stock negative")
    if status:
        try:
            found |= {"an effect without its receipt"} if audit(Journal(world.log), world.shop) else set()
        except Tampered:
            found.add("an effect without its receipt")
    return found


def strike(name: str, seed: int, length: int) -> list[tuple[int, str]]:
    """Where and how faults strike a run of so many steps. The first goes through them all, seed by seed; more are drawn."""
    kind, row, times = FAULTS[name]
    rng, faults = random.Random(f"{name} {seed}"), []
    for n in range(times):
        at = seed % length + 1 if n == 0 else rng.randint(1, 2 * length)
        one = rng.choice(["fails", "answer lost", "late", "twice", "dies"]) if kind == "any" else kind
        if one == "dies":
            one = rng.choice(["dies before", "dies after"])
        faults += [(at, one)] * (ATTEMPTS if kind == "any" and rng.random() < 0.3 else row)
    return sorted(faults)


def campaign(seeds: range, names=tuple(FAULTS)) -> list[dict]:
    """One row a kind of fault: in how many runs it broke which promise, with the machinery and without."""
    rows = []
    for name in names:
        kept, bare, ends = Counter(), Counter(), Counter()
        for seed in seeds:
            parallel = "parallel" in name
            steps = plan(random.Random(seed), parallel)
            quiet, still = World(), World()  # how many steps there are to strike
            survive(quiet, steps)
            stumble(still, steps)
            world, other = World(strike(name, seed, quiet.step)), World(strike(name, seed, still.step))
            status = survive(world, steps, workers=4 if parallel else 1)
            stumble(other, steps)
            ends[status] += 1
            for count, found in ((kept, broken(world, steps, status)), (bare, broken(other, steps, None))):
                count.update(found | ({"any"} if found else set()))
        rows.append({"fault": name, "runs": len(seeds), "ends": dict(ends), "with": dict(kept), "without": dict(bare)})
    return rows


def main() -> int:
    from labs.agent.experiments import record

    rows = campaign(range(150))
    print(f"{'fault':30}{'runs':>6}{'broken with':>14}{'without':>9}   how they ended, with")
    for row in rows:
        counts = row["with"].get("any", 0), row["without"].get("any", 0)
        print(f"{row['fault']:30}{row['runs']:6}{counts[0]:14}{counts[1]:9}   {json.dumps(row['ends'])}")
    total = Counter()
    for row in rows:
        total.update(row["without"])
    print("without the machinery:", json.dumps(dict(total.most_common())))
    record("faults", {"what": "runs in which a promise was broken", "rows": rows})
    return int(any(row["with"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
