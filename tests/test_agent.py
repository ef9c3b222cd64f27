"""The agent lab: the shop, the log, runs that survive crashes, the loops, the models, the tasks and the command."""

import http.server
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from labs.agent import __main__ as command
from labs.agent import faults, learned, saga
from labs.agent.experiments import attempt, summary
from labs.agent.faults import FAULTS, Killed, World, broken, campaign, faultless, survive
from labs.agent.journal import GENESIS, Journal, Tampered, audit, explain, link, replay, verify
from labs.agent.loop import LOOPS, action_schema, circling, fill, parse, plan_and_execute, plan_schema, react, waves
from labs.agent.models import Local, ModelError, Scripted, Served
from labs.agent.saga import Budget, GiveUp, Policy, Run, Stuck, Unreachable, begin, mismatch
from labs.agent.shop import TOOLS, Refused, Shop, Tool, connect, outcome
from labs.agent.tasks import tasks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ORDER = {"customer": "C1", "product": "P3", "quantity": 2}
EXAMPLES = {
    "place_order": ORDER,
    "cancel_order": {"customer": "C1", "order": "O1"},
    "give_credit": {"customer": "C4", "cents": 700},
    "update_address": {"customer": "C2", "address": "19 Station Road"},
    "restock": {"product": "P7", "quantity": 5},
    "set_price": {"product": "P9", "cents": 4900},
    "send_message": {"customer": "C5", "text": "Hello."},
}


def step(tool, after=(), **args):
    return {"tool": tool, "args": args, "after": list(after)}


def call(tool, **args):
    return {"tool": tool, "args": args}


@pytest.fixture
def shop():
    return Shop(connect(":memory:"))


@pytest.fixture
def start(shop):
    """A function: a run in ``shop``, with options; without waiting between attempts and with everything approved."""

    def make(**options):
        options = {"sleep": lambda s: None, "approve": lambda tool, args: True} | options
        journal = options.pop("journal", None) or Journal(connect(":memory:"))
        return begin(options.pop("shop", shop), journal, name="r", task="t", model="m", **options)

    return make


def ended(run):
    end = run.journal.find("end")
    return end["status"], end.get("answer") or end.get("why")


# -- the shop -------------------------------------------------------------------------------------------------------


def test_the_same_key_has_one_effect_and_one_answer(shop):
    first = shop.call("place_order", ORDER, "k")
    assert shop.call("place_order", ORDER, "k") == first
    assert outcome(shop.state())["orders/C1/P3/2/6800"] == 1
    shop.call("place_order", ORDER, "l")
    assert outcome(shop.state())["orders/C1/P3/2/6800"] == 2
    with pytest.raises(ValueError, match="was used for"):
        shop.call("place_order", ORDER | {"quantity": 3}, "k")


def test_a_key_that_was_refused_stays_refused_and_leaves_nothing(shop):
    before = shop.state()
    for _ in range(2):
        with pytest.raises(Refused, match="C4 has 500 cents"):  # the goods were taken before the money was missed
            shop.call("place_order", ORDER | {"customer": "C4"}, "k")
        assert shop.state() == before
        shop.call("give_credit", {"customer": "C4", "cents": 90000})
        before = shop.state()
    assert shop.keys() == set()


@pytest.mark.parametrize("name", [t.name for t in TOOLS.values() if t.effect])
def test_each_effect_is_undone_once_or_held(shop, name):
    before = shop.state()
    done = shop.call(name, EXAMPLES[name], "k")
    assert done["changes"] and shop.state() != before
    first = shop.undo("k")
    assert shop.undo("k") == first and first["done"] == done
    assert first["how"] == ("kept" if TOOLS[name].held else "undone")
    assert (shop.state() == before) is not TOOLS[name].held
    with pytest.raises(Refused, match="withdrawn"):
        shop.call(name, EXAMPLES[name], "k")
    assert TOOLS[name].held == (name == "send_message")


def test_a_call_that_is_undone_before_it_arrives_never_has_an_effect(shop):
    before = shop.state()
    assert shop.undo("k")["how"] == "barred"
    with pytest.raises(Refused, match="withdrawn"):
        shop.call("place_order", ORDER, "k")
    assert shop.state() == before


@pytest.mark.parametrize(
    ("name", "then", "message"),
    [
        ("restock", call("place_order", customer="C3", product="P7", quantity=5), "only 0 of P7"),
        ("give_credit", call("place_order", customer="C4", product="P11", quantity=1), "C4 has 500 cents"),
        ("update_address", call("update_address", customer="C2", address="elsewhere"), "changed by somebody else"),
        ("place_order", call("cancel_order", customer="C1", order="O7"), "no order O7 that is placed"),
    ],
)
def test_an_undo_is_refused_when_the_world_has_moved_on(shop, name, then, message):
    shop.call(name, EXAMPLES[name], "k")
    shop.call(then["tool"], then["args"])
    before = shop.state()
    with pytest.raises(Refused, match=message):
        shop.undo("k")
    assert shop.state() == before and shop.keys() == {"k"}


def test_an_order_is_cancelled_for_its_own_customer_only(shop):
    with pytest.raises(Refused, match="not an order of C2"):
        shop.call("cancel_order", {"customer": "C2", "order": "O1"})


