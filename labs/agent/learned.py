"""python -m labs.agent.learned: SmolLM2 learns the shop's tools from a script's traces, as one agent and as several.

The traces come from shops whose customers, products, ids and numbers are drawn anew, in other words than the 69 tasks'.
Three systems get the same number of training tokens, each its own fully tuned copy of SmolLM2-135M:

- single: one agent with all tools (the lab's ReAct loop);
- supervisor: one role that only routes, four workers with four to six tools each;
- pipeline: a reader that looks things up, a planner that writes steps, an executor that turns a step into a call.

The roles of a system share its weights and differ by the system prompt, one word. Writes results/learned.json.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field

import torch

from labkit.models import smollm2
from labs.agent.experiments import BUDGET, EVERY, attempt, record, summary
from labs.agent.loop import LOOPS, action_schema, ask
from labs.agent.models import Local, Model, Reply
from labs.agent.saga import Budget, GiveUp, Policy, Run
from labs.agent.shop import TOOLS, Refused, Shop, connect
from labs.agent.shop import record as schema_of
from labs.agent.tasks import tasks

TOKENS = 24_000  # of training, for each system
PLENTY = Budget(turns=12, seconds=300.0)  # the same for one agent and for several
BATCH = 600  # tokens, padding included
RATE = 2e-4
READS = ("search_products", "get_product", "get_customer", "list_orders")
WORKERS = {
    "desk": READS,
    "sales": (*READS, "place_order", "cancel_order"),
    "stock": ("search_products", "get_product", "restock", "set_price"),
    "care": ("get_customer", "give_credit", "update_address", "send_message"),
}

# -- other shops ------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


FIRST = words("Lena Omar Ivy Pavel Nora Sami Rosa Tariq Yuki Greta Hugo Mina Jonas Priya Felix Olga")
LAST = words("Fischer Reyes Clarke Horak Quinn Aalto Marin Aziz Mori Olsen Blanc Park Weber Nair Stone Ivanova")
STREET = words("Bridge Church Market Willow Orchard Garden Park Tower Forest Lake Rose King Mason North")
ROAD = words("Street Road Lane Way Close Square Gate Drive")
KIND = words(
    "vase bowl pan rug basket mirror jar shelf stool cushion curtain towel apron teapot tray bell frame ladder"
)
LOOK = words("green glass steel large small striped linen copper round black white plain heavy narrow")
MISSING = words("piano bicycle tent violin drone sofa")  # what no shop has
NUMBER = words("zero one two three four five six seven eight nine ten eleven twelve")


def other_shop(dice: random.Random) -> Shop:
    """A shop whose customers, products, orders and numbers are drawn anew."""
    shop = Shop(connect(":memory:"))
    shop.db.executescript("DELETE FROM customers; DELETE FROM products; DELETE FROM orders;")
    people = dice.sample([f"{a} {b}" for a in FIRST for b in LAST], 6)
    for number, name in zip(dice.sample(range(1, 30), 6), people, strict=True):
        address = f"{dice.randint(1, 99)} {dice.choice(STREET)} {dice.choice(ROAD)}"
        row = [f"C{number}", name, address, dice.choice([dice.randint(0, 9), dice.randint(50, 2000)]) * 100]
        shop.db.execute("INSERT INTO customers VALUES (?, ?, ?, ?)", row)
    kinds = dice.sample(KIND, 4)
    names = dice.sample([f"{a} {b}" for a in LOOK for b in kinds], 7)
    for number, name in zip(dice.sample(range(1, 30), 7), names, strict=True):
        row = [f"P{number}", name, dice.randint(2, 150) * 50, dice.choice([dice.randint(0, 3), dice.randint(4, 250)])]
        shop.db.execute("INSERT INTO products (id, name, price, stock) VALUES (?, ?, ?, ?)", row)
    products = rows(shop, "SELECT id, price FROM products")
    customers = rows(shop, "SELECT id FROM customers")
    for number in sorted(dice.sample(range(1, 40), 5)):
        (product, price), (customer,), n = dice.choice(products), dice.choice(customers), dice.randint(1, 12)
        insert = "INSERT INTO orders (id, customer, product, quantity, amount) VALUES (?, ?, ?, ?, ?)"
        shop.db.execute(insert, [number, customer, product, n, n * price])
    return shop


def rows(shop: Shop, select: str) -> list[tuple]:
    return shop.db.execute(select).fetchall()


# -- task families ----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What one worker can do alone: said in words, looked up, done."""

    worker: str
    text: str
    reads: list[list[dict]]  # turns
    effects: list[dict]
    facts: str = "nothing"  # what a reader hands on
    steps: list[str] = field(default_factory=list)  # what a planner hands on
    end: str = "finish"
    answer: str = "done"