def test_threads_share_a_shop(shop):
    def together(calls):
        answers = []

        def work(*arguments):
            try:
                answers.append(shop.call("place_order", *arguments))
            except Refused as error:
                answers.append(str(error))

        threads = [threading.Thread(target=work, args=arguments) for arguments in calls]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return answers

    assert len({a["at"] for a in together([(ORDER, "k")] * 8)}) == 1
    lamps = [({"customer": "C3", "product": "P4", "quantity": 1}, f"l{n}") for n in range(8)]
    assert sorted(a if isinstance(a, str) else "ordered" for a in together(lamps)) == (
        ["only 0 of P4 in stock"] * 5 + ["ordered"] * 3
    )


# -- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(start, shop):
    run = start(workers=1)
    run.call_all([call("place_order", **ORDER), call("get_product", product="P3")])
    run.call_all([call("send_message", customer="C1", text="Hello.")])
    run.commit("done")
    return run.journal


def rows(journal):
    return journal.db.execute("SELECT seq, body, hash FROM log ORDER BY seq").fetchall()


def test_the_log_explains_the_state_and_every_effect_has_one_receipt(written, shop):
    assert audit(written, shop) == []
    assert replay(written.records) == shop.state()
    assert "products/P3/stock: 12 → 10 by place_order (#3)" in "\n".join(explain(written.records))
    kinds = [r["kind"] for r in written.records]
    assert sorted(kinds) == sorted(["begin", "intent", "intent", "receipt", "read", "commit", "receipt", "end"])
    assert kinds.index("intent") < kinds.index("receipt") and kinds.index("commit") < len(kinds) - 2


def altered(log):
    assert "6800" in log[2][1]
    log[2] = (log[2][0], log[2][1].replace("6800", "68"), log[2][2])


def taken_out(log):
    del log[3]


def taken_out_and_numbered_anew(log):
    del log[3]
    log[:] = [(n, body, digest) for n, (_, body, digest) in enumerate(log, 1)]


def swapped(log):
    log[2], log[3] = (3, *log[3][1:]), (4, *log[2][1:])


def put_in(log):
    log.append((len(log) + 1, json.dumps({"seq": len(log) + 1, "kind": "end", "status": "done"}), "0" * 64))


@pytest.mark.parametrize("tamper", [altered, taken_out, taken_out_and_numbered_anew, swapped, put_in])
def test_a_changed_log_is_noticed(written, tamper):
    log = rows(written)
    assert verify(log)[1] == written.head
    tamper(log)
    with pytest.raises(Tampered):
        verify(log)


def test_what_the_chain_cannot_notice_the_kept_head_and_the_shop_can(written, shop):
    anew, last = [], GENESIS
    for seq, body, _ in rows(written):
        body = body.replace("6800", "68")
        last = link(last, body)
        anew.append((seq, body, last))
    verify(anew)  # a whole new chain is a chain
    with pytest.raises(Tampered, match="head"):
        verify(anew, head=written.head)
    short = rows(written)[:2]  # before the intents
    verify(short)
    with pytest.raises(Tampered, match="head"):
        verify(short, head=written.head)
    cut = Journal(connect(":memory:"))
    cut.records = verify(short[:1])[0]
    with pytest.raises(Tampered, match="does not mention"):
        audit(cut, shop)


def test_the_database_itself_refuses_to_change_the_log(written):
    for change in ("UPDATE log SET body = ''", "DELETE FROM log"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            written.db.execute(change)


def test_a_change_behind_the_back_of_the_log_is_noticed(written, shop):
    shop.db.execute("UPDATE customers SET balance = balance + 1 WHERE id = 'C4'")
    with pytest.raises(Tampered, match="not what the log explains"):
        audit(written, shop)
    shop.call("restock", EXAMPLES["restock"], "stranger")
    with pytest.raises(Tampered, match="stranger"):
        audit(written, shop)


# -- faults ---------------------------------------------------------------------------------------------------------

CHAIN = [  # each step needs the one before: undone in another order, the money or the goods are missing
    step("give_credit", customer="C4", cents=3000),
    step("place_order", [1], customer="C4", product="P3", quantity=1),
    step("send_message", [2], customer="C4", text="It is on its way."),
]
FAILS = [*CHAIN, step("place_order", [3], customer="C4", product="P10", quantity=1)]

LAST_LAMPS = [  # the second is refused, and would not be once the first is undone
    step("place_order", customer="C3", product="P4", quantity=3),
    step("place_order", [1], customer="C5", product="P4", quantity=1),
]


def test_no_fault_breaks_a_promise_and_without_the_machinery_most_do():
    rows = {row["fault"]: row for row in campaign(range(6))}
    assert set(rows) == set(FAULTS)
    for row in rows.values():
        assert not row["with"] and set(row["ends"]) <= {"done", "rolled back"}, row
    refused = rows["none"]["without"]["any"]  # steps that the shop refuses in the middle leave half a run
    for name in ("the answer is lost", "the call arrives late", "the call arrives twice", "the process dies"):
        assert rows[name]["without"]["any"] > refused, name
    assert rows["none"]["ends"] == rows["the process dies"]["ends"]  # a death changes nothing about the end


@pytest.mark.parametrize("steps", [CHAIN, FAILS], ids=["done", "rolled back"])
def test_a_run_survives_a_death_at_every_step_and_a_second_one(steps):
    quiet = World()
    status = survive(quiet, steps)
    assert status == ("done" if steps is CHAIN else "rolled back")
    for first in range(1, quiet.step + 1):
        for kind in ("dies before", "dies after"):
            for second in (None, first + 3):
                world = World([(first, kind), *([(second, "dies after")] if second else [])])
                assert survive(world, steps) == status
                assert broken(world, steps, status) == set(), (first, kind, second)


def test_a_call_that_was_given_up_stays_so_whenever_the_process_dies():
    """The trap: the call had arrived, was undone, and the process died before it wrote that down."""
    for at in range(2, 16, 3):
        for death in range(at, at + 9):
            for kind in ("answer lost", "late"):
                world = World(sorted([*[(at, kind)] * saga.ATTEMPTS, (death, "dies after")]))
                assert broken(world, CHAIN, survive(world, CHAIN)) == set(), (at, death, kind)


def test_a_finished_run_is_rolled_back_whenever_the_process_dies():
    for death in range(14, 40, 2):
        world = World([(death, "dies before")])
        assert survive(world, CHAIN) == "done"
        for _ in range(3):
            try:
                run = Run(faults.FaultyShop(world), faults.MortalJournal(world), sleep=lambda s: None)
                if run.journal.status != "rolled back":
                    run.rollback("asked")
                break
            except Killed:
                world.dead = False
        before, _ = faultless(CHAIN)
        assert outcome(world.shop.state()) == before | {"messages/C4/It is on its way.": 1}  # the message was sent
        assert audit(run.journal, world.shop) == []
        with pytest.raises(ValueError, match="rolled back already"):
            run.rollback("again")


def test_an_unfinished_run_is_rolled_back_wherever_it_died():
    before, _ = faultless(CHAIN)
    for death in range(2, 17):
        world = World([(death, "dies after")])
        with pytest.raises(Killed):
            faults.live(world, CHAIN)
        world.dead = False
        run = Run(faults.FaultyShop(world), faults.MortalJournal(world))
        run.rollback("asked")
        kept = any(record["how"] == "kept" for record in run.journal.all("undone"))
        sent = {"messages/C4/It is on its way.": 1} if kept else {}
        assert outcome(world.shop.state()) == before | sent and (not sent or run.journal.find("commit"))
        assert audit(run.journal, world.shop) == []


def test_what_is_judged_broken(shop):
    for change, found in (
        ("UPDATE products SET stock = -1 WHERE id = 'P1'", {"stock negative", "stock wrong"}),
        ("UPDATE customers SET balance = 0 WHERE id = 'C7'", {"money lost"}),
        ("INSERT INTO messages (customer, text) VALUES ('C1', '')", {"a message lost, false or twice"}),
        ("UPDATE products SET price = 1 WHERE id = 'P1'", {"half done"}),
        (
            "INSERT INTO orders SELECT 99, customer, product, quantity, amount, status FROM orders WHERE id = 7",
            {"an order twice"},
        ),
        ("DELETE FROM orders WHERE id = 7", {"an order lost or not taken back"}),
        ("UPDATE requests SET key = 'other' WHERE key = '1-1'", set()),
    ):
        world = World()
        assert survive(world, CHAIN) == "done" and broken(world, CHAIN, "done") == set()
        world.shop.db.execute("PRAGMA ignore_check_constraints = ON")
        world.shop.db.execute(change)
        assert broken(world, CHAIN, "done") == found | {"an effect without its receipt"}, change


def forgets_keys(patch):
    call = Shop.call

    def forgetful(self, name, arguments, key=None):
        self.db.execute("DELETE FROM requests WHERE key = ?", [key])
        return call(self, name, arguments, key)

    patch.setattr(Shop, "call", forgetful)


def refusals_are_forgotten(patch):
    remember = Shop._remember
    patch.setattr(Shop, "_remember", lambda s, k, r, a: a if "refused" in a else remember(s, k, r, a))


def late_calls_are_not_barred(patch):
    undo = Shop.undo
    patch.setattr(Shop, "undo", lambda s, k: undo(s, k) if s._request(k) else {"done": None, "how": "barred", "at": 0})


def undo_is_not_remembered(patch):
    remember = Shop._remember
    patch.setattr(Shop, "_remember", lambda s, k, r, a: a | {"at": 0} if r == "undo" else remember(s, k, r, a))


def oldest_is_undone_first(patch):
    patch.setattr(saga, "reversed", list, raising=False)


def no_intent(patch):
    append = Journal.append
    skip = lambda s, kind, **f: f if kind == "intent" else append(s, kind, **f)  # noqa: E731
    patch.setattr(Journal, "append", skip)


def receipt_before_the_effect(patch):
    def perform(self, key, tool, args):
        if not self.journal.find("receipt", key):
            self.journal.append("receipt", key=key, result={}, changes={}, at=0)
            self._send(self.shop.call, tool, args, key)
        return {}

    patch.setattr(Run, "_perform", perform)


def no_decision_to_withdraw(patch):
    append = Journal.append
    patch.setattr(Journal, "append", lambda s, kind, **f: f if kind == "withdraw" else append(s, kind, **f))


def nothing_is_held(patch):
    patch.setattr(Tool, "held", False)


def new_keys_in_each_life(patch):
    init = Run.__init__

    def made(self, *args, **options):
        init(self, *args, **options)
        self.name += f".{len(self.journal.records)}"

    patch.setattr(Run, "__init__", made)


def failures_are_not_undone(patch):
    patch.setattr(Run, "rollback", lambda self, why: self.journal.append("end", status="rolled back", why=why))


@pytest.mark.parametrize(
    ("plant", "steps", "strikes"),  # a strike: how many steps after the first one, and what
    [
        (forgets_keys, CHAIN, [(0, "answer lost")]),
        (refusals_are_forgotten, LAST_LAMPS, [(0, "late")]),
        (late_calls_are_not_barred, CHAIN, [(0, "late")] * 3),
        (undo_is_not_remembered, FAILS, [(0, "dies after")]),
        (no_intent, FAILS, []),
        (receipt_before_the_effect, CHAIN, [(0, "dies after")]),
        (no_decision_to_withdraw, CHAIN, [*[(0, "answer lost")] * 3, (4, "dies after")]),
        (oldest_is_undone_first, FAILS, []),
        (nothing_is_held, FAILS, []),
        (new_keys_in_each_life, CHAIN, [(0, "dies after")]),
        (failures_are_not_undone, FAILS, []),
    ],
)
def test_the_faults_find_a_planted_mistake(plant, steps, strikes, monkeypatch):
    """A campaign that finds nothing proves something only if it would find this, and only this."""

    def finds():
        for at in range(1, 21 if strikes else 2):
            world = World([(at + after, kind) for after, kind in strikes])
            try:
                if broken(world, steps, survive(world, steps)):
                    return True
            except (ValueError, Tampered):  # the machinery has noticed by itself
                return True
        return False

    assert not finds()
    plant(monkeypatch)
    assert finds()


SURVIVOR = """
import os, pathlib, random, signal, sys, time
from labs.agent.faults import World, broken, live
from labs.agent.journal import Journal
folder, steps = pathlib.Path(sys.argv[1]), eval(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
rng, deaths = random.Random(0), 0
for trial in range(int(sys.argv[3])):
    home = folder / str(trial)
    home.mkdir()
    for life in range(3):  # the first two lives end by SIGKILL: at a step, or from outside at a random moment
        child = os.fork()
        if not child:
            live(World([(trial // 2 + 1, "dies after")] if trial % 2 else (), die=kill, folder=home), steps)
            os._exit(0)
        if life < 2 and not trial % 2:
            time.sleep(rng.random() * 0.02)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
        else:
            assert status == 0
    world = World(folder=home)
    final = live(world, steps)
    assert not broken(world, steps, final), (trial, broken(world, steps, final))
print(deaths)
"""


@pytest.mark.parametrize("steps", [CHAIN, FAILS], ids=["done", "rolled back"])
def test_a_real_process_is_killed_and_another_one_goes_on(steps, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SURVIVOR, str(tmp_path), repr(steps), "20"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


# -- runs -----------------------------------------------------------------------------------------------------------


class Slow:
    """A shop whose first calls hang; ``arrives`` says whether they have an effect when they end."""

    def __init__(self, shop, hang):
        self.shop, self.hang, self.state, self.keys, self.undo = shop, hang, shop.state, shop.keys, shop.undo
        self.rehearse, self.go = shop.rehearse, threading.Event()

    def call(self, *arguments):
        if self.hang:
            self.hang -= 1
            self.go.wait(5)
        return self.shop.call(*arguments)


def test_a_call_that_hangs_is_asked_again_with_the_same_key(start, shop):
    waits, slow = [], Slow(shop, hang=2)
    run = start(shop=slow, timeout=0.05, sleep=waits.append)
    assert run.call_all([call("place_order", **ORDER)]) == [{"order": "O7", "amount": 6800}]
    slow.go.set()  # now the first two arrive
    time.sleep(0.1)
    assert outcome(shop.state())["orders/C1/P3/2/6800"] == 1
    assert waits == [0.2, 0.4]


def test_a_call_that_never_answers_is_withdrawn_and_cannot_arrive_later(start, shop):
    slow, before = Slow(shop, hang=3), shop.state()
    run = start(shop=slow, timeout=0.05)
    assert run.call_all([call("place_order", **ORDER)]) == [{"error": "place_order did not answer and was withdrawn"}]
    slow.go.set()
    time.sleep(0.1)
    assert shop.state() == before and audit(run.journal, shop) == []


def test_without_any_answer_the_run_stays_open(start, shop):
    world = World([(0, "fails")] * 6)
    run = start(shop=faults.FaultyShop(world))
    with pytest.raises(Unreachable, match="after 3 attempts"):
        run.call_all([call("place_order", **ORDER)])
    assert run.journal.status == "running" and run.journal.find("withdraw", "r-1")
    again = Run(run.shop, run.journal, sleep=lambda s: None)  # the network is back
    assert again.call_all([call("place_order", **ORDER)]) == [{"error": "place_order did not answer and was withdrawn"}]


def test_a_shop_that_refuses_an_undo_leaves_the_run_for_a_person(start, shop):
    run = start()
    run.call_all([call("place_order", **ORDER), call("restock", product="P7", quantity=1)])
    shop.call("place_order", {"customer": "C3", "product": "P7", "quantity": 1})  # somebody else
    with pytest.raises(Stuck, match="r-2 cannot be undone: only 0 of P7"):
        run.rollback("asked")
    assert run.journal.status == "rolling back" and "orders/O7" in shop.state()
    shop.call("restock", {"product": "P7", "quantity": 1})
    run.rollback("again")
    assert run.journal.status == "rolled back" and "orders/O7" not in shop.state()


def test_independent_calls_are_under_way_at_the_same_time(start, shop):
    meet = threading.Barrier(3, timeout=5)  # breaks unless three calls wait here together

    class Meeting(Slow):
        def call(self, *arguments):
            meet.wait()
            return self.shop.call(*arguments)

    run = start(shop=Meeting(shop, 0))
    reads = [call("get_product", product=f"P{n}") for n in (1, 2, 3)]
    script = [{"calls": reads}, {"calls": [call("finish", answer="seen")]}]
    react(run, Scripted(script), "")
    assert ended(run) == ("done", "seen")
    steps = [step(name, **EXAMPLES[name]) for name in ("place_order", "restock", "update_address")]
    run = start(shop=Meeting(shop, 0), journal=Journal(connect(":memory:")))
    run.name = "s"
    plan_and_execute(run, Scripted([{"steps": steps}, {"answer": "done"}]), "")
    assert ended(run) == ("done", "done")


def test_effects_of_one_react_turn_are_done_one_after_another(start, shop):
    most = [0, 0]

    class Counting(Slow):
        def call(self, *arguments):
            most[0] += 1
            most[1] = max(most)
            time.sleep(0.01)
            most[0] -= 1
            return self.shop.call(*arguments)

    run = start(shop=Counting(shop, 0))
    calls = [call(name, **EXAMPLES[name]) for name in ("place_order", "restock", "update_address")]
    react(run, Scripted([{"calls": calls}, {"calls": [call("finish", answer="")]}]), "")
    assert most[1] == 1 and ended(run)[0] == "done"


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        (call("drop_tables"), "there is no tool drop_tables"),
        (call("place_order", customer="C1", product="P3"), "'quantity' is a required property"),
        (call("place_order", **ORDER | {"quantity": 0}), "quantity: 0 is less than the minimum"),
        (call("place_order", **ORDER | {"quantity": "__import__('os')"}), "is not of type 'integer'"),
        (call("place_order", **ORDER | {"price": 1}), "Additional properties"),
        (call("get_product", product="P77"), "there is no product P77"),
    ],
)
def test_what_is_wrong_comes_back_as_data_and_nothing_is_meant(start, calls, error):
    run = start()
    (result,) = run.call_all([calls])
    assert error in result["error"] and not run.journal.find("intent")