def call(tool: str, **args) -> dict:
    return {"tool": tool, "args": args}


class Families:
    """Draws parts in one shop."""

    def __init__(self, shop: Shop, dice: random.Random):
        self.shop, self.dice = shop, dice
        self.customers = rows(shop, "SELECT id, name, address, balance FROM customers")
        self.products = rows(shop, "SELECT id, name, price, stock FROM products")
        self.orders = rows(shop, "SELECT 'O' || id, customer, product, quantity FROM orders")

    def customer(self, named: bool, row=None):
        """How it is called in the text, what must be read, the facts."""
        c = row or self.dice.choice(self.customers)
        if named:
            return c, c[1], [call("get_customer", customer=c[1])], [f"{c[1]} is {c[0]}"]
        return c, self.dice.choice(["customer {}", "{}", "the customer {}"]).format(c[0]), [], []

    def product(self, named: bool, row=None):
        p = row or self.dice.choice(self.products)
        if named:
            return p, p[1], [call("search_products", query=p[1])], [f"{p[1]} is {p[0]}"]
        return p, self.dice.choice(["product {}", "{}", f"{p[1]} ({{}})"]).format(p[0]), [], []

    def count(self, most: int) -> tuple[int, str]:
        n = self.dice.randint(1, most)
        return n, NUMBER[n] if n < len(NUMBER) and self.dice.random() < 0.3 else str(n)

    def one(self, named: bool) -> Part:
        return self.dice.choice([self.order, self.order, self.cancel, self.credit, self.move, self.restock, self.price,
                                 self.message])(named)  # fmt: skip

    def order(self, named: bool) -> Part:
        c, who, r1, f1 = self.customer(named and self.dice.random() < 0.7)
        p, what, r2, f2 = self.product(named and (not r1 or self.dice.random() < 0.6))
        affordable = min(p[3], c[3] // p[2])
        n, number = self.count(min(affordable, 20) if affordable and self.dice.random() < 0.9 else 9)
        text = self.dice.choice(
            [
                "Please sell {n} of {p} to {c}.",
                "{c} would like to have {n} of {p}.",
                "{c} takes {n} {p}.",
                "I need an order of {n} {p} for {c}.",
                "Book a purchase for {c}: {n} of {p}.",
                "Let {c} buy {n} {p}.",
                "Please order {p} for {c}, {n} of it.",
                "{n} of {p} should go to {c}.",
                "New order from {c}, {p}, {n} pieces.",
            ]
        ).format(c=who, p=what, n=number)
        effect = call("place_order", customer=c[0], product=p[0], quantity=n)
        return self.part("sales", text, r1 + r2, effect, f1 + f2, f"order {n} of {p[0]} for {c[0]}")

    def cancel(self, named: bool) -> Part:
        if not self.orders:
            return self.order(named)
        o = self.dice.choice(self.orders)
        c, who, reads, facts = self.customer(named, next(c for c in self.customers if c[0] == o[1]))
        effect, step = call("cancel_order", customer=c[0], order=o[0]), f"cancel {o[0]} of {c[0]}"
        theirs = [x for x in self.orders if x[1] == c[0]]
        if len(theirs) == 1 and (named or self.dice.random() < 0.3):  # which order it is has to be looked up
            text = self.dice.choice(
                ["Take back the purchase of {}.", "{} does not need the order now.", "Withdraw what {} has ordered."]
            ).format(who)
            turns = [*([reads] if reads else []), [call("list_orders", customer=c[0])]]
            facts = "; ".join([*facts, f"{c[0]} has {o[0]}"])
            return Part("sales", text, turns, [effect], facts, [step])
        text = self.dice.choice(
            [
                "Please withdraw order {o} by {c}.",
                "{c} gives back {o}.",
                "Order {o} from {c} is off.",
                "Undo {o}, {c}.",
                "{o} is to be cancelled; it belongs to {c}.",
                "Please cancel what {c} bought as {o}.",
            ]
        ).format(c=who, o=o[0])
        return self.part("sales", text, reads, effect, facts, step)

    def credit(self, named: bool) -> Part:
        c, who, reads, facts = self.customer(named)
        n = self.dice.randint(1, 60) * self.dice.choice([10, 50, 100])
        text = self.dice.choice(
            ["Credit {c} with {n} cents.", "{c} gets {n} cents from us as an excuse.",
             "Say sorry to {c} with {n} cents.", "Add a credit of {n} cents for {c}.", "{c} shall receive {n} cents."]
        ).format(c=who, n=n)  # fmt: skip
        effect = call("give_credit", customer=c[0], cents=n)
        return self.part("care", text, reads, effect, facts, f"credit {c[0]} {n}")

    def move(self, named: bool) -> Part:
        c, who, reads, facts = self.customer(named)
        address = f"{self.dice.randint(1, 99)} {self.dice.choice(STREET)} {self.dice.choice(ROAD)}"
        text = self.dice.choice(
            ["{c} lives at {a} now.", "The address of {c} is {a} from today.", "Please note a move: {c}, {a}.",
             "{c} is moving to {a}.", "Write down {a} as the home of {c}."]
        ).format(c=who, a=address)  # fmt: skip
        effect = call("update_address", customer=c[0], address=address)
        return self.part("care", text, reads, effect, facts, f"address of {c[0]}: {address}")

    def restock(self, named: bool) -> Part:
        p, what, reads, facts = self.product(named)
        n, number = self.count(60)
        text = self.dice.choice(
            ["{n} of {p} came in.", "The supplier brought {n} {p}.", "Put {n} {p} on the shelf.",
             "We received {n} of {p}; count them in.", "Increase the stock of {p} by {n}."]
        ).format(p=what, n=number)  # fmt: skip
        effect = call("restock", product=p[0], quantity=n)
        return self.part("stock", text, reads, effect, facts, f"restock {p[0]} by {n}")

    def price(self, named: bool) -> Part:
        p, what, reads, facts = self.product(named)
        n = self.dice.randint(2, 200) * 50
        text = self.dice.choice(
            ["{p} is {n} cents now.", "Make {p} cost {n} cents.", "New price of {p}: {n} cents.",
             "We sell {p} at {n} cents from today.", "Reprice {p} at {n} cents."]
        ).format(p=what, n=n)  # fmt: skip
        effect = call("set_price", product=p[0], cents=n)
        return self.part("stock", text, reads, effect, facts, f"price of {p[0]}: {n}")

    def message(self, named: bool) -> Part:
        c, who, reads, facts = self.customer(named)
        words = self.dice.choice(["Your {} is ready.", "The {} you wanted is here.", "We are sorry about the {}.",
                                  "The {} comes on Monday.", "Thank you for the {}."])  # fmt: skip
        said = words.format(self.dice.choice(KIND))
        text = self.dice.choice(
            ["Write to {c}: '{t}'", "Let {c} know: '{t}'", "A message for {c}: '{t}'", "Please write '{t}' to {c}."]
        ).format(c=who, t=said)
        effect = call("send_message", customer=c[0], text=said)
        return self.part("care", text, reads, effect, facts, f"message to {c[0]}: {said}")

    def part(self, worker, text, reads, effect, facts, step) -> Part:
        text = text[0].upper() + text[1:]
        return Part(worker, text, [reads] if reads else [], [effect], "; ".join(facts) or "nothing", [step])

    def question(self) -> Part:
        p, c = self.dice.choice(self.products), self.dice.choice(self.customers)
        by_name = self.dice.random() < 0.4
        what = p[1] if by_name else self.dice.choice(["{}", "product {}", f"{p[1]} ({{}})"]).format(p[0])
        who = c[1] if self.dice.random() < 0.4 else self.dice.choice(["{}", "customer {}"]).format(c[0])
        product = call("search_products", query=p[1]) if by_name else call("get_product", product=p[0])
        person = call("get_customer", customer=c[1] if who == c[1] else c[0])
        kind = p[1].split()[1]
        cheapest = min((x for x in self.products if kind in x[1]), key=lambda x: x[2])
        theirs = [o for o in self.orders if o[1] == c[0]]
        listed = [*([[person]] if who == c[1] else []), [call("list_orders", customer=c[0])]]
        few = ["{} of them", "{}", "{} pieces"]
        choices = [
            (["Tell me the price of {}.", "How much is {}?", "Price of {} please."], what,
             [[product]], f"{p[2]} cents"),
            (["How many pieces of {} are left?", "Is there {} in stock, and how much?", "Stock of {}?"], what,
             [[product]], self.dice.choice(few).format(p[3])),
            (["How much money does {} have?", "Balance of {} please."], who, [[person]], f"{c[3]} cents"),
            (["Tell me where {} lives.", "I need the address of {}.", "To which address do we send for {}?"], who,
             [[person]], c[2]),
            (["Which id does the customer {} have?", "Find the number of customer {}."], c[1],
             [[call("get_customer", customer=c[1])]], c[0]),
            (["Which id has the {}?", "Find the number of the product {}."], p[1],
             [[call("search_products", query=p[1])]], p[0]),
            (["Give me the id of the {} with the lowest price.", "What is our least expensive {}? Its id please."],
             kind, [[call("search_products", query=kind)]], cheapest[0]),
            (["Count the orders of {}.", "{} has how many orders?"], who, listed, f"{len(theirs)} orders"),
        ]  # fmt: skip
        if len(theirs) == 1:
            choices += [(["What has {} ordered? The product id please.", "Id of the product that {} bought?"], who,
                         listed, theirs[0][2]),
                        (["How many pieces has {} ordered?"], who, listed, f"{theirs[0][3]}")]  # fmt: skip
        texts, about, turns, answer = self.dice.choice(choices)
        return Part("desk", self.dice.choice(texts).format(about), turns, [], answer, [], answer=answer)

    def impossible(self) -> Part:
        c, p = self.dice.choice(self.customers), self.dice.choice(self.products)
        stranger = next(n for n in iter(lambda: f"{self.dice.choice(FIRST)} {self.dice.choice(LAST)}", "")
                        if n not in [x[1] for x in self.customers])  # fmt: skip
        missing = f"{self.dice.choice(LOOK)} {self.dice.choice(MISSING)}"
        who = self.dice.choice(["{}", "customer {}"]).format(c[0])
        if self.dice.random() < 0.45:  # the shop will refuse: no goods, no money, no such order
            wrong = self.dice.choice(["goods", "money", "order"])
            if wrong == "order":
                o = f"O{self.dice.randint(1, 60)}"
                o = next((x[0] for x in self.orders if x[1] != c[0]), o) if self.dice.random() < 0.5 else o
                if o in [x[0] for x in self.orders if x[1] == c[0]]:
                    return self.impossible()
                text = self.dice.choice(["Please withdraw order {o} by {c}.", "{c} gives back {o}.", "{c}: undo {o}."])
                effect = call("cancel_order", customer=c[0], order=o)
                return self.part("sales", text.format(o=o, c=who), [], effect, [], f"cancel {o} of {c[0]}")
            n = (
                p[3] + self.dice.randint(1, 5)
                if wrong == "goods"
                else min(1000, c[3] // p[2] + self.dice.randint(1, 3))
            )
            text = self.dice.choice(
                [
                    "Please sell {n} of {p} to {c}, all or none.",
                    "{c} takes {n} of {p}, no fewer.",
                    "{n} {p} should go to {c}.",
                ]
            ).format(n=n, p=p[0], c=who)
            effect = call("place_order", customer=c[0], product=p[0], quantity=n)
            return self.part("sales", text, [], effect, [], f"order {n} of {p[0]} for {c[0]}")
        n = self.dice.randint(2, 60)
        search, ask_for = [[call("search_products", query=missing)]], [[call("get_customer", customer=stranger)]]
        give_up = [
            ("sales", f"Please sell {n} {missing}s to {who}.", search, f"no {missing}"),
            ("stock", f"The supplier brought {n} {missing}s.", search, f"no {missing}"),
            ("care", f"Credit {stranger} with {n * 10} cents.", ask_for, "unknown customer"),
            ("care", f"{stranger} lives at {n} Lake Road now.", ask_for, "unknown customer"),
            ("desk", self.dice.choice(["Tell me the {} of {}.", "Which {} has {}?"]).format(
                self.dice.choice(["e-mail", "phone", "birthday", "shoe size"]), who),
             [[call("get_customer", customer=c[0])]], "that is not kept"),
            ("", self.dice.choice(
                ["Remove {} and all that is known about them.", "Rename {} to Bob.", "Merge {} with C99.",
                 "Call {} back the message of today.", "Phone {} at once.", "Block the account of {}."]
            ).format(who), [], "no tool for that"),
            ("", self.dice.choice(
                ["Drop {} from the catalogue.", "Take a photo of {}.", "Rename {}."]
            ).format(p[0]), [], "no tool for that"),
        ]  # fmt: skip
        worker, text, turns, why = self.dice.choice(give_up)
        text = text[0].upper() + text[1:]
        return Part(worker, text, turns, [], f"{why}", [], end="give_up", answer=why)


def example(dice: random.Random) -> tuple[Shop, list[Part]]:
    """One task in a new shop: the parts in the order in which they are done."""
    shop = other_shop(dice)
    families, kind = Families(shop, dice), dice.random()
    if kind < 0.25:
        return shop, [families.question()]
    if kind < 0.42:
        return shop, [families.impossible()]
    if kind < 0.62:
        return shop, [families.one(named=False)]
    if kind < 0.8:
        return shop, [families.one(named=True)]
    return shop, [families.one(named=dice.random() < 0.2) for _ in range(2 if dice.random() < 0.8 else 3)]


def text_of(parts: list[Part], dice: random.Random) -> str:
    if len(parts) == 1:
        return parts[0].text
    first, *more = [p.text.rstrip(".") for p in parts]
    joint = dice.choice([". Then: ", ". After that: ", ", and ", "; ", ". "])
    lower = (t if re.match(r"[CPO]\d|[A-Z]\w+ [A-Z]", t) or joint == ". " else t[0].lower() + t[1:] for t in more)
    return joint.join([first, *lower]) + "."


# -- traces: what each role says, and hears ----------------------------------------------------------------------------


def plain(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def perform(shop: Shop, calls: list[dict]) -> list[dict]:
    """What the lab's loop would be told."""
    results = []
    for c in calls:
        try:
            held = TOOLS[c["tool"]].held
            result = (
                {"held": "will be done when the run finishes"} if held else shop.call(c["tool"], c["args"])["result"]
            )
        except Refused as no:
            result = {"error": str(no)}
        results.append(result)
    return results


def acting(role: str, text: str, turns: list[list[dict]], end: str, answer: str, shop: Shop) -> tuple[list[dict], dict]:
    """A ReAct trace that ends at the first refusal, and how it ended."""
    messages = [{"role": "system", "content": role}, {"role": "user", "content": text}]
    for calls in turns:
        results = perform(shop, calls)
        messages += [
            {"role": "assistant", "content": plain({"calls": calls})},
            {"role": "user", "content": plain({"results": results})},
        ]
        if why := next((r["error"] for r in results if "error" in r), None):
            end, answer = "give_up", why[:80]
            break
    name = "answer" if end == "finish" else "reason"
    messages.append({"role": "assistant", "content": plain({"calls": [call(end, **{name: answer})]})})
    return messages, {"done" if end == "finish" else "failed": answer}


def single(shop: Shop, parts: list[Part], text: str) -> list[list[dict]]:
    turns = [t for p in parts for t in [*p.reads, *([p.effects] if p.effects else [])]]
    return [acting("agent", text, turns, parts[-1].end, parts[-1].answer, shop)[0]]


def supervisor(shop: Shop, parts: list[Part], text: str) -> list[list[dict]]:
    traces, messages = [], [{"role": "system", "content": "supervisor"}, {"role": "user", "content": text}]
    report = {"failed": parts[0].answer}
    for p in parts:
        if not p.worker:  # nobody has a tool for that
            break
        messages.append({"role": "assistant", "content": plain({"to": p.worker, "task": p.text})})
        turns = [*p.reads, *([p.effects] if p.effects else [])]
        trace, report = acting(p.worker, p.text, turns, p.end, p.answer, shop)
        traces.append(trace)
        messages.append({"role": "user", "content": plain(report)})
        if "failed" in report:
            break
    [(how, what)] = report.items()
    last = {"to": "finish" if how == "done" else "give_up", "task": what}
    messages.append({"role": "assistant", "content": plain(last)})
    return [messages, *traces]


def pipeline(shop: Shop, parts: list[Part], text: str) -> list[list[dict]]:
    reads = [t for p in parts for t in p.reads]
    facts = "; ".join(p.facts for p in parts if p.facts != "nothing") or "nothing"
    reader = acting("reader", text, reads, "finish", facts[:120], shop)[0]
    reader[-1]["content"] = plain({"calls": [call("finish", answer=facts[:120])]})
    plan = {"steps": [s for p in parts for s in p.steps], "answer": parts[-1].answer}
    if parts[-1].end == "give_up":
        plan = {"steps": ["give_up"], "answer": parts[-1].answer}
    planner = [
        {"role": "system", "content": "planner"},
        {"role": "user", "content": plain({"task": text, "facts": facts[:120]})},
        {"role": "assistant", "content": plain(plan)},
    ]
    executor = [
        [{"role": "system", "content": "executor"}, {"role": "user", "content": step},
         {"role": "assistant", "content": plain({"calls": [effect]})}]
        for p in parts for step, effect in zip(p.steps, p.effects, strict=True)
    ]  # fmt: skip
    return [reader, planner, *executor]


SYSTEMS = {"single": single, "supervisor": supervisor, "pipeline": pipeline}


def masked(text: str) -> str:
    """A task without its ids, numbers, quotations and people's names: what is left is its wording."""
    text = re.sub(r"'[^']*'", "'…'", text)
    return re.sub(r"\b(?:[CPO]?\d+|[A-Z][a-z]+ [A-Z][a-z]+)\b", "…", text).strip().lower()


def dataset(system: str, tokenizer, seed: int = 0) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """Tokens with what of them is learned, TOKENS in all or a trace more, and from how many tasks, all different."""
    dice, made, total, number = random.Random(seed), [], 0, 0
    seen, wordings = {t.task for t in tasks()}, {masked(t.task) for t in tasks()}
    while total < TOKENS:
        shop, parts = example(dice)
        text = text_of(parts, dice)
        assert text not in seen and masked(text) not in wordings, text  # no task of the evaluation, nor its wording
        seen.add(text)
        number += 1
        for messages in SYSTEMS[system](shop, parts, text):
            made.append(encode(tokenizer, messages))
            total += len(made[-1][0])
    return made, number


def encode(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """The chat template's tokens; learned is what the assistant says, with the token that ends it."""
    ids, learned = [], []
    for m in messages:
        head, body = f"<|im_start|>{m['role']}\n", f"{m['content']}<|im_end|>"
        for text, says in ((head, False), (body, m["role"] == "assistant"), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            learned += [says] * len(piece)
    return ids, learned


# -- learning ---------------------------------------------------------------------------------------------------------


def batches(made: list[tuple], dice: random.Random) -> list[list[tuple]]:
    """Of about equal length, so that little is padded; in random order."""
    dice.shuffle(made)
    window = 64
    groups, current = [], []
    for at in range(0, len(made), window):
        for item in sorted(made[at : at + window], key=lambda m: len(m[0])):
            if current and len(item[0]) * (len(current) + 1) > BATCH:
                groups.append(current)
                current = []
            current.append(item)
    groups.append(current)
    dice.shuffle(groups)
    return groups


def train(system: str, seed: int = 0) -> tuple[object, object, dict]:
    """SmolLM2, all weights tuned, each trace seen once."""
    model, tokenizer = smollm2()
    made, number = dataset(system, tokenizer, seed)
    groups = batches(made, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    steps = len(groups)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / (0.1 * steps)) * (1 - s / steps))
    begin, losses = time.process_time(), []
    for group in groups:
        length = max(len(ids) for ids, _ in group)
        ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in group])
        says = torch.tensor([s + [False] * (length - len(s)) for _, s in group])
        # What is padded stands at the end: no real token attends to it, and nothing is learned there.
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][says[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][says[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), rate.step(), optimizer.zero_grad()
        losses.append(round(loss.item(), 3))
        if len(losses) % 5 == 0:
            print(f"{system}: step {len(losses)} of {steps}, loss {loss.item():.3f}", flush=True)
    facts = {
        "tokens": sum(len(ids) for ids, _ in made),
        "tokens learned": sum(sum(s) for _, s in made),
        "tasks": number,
        "traces": len(made),
        "steps": steps,
        "losses": losses,
        "cpu seconds": round(time.process_time() - begin, 1),
    }
    return model.eval(), tokenizer, facts


# -- several agents ---------------------------------------------------------------------------------------------------

ROUTE = schema_of(
    to={"enum": [*WORKERS, "finish", "give_up"]}, task={"type": "string", "minLength": 1, "maxLength": 120}
)
PLAN = schema_of(
    steps={"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 80}, "maxItems": 4},
    answer={"type": "string", "maxLength": 80},
)


def supervised(run: Run, model: Model, task: str) -> None:
    """The supervisor names a worker and its part of the task, hears the report, and decides again."""
    messages = opening("supervisor", task)
    try:
        while True:
            order = ask(run, model, messages, ROUTE)
            if order["to"] == "finish":
                return run.commit(order["task"])
            if order["to"] == "give_up":
                raise GiveUp(order["task"])
            how, what = work(run, model, order["to"], order["task"], WORKERS[order["to"]])
            messages.append({"role": "user", "content": plain({how: what})})
    except GiveUp as why:
        run.rollback(str(why))


def work(run: Run, model: Model, role: str, task: str, tools: tuple[str, ...]) -> tuple[str, str]:
    """One worker with its tools, until it reports: done or failed, and what."""
    messages, schema = opening(role, task), action_schema(Policy(tools=tools))
    while True:
        calls = ask(run, model, messages, schema)["calls"]
        for c in calls:
            if c["tool"] in ("finish", "give_up"):
                return ("done" if c["tool"] == "finish" else "failed"), next(iter(c["args"].values()))
        results = [result for c in calls for result in run.call_all([c])]
        messages.append({"role": "user", "content": plain({"results": results})})


def piped(run: Run, model: Model, task: str) -> None:
    """Facts, steps, calls. Nobody sees what comes after: a refused call ends the run."""
    try:
        _, facts = work(run, model, "reader", task, READS)
        plan = ask(run, model, opening("planner", plain({"task": task, "facts": facts})), PLAN)
        if plan["steps"] == ["give_up"]:
            raise GiveUp(plan["answer"])
        effects = tuple(name for name, tool in TOOLS.items() if tool.effect)
        for step in plan["steps"]:
            for c in ask(run, model, opening("executor", step), action_schema(Policy(tools=effects)))["calls"]:
                if c["tool"] in TOOLS:
                    [result] = run.call_all([c])
                    if "error" in result:
                        raise GiveUp(result["error"])
    except GiveUp as why:
        return run.rollback(str(why))
    run.commit(plan["answer"])


def opening(role: str, task: str) -> list[dict]:
    return [{"role": "system", "content": role}, {"role": "user", "content": task}]


class Tuned(Local):
    """A given model that counts what it reads. ``compact``: the lab's system prompt is replaced by one word."""

    def __init__(self, model, tokenizer, *, compact: bool = True, **options):
        super().__init__(**options)
        self.__dict__["_loaded"] = (model, tokenizer)
        self.compact, self.read, self.talk = compact, 0, []

    def reply(self, messages: list[dict], schema: dict) -> Reply:
        if self.compact and messages[0]["content"].startswith("You work in a shop"):
            messages = [{"role": "system", "content": "agent"}, *messages[1:]]
        tokenizer = self._loaded[1]
        self.read += len(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        reply = super().reply(messages, schema)
        self.talk.append((messages[0]["content"], messages[-1]["content"], reply.text))
        return reply


# -- what is measured -------------------------------------------------------------------------------------------------


def evaluate(loop: str, model: Tuned, chosen: list, budget: Budget) -> list[dict]:
    made = []
    for task in chosen:
        model.read, model.talk = 0, []
        row = attempt(task, model, loop, budget)
        roles = ("supervisor", "reader", "planner", "executor", "agent", *WORKERS)
        talk = [{"role": who if who in roles else "agent", "said": said} for who, _, said in model.talk]
        made.append(row | {"read": model.read, "talk": talk})
        print(f"{loop} {task.id} {task.kind:10} {row['solved']!s:5} {row['replies']} replies  {task.task}", flush=True)
        if not row["solved"]:
            print("      ", [t["said"] for t in talk][:5], row["ended"], flush=True)
    return made


QUESTIONS = {  # ordinary questions, and what a right answer contains
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Italy?": "Rome",
    "Which planet do we live on?": "Earth",
    "What colour is the sky on a clear day?": "blue",
    "How many days has a week?": "seven|7",
    "What is the opposite of hot?": "cold",
    "Who wrote the play Romeo and Juliet?": "Shakespeare",
    "What gas do people need to breathe?": "oxygen",
    "What is frozen water called?": "ice",
    "Which animal says meow?": "cat",
    "What is the largest ocean on Earth?": "Pacific",
    "In which country are the pyramids of Giza?": "Egypt",
    "What is the first month of the year?": "January",
    "How many legs has a spider?": "eight|8",
    "What do bees make?": "honey",
    "Which star is nearest to the Earth?": "Sun",
    "What language do people speak in Brazil?": "Portuguese",
    "What is the chemical formula of water?": "H2O|H₂O",
    "Which season comes after winter?": "spring",
}
PROSE = words(
    "argparse bisect csv dataclasses decimal difflib doctest fractions hashlib heapq locale pickle random shlex"
    " statistics string tarfile textwrap threading unittest"
)


def harm(model, tokenizer) -> dict:
    """Perplexity on the standard library's prose, and ordinary questions: answered, or taken for a tool call?"""
    total, count = 0.0, 0
    with torch.inference_mode():
        for name in PROSE:
            ids = tokenizer(importlib.import_module(name).__doc__ or "", return_tensors="pt")["input_ids"][:, :256]
            if ids.shape[1] > 16:
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        free, said = Local(constrained=False, max_tokens=24), {}
        free.__dict__["_loaded"] = (model, tokenizer)
        for question in QUESTIONS:
            said[question] = free.reply([{"role": "user", "content": question}], {}).text
    right = sum(bool(re.search(rf"(?i)\b({QUESTIONS[q]})\b", s)) for q, s in said.items())
    return {
        "perplexity": round(math.exp(total / count), 2),
        "tokens of prose": count,
        "questions": len(said),
        "answered": right,
        "answered by a call": sum(s.lstrip().startswith("{") for s in said.values()),
        "said": said,
    }


def main(few: int = 0) -> None:
    LOOPS.update(supervisor=supervised, pipeline=piped)
    chosen, third = tasks()[: few or None], tasks()[: few or None][::EVERY]
    runs, training, harmed = {}, {}, {}

    def save() -> None:
        table = [
            {"system": name} | summary(rows) | {"read": sum(r["read"] for r in rows)} for name, rows in runs.items()
        ]
        content = {
            "what": "SmolLM2 tuned on generated traces; one agent and several on the same tasks with equal training",
            "settings": {"tokens": TOKENS, "rate": RATE, "batch tokens": BATCH, "turns": PLENTY.turns},
            "training": training,
            "table": table,
            "harm": harmed,
            "runs": runs,
        }
        if few:
            print(json.dumps(content)[:4000])
        else:
            record("learned", content)

    for system, loop in (("single", "react"), ("supervisor", "supervisor"), ("pipeline", "pipeline")):
        model, tokenizer, training[system] = train(system)
        harmed[system] = harm(model, tokenizer)
        runs[system] = evaluate(loop, Tuned(model, tokenizer), chosen, PLENTY)
        save()
        if system == "single":
            model_long = Tuned(model, tokenizer, compact=False)
            runs["single, long prompt"] = evaluate(loop, model_long, third, BUDGET)
    model, tokenizer = smollm2()
    harmed["untuned"] = harm(model, tokenizer)
    runs["untuned, short prompt"] = evaluate("react", Tuned(model, tokenizer), third, BUDGET)
    save()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        TOKENS = 3_000
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