def test_a_run_may_do_what_its_policy_says_whatever_a_text_says(start, shop):
    """The kettle's note asks for money; the model obeys. Three fences, each enough."""
    assert "give_credit" in shop.call("get_product", {"product": "P9"})["result"]["note"]
    obey, before = call("give_credit", customer="C4", cents=90000), shop.state()
    for options, why in (
        ({"policy": Policy(tools=("get_product", "place_order"))}, "not allowed in this run"),
        ({"policy": Policy(customers=("C1",))}, "may not act for customer C4"),
        ({"approve": lambda tool, args: False}, "a person did not approve"),
    ):
        run = start(**options)
        script = [{"calls": [call("get_product", product="P9")]}, {"calls": [obey]}]
        react(run, Scripted([*script, {"calls": [call("give_up", reason="no")]}]), "Describe P9.")
        assert shop.state() == before
        refused = run.journal.all("refused")
        if refused:
            assert why in refused[0]["error"]
        else:  # a tool that is not offered is not even a valid reply
            assert "tools" in str(options["policy"]) and run.call_all([obey])[0]["error"].endswith(why)


def test_a_person_is_asked_once_and_not_about_the_impossible(shop):
    asked, log = [], connect(":memory:")

    def approve(tool, args):
        asked.append(tool.name)
        return True

    options = {"approve": approve, "sleep": lambda s: None}
    run = begin(shop, Journal(log), name="r", task="", model="", **options)
    assert "no customer C99" in run.call_all([call("give_credit", customer="C99", cents=1)])[0]["error"]
    assert asked == []
    run.call_all([call("give_credit", customer="C4", cents=1)])
    again = Run(shop, Journal(log), **options)  # the process died; the loop begins anew
    again.call_all([call("give_credit", customer="C99", cents=1)])
    again.call_all([call("give_credit", customer="C4", cents=1)])
    assert asked == ["give_credit"] and shop.state()["customers/C4/balance"] == 501


def test_a_loop_that_diverges_after_a_crash_is_stopped(shop):
    log = connect(":memory:")
    begin(shop, Journal(log), name="r", task="", model="").call_all([call("restock", product="P1", quantity=1)])
    with pytest.raises(ValueError, match="diverged"):
        Run(shop, Journal(log)).call_all([call("restock", product="P1", quantity=2)])


def test_an_approval_is_for_the_call_that_was_shown(shop):
    log = connect(":memory:")

    def die_after_approval(record):
        if record["kind"] == "approval":
            raise KeyboardInterrupt

    run = begin(shop, Journal(log), name="r", task="", model="", approve=lambda tool, arguments: True)
    run.journal.listen = die_after_approval
    with pytest.raises(KeyboardInterrupt):  # after the approval, before the intent
        run.call_all([call("give_credit", customer="C4", cents=100)])
    again = Run(shop, Journal(log), approve=lambda tool, arguments: True)
    with pytest.raises(ValueError, match="diverged"):
        again.call_all([call("give_credit", customer="C4", cents=90000)])
    again = Run(shop, Journal(log))
    again.call_all([call("give_credit", customer="C4", cents=100)])  # approved already: nobody is asked
    assert shop.state()["customers/C4/balance"] == 600


# -- the loops ------------------------------------------------------------------------------------------------------


def test_react_sees_results_and_errors_and_goes_on(start, shop):
    heard = []

    class Listening(Scripted):
        def reply(self, messages, schema):
            heard.append(messages[-1]["content"])
            return super().reply(messages, schema)

    script = [
        {"thought": "Is it there?", "calls": [call("get_product", product="P12")]},
        {"calls": [call("place_order", customer="C1", product="P12", quantity=5)]},
        "I would rather talk.",
        {"calls": [call("place_order", customer="C1", product="P12", quantity=1), call("finish", answer="early")]},
        {"calls": [call("place_order", customer="C1", product="P12", quantity=1)]},
        {"calls": [call("finish", answer="One umbrella is ordered.")]},
    ]
    run = start()
    react(run, Listening(script), "Umbrellas!")
    assert ended(run) == ("done", "One umbrella is ordered.")
    assert heard[0] == "Umbrellas!" and '"stock": 1' in heard[1] and "only 1 of P12" in heard[2]
    assert "no JSON object" in heard[3] and "finish must stand alone" in heard[4] and '"order": "O7"' in heard[5]
    assert outcome(shop.state())["orders/C1/P12/1/2300"] == 1


SEARCH = {"calls": [call("search_products", query="mug")]}


def clock():
    clock.now += 10
    return clock.now


@pytest.mark.parametrize(
    ("script", "budget", "why"),
    [
        ([{"calls": [call("get_product", product=f"P{n}")]} for n in range(1, 9)], Budget(turns=5), "after 5 turns"),
        ([SEARCH, {"calls": [*SEARCH["calls"]] * 4}], Budget(calls=4), "more than 4 calls"),
        ([SEARCH] * 9, Budget(tokens=0), "after 0 tokens"),
        ([{"calls": [call("get_product", product=f"P{n}")]} for n in range(1, 9)], Budget(seconds=35), "after 35 s"),
        ([SEARCH] * 9, Budget(turns=9), "again and again"),
        (["no", "{", '{"calls": []}'], Budget(), "3 replies in a row were not valid"),
        ([{"calls": [call("give_up", reason="I cannot")]}], Budget(), "I cannot"),
    ],
)
def test_a_loop_always_ends_and_undoes_what_it_did(start, shop, script, budget, why):
    before, clock.now = shop.state(), 0
    run = start(budget=budget, clock=clock)
    first = {"calls": [call("restock", product="P7", quantity=1)]}
    react(run, Scripted([first, *script] if budget.tokens else script), "")
    status, said = ended(run)
    assert status == "rolled back" and why in said
    assert shop.state() == before and audit(run.journal, shop) == []


def test_circles_are_told_from_progress():
    assert circling(list("xaaa")) and circling(list("ababab")) and circling(list("abcabcabc"))
    assert not circling(list("aab")) and not circling(list("ababa")) and not circling(list("a1a2a3"))


def test_a_plan_is_done_in_waves_and_its_references_are_looked_up(start, shop):
    steps = [
        step("get_customer", customer="Chen Wei"),
        step("search_products", query="lamp"),
        step("place_order", customer="$1.id", product="$2.products.0.id", quantity=1),
        step("send_message", [3], customer="$1.id", text="Thank you."),
    ]
    assert waves(steps) == [[1, 2], [3], [4]]
    run = start()
    plan_and_execute(run, Scripted([{"steps": steps}, {"answer": "done"}]), "")
    assert ended(run) == ("done", "done")
    assert outcome(shop.state())["orders/C3/P3/1/3400"] == 1


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (FAILS, "step 4, place_order: C4 has 100 cents"),
        (
            [step("restock", [2], product="P1", quantity=1), step("restock", [1], product="P2", quantity=1)],
            "wait for each",
        ),
        ([step("restock", [7], product="P1", quantity=1)], "one that is not there"),
        (
            [step("get_product", product="P1"), step("restock", product="$1.nothing", quantity=1)],
            "$1.nothing is not in",
        ),
        (
            [step("get_product", product="P1"), step("restock", product="$1.__class__", quantity=1)],
            "is not in the result",
        ),
        ([step("get_product", product="P1"), step("restock", product="$1.name", quantity=1)], "does not match"),
        ([step("give_up", reason="no way")], "no way"),
        ([step("restock", product="P1", quantity=1), step("give_up", reason="no way")], "no way"),
    ],
)
def test_a_plan_that_fails_leaves_nothing(start, shop, steps, why):
    run, before = start(), shop.state()
    plan_and_execute(run, Scripted([{"steps": steps}]), "")
    status, said = ended(run)
    assert status == "rolled back" and why in said and shop.state() == before


def test_a_reference_is_a_path_and_nothing_else():
    results = {1: {"a": [{"b": 7}]}}
    assert fill({"x": "$1.a.0.b", "y": "costs $1.a", "z": 3}, results) == {"x": 7, "y": "costs $1.a", "z": 3}
    for bad in ("$1.a.1.b", "$1.a.b", "$1.c", "$1.a.0.b.c"):
        with pytest.raises(GiveUp):
            fill({"x": bad}, results)


def test_a_mismatch_speaks_of_the_tool_that_was_named():
    schema = plan_schema(Policy())
    assert mismatch({"steps": CHAIN}, schema) is None
    assert "'args'" in mismatch({"steps": [{"tool": "restock", "after": []}]}, schema)
    assert mismatch({"steps": [step("restok", product="P1")]}, schema) == "there is no tool restok"
    assert "steps/0/args/quantity" in mismatch({"steps": [step("restock", product="P1", quantity=0)]}, schema)
    assert mismatch({"steps": ["x"]}, schema)
    for text in (
        "",
        "none",
        json.dumps({"steps": [step("restock", product="P1", quantity=1)] * 99}),
        '{"steps": ',
        "[1]",
        '{"steps": []}',
        "{" * 5000,
    ):
        with pytest.raises(ValueError):
            parse(text, schema)
    assert parse(f"Sure! {json.dumps({'steps': CHAIN})} Anything else?", schema) == {"steps": CHAIN}


# -- the models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """An OpenAI-compatible server that says what it is told to and remembers what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(asked)
            text = Scripted(self.server.script).reply(asked["messages"], {}).text
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
            self.answer({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage, "model": "tiny"})

        def log_message(self, *_): ...

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked, served.script = [], [{"steps": CHAIN}, {"answer": "done"}]
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def test_a_served_model_is_asked_with_the_schema(server, start):
    model = Served(f"http://127.0.0.1:{server.server_port}/v1")
    run = start()
    plan_and_execute(run, model, "Do it.")
    assert ended(run) == ("done", "done") and model.name == "tiny"
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == plan_schema(Policy())
    assert [r["tokens"] for r in run.journal.all("said")] == [7, 7]


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1"):
        Served("http://127.0.0.1:9/v1")


def test_smollm2_is_held_to_the_schema_and_remembers_its_prompt():
    schema = {
        "type": "object",
        "properties": {"product": {"type": "string", "pattern": "^P[0-9]$"}, "quantity": {"enum": [1, 2, 3]}},
        "required": ["product", "quantity"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": "I want two of product P3. Answer in JSON."}]
    model = Local(max_tokens=24)
    first = model.reply(messages, schema)
    assert set(parse(first.text, schema)) == {"product", "quantity"} and 0 < first.tokens < 24
    assert model.reply(messages, schema) == first
    other = [{"role": "user", "content": "I want two of product P3. Answer in words."}]
    model.reply(other, schema)  # the cache is cut back to what both share
    assert model.reply(messages, schema) == first
    with pytest.raises(ValueError, match="no grammar"):
        model.reply(messages, {"type": "nonsense"})


# -- the tasks ------------------------------------------------------------------------------------------------------


def test_the_tasks_are_as_many_and_as_various_as_promised():
    every = tasks()
    assert len(every) >= 60 and len({t.id for t in every}) == len({t.task for t in every}) == len(every)
    assert len({c["tool"] for t in every for turn in t.turns for c in turn}) >= 8
    assert sum(t.reason is not None for t in every) >= 8
    assert sum(sum(TOOLS[c["tool"]].effect for turn in t.turns for c in turn) > 1 for t in every) >= 10
    assert all((t.kind == "impossible") == (t.reason is not None) == (t.answer is None) for t in every)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_script_solves_every_task(loop):
    rows = [attempt(task, Scripted(task.script(loop)), loop, Budget()) for task in tasks()]
    assert [r["id"] for r in rows if not r["solved"]] == []
    assert summary(rows)["valid replies"] == 1


def test_another_tasks_script_solves_no_task():
    """The judge looks at the shop and the answer: nothing but the right ones will do."""
    every = [t for t in tasks() if t.kind != "impossible"]
    for task, other in zip(every, [*every[7:], *every[:7]], strict=True):
        row = attempt(task, Scripted(other.script("react")), "react", Budget())
        assert not row["solved"], (task.id, other.id)
    for task in tasks():
        if task.reason:  # to run aground is not to say that it cannot be done
            assert not attempt(task, Scripted(["?"] * 3), "react", Budget())["solved"]
            finish = Scripted([{"calls": [call("finish", answer="done")]}])
            assert not attempt(task, finish, "react", Budget())["solved"]


# -- the command ----------------------------------------------------------------------------------------------------

TASK = "Customer C3 buys 2 of P10 and gets the message 'Two chairs are coming.'"
CREDIT = "Hana Kim's order came broken: cancel O5 (customer C8) and give her 500 cents of credit."


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return tmp_path / "agent-runs"


def test_a_run_is_made_audited_and_rolled_back(cache, capsys):
    assert command.main(["--model", "scripted", TASK]) == 0
    shown = capsys.readouterr().out
    for text in (
        "run 1:",
        "intent",
        "receipt   1-1 order=O7 amount=29800",
        "sent=true",
        "done: done",
        "head of",
    ):
        assert text in shown
    assert command.main(["--audit"]) == 0
    shown = capsys.readouterr().out
    assert "products/P10/stock: 4 → 2 by place_order" in shown and "is intact" in shown
    assert command.main(["--rollback", "1"]) == 0
    assert "cannot be undone: ['1-2']" in capsys.readouterr().out
    assert command.main(["--audit", "1"]) == 0
    assert "→ 4 by undo of place_order" in capsys.readouterr().out


def test_a_run_that_gives_up_says_so(cache, capsys):
    assert command.main(["--model", "scripted", "Cancel order O9 of customer C1."]) == 1
    assert "rolled back: there is no order O9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" \n"], "the task is empty"),
        (["x" * 2000], "2,000 characters"),
        (["--model", "gpt-9", "hello"], "there is no model gpt-9"),
        (["--model", "http://127.0.0.1:9/v1", "hello"], "the server at http://127.0.0.1:9/v1 does not serve"),
        (["--model", "scripted", "hello"], "knows only the tasks"),
        (["--audit"], "there is no run yet"),
        (["--audit", "7"], "there is no run 7"),
        (["--resume", "../1"], "there is no run ../1"),
        (["--rollback", ""], "there is no run "),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(arguments, message, cache, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not cache.exists() or not list(cache.iterdir())


def test_what_cannot_be_resumed_or_rolled_back_says_why(cache, capsys):
    command.main(["--model", "scripted", TASK])
    assert command.main(["--resume", "1"]) == 2
    assert "run 1 has ended: done" in capsys.readouterr().err
    command.main(["--rollback", "1"])
    assert command.main(["--rollback", "1"]) == 2
    assert "run 1 is rolled back already" in capsys.readouterr().err
    with command.opened("1"):
        assert command.main(["--audit", "1"]) == 2
    assert "another process is working on run 1" in capsys.readouterr().err
    with sqlite3.connect(cache / "1" / "journal.db") as log:
        log.execute("DROP TRIGGER no_update")
        log.execute("UPDATE log SET body = replace(body, '29800', '298')")
    for flag in ("--audit", "--resume", "--rollback"):
        assert command.main([flag, "1"]) == 2
        assert "tampered with: record" in capsys.readouterr().err
    (cache / "1" / "journal.db").write_bytes(b"not a database" * 100)
    assert command.main(["--audit", "1"]) == 2
    error = capsys.readouterr().err
    assert "cannot be used" in error and len(error.splitlines()) == 1


def test_an_interrupted_rollback_is_resumed_without_its_model(cache, capsys):
    name = command.new_run()
    with command.opened(name) as (shop, journal):
        run = begin(shop, journal, name=name, task="t", model="http://127.0.0.1:9/v1")
        run.call_all([call("place_order", **ORDER)])
        assert command.main(["--resume", name]) == 2  # this process works on it
    assert command.main(["--resume", name]) == 2
    assert "127.0.0.1:9/v1 does not serve" in capsys.readouterr().err
    with command.opened(name) as (_, journal):
        journal.append("rollback", why="asked for")
    assert command.main(["--resume", name]) == 0
    assert "rolled back: asked for" in capsys.readouterr().out
    command.new_run()  # killed before its first record
    assert command.main(["--resume", "2"]) == 2
    assert "before it began" in capsys.readouterr().err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_interrupted_in_the_middle_goes_on(sign, cache, capsys, monkeypatch):
    """It waits for a person's approval, with an order cancelled already."""
    start = [sys.executable, "-m", "labs.agent", "--model", "scripted", CREDIT]
    process = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    seen = b""
    while b"[y/N]" not in seen:
        chunk = process.stdout.read1()
        assert chunk, process.stderr.read()
        seen += chunk
    process.send_signal(sign)
    _, error = process.communicate(timeout=10)
    assert process.returncode == (130 if sign == signal.SIGINT else -9)
    assert sign == signal.SIGKILL or error.decode().strip().startswith(
        "interrupted\ngo on: python -m labs.agent --resume 1"
    )
    assert command.main(["--audit", "1"]) == 0
    assert "the run is running" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert command.main(["--resume", "1"]) == 0
    shown = capsys.readouterr().out
    assert "give_credit" in shown and "cancel_order" not in shown  # what was done is not done again
    assert command.main(["--audit", "1"]) == 0
    assert "customers/C8/balance: 30000 → 43000 by cancel_order (#4) → 43500 by give_credit" in capsys.readouterr().out


def test_no_answer_is_no_approval(cache, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: (_ for _ in ()).throw(EOFError))
    assert command.main(["--model", "scripted", "Give customer C4 a credit of 700 cents."]) == 1
    assert "a person did not approve give_credit" in capsys.readouterr().out


# -- learning ---------------------------------------------------------------------------------------------------------


def test_generated_traces_say_valid_things_and_leak_no_task():
    known = {learned.masked(t.task) for t in tasks()}
    for seed in range(60):
        dice = random.Random(seed)
        shop, parts = learned.example(dice)
        text = learned.text_of(parts, dice)
        assert learned.masked(text) not in known
        [messages] = learned.single(shop, parts, text)
        for message in messages:
            if message["role"] == "assistant":
                parse(message["content"], action_schema(Policy()))
