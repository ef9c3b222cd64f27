"""The loop: ReAct and plan-and-execute, with the same tools, budgets and log behind both.

ReAct (Yao et al., 2022, https://arxiv.org/abs/2210.03629) decides one step at a time and sees what came of it. Plan-and-
execute asks once for all steps, does those that do not wait for each other at the same time, and undoes all if one fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from labs.agent.models import Model, first_object
from labs.agent.saga import GiveUp, Policy, Run, mismatch
from labs.agent.shop import TEXT, TOOLS, record

INVALID = 3  # replies in a row that nothing can be done with
ENDINGS = {
    "finish": ("the task is done; say the answer", {"answer": {"type": "string", "maxLength": 120}}),
    "give_up": ("the task cannot be done; nothing will be changed", {"reason": TEXT}),
}
Loop = Callable[[Run, Model, str], None]


def react(run: Run, model: Model, task: str) -> None:
    """One step at a time until the model ends it, a budget does, or it goes in circles. The log says how it ended."""
    messages, seen = opening(run.policy, task, REACT), []
    try:
        while True:
            calls = ask(run, model, messages, action_schema(run.policy))["calls"]
            if len(calls) == 1 and calls[0]["tool"] == "finish":
                return run.commit(calls[0]["args"]["answer"])
            if any(c["tool"] == "give_up" for c in calls):
                raise GiveUp(next(c["args"]["reason"] for c in calls if c["tool"] == "give_up"))
            if any(c["tool"] == "finish" for c in calls):
                results = [{"error": "finish must stand alone: look at the results first"}]
            elif all(c["tool"] in TOOLS and not TOOLS[c["tool"]].effect for c in calls):
                results = run.call_all(calls)  # reading is safe in any order, so at the same time
            else:
                results = [result for call in calls for result in run.call_all([call])]
            seen.append(json.dumps([calls, results], sort_keys=True))
            if circling(seen):
                raise GiveUp("stopped: the same calls with the same results, again and again")
            messages.append({"role": "user", "content": json.dumps({"results": results}, ensure_ascii=False)})
    except GiveUp as why:
        run.rollback(str(why))


def plan_and_execute(run: Run, model: Model, task: str) -> None:
    """Plan all, do it in waves, answer. If a step fails, all is undone: the plan was made for a world where it works."""
    messages = opening(run.policy, task, PLAN)
    try:
        steps = ask(run, model, messages, plan_schema(run.policy))["steps"]
        if gives_up := [step for step in steps if step["tool"] == "give_up"]:  # wherever it stands: before any effect
            raise GiveUp(gives_up[0]["args"]["reason"])
        results: dict[int, dict] = {}
        for wave in waves(steps):
            calls = [{"tool": steps[n - 1]["tool"], "args": fill(steps[n - 1]["args"], results)} for n in wave]
            results |= zip(wave, run.call_all(calls), strict=True)
            for n in wave:
                if "error" in results[n]:
                    raise GiveUp(f"step {n}, {steps[n - 1]['tool']}: {results[n]['error']}")
        told = {"results": [results[n] for n in sorted(results)]}
        messages.append({"role": "user", "content": json.dumps(told, ensure_ascii=False) + " Now say the answer."})
        answer = ask(run, model, messages, ANSWER)["answer"]
    except GiveUp as why:
        return run.rollback(str(why))
    run.commit(answer)


LOOPS: dict[str, Loop] = {"react": react, "plan": plan_and_execute}


def ask(run: Run, model: Model, messages: list[dict], schema: dict) -> dict:
    """A reply that follows the schema. What is wrong with one that does not is told to the model, as data."""
    for _ in range(INVALID):
        text = run.ask(model, messages, schema)
        messages.append({"role": "assistant", "content": text})
        try:
            return parse(text, schema)
        except ValueError as error:
            messages.append({"role": "user", "content": json.dumps({"error": str(error)}, ensure_ascii=False)})
    raise GiveUp(f"stopped: {INVALID} replies in a row were not valid")


def parse(text: str, schema: dict) -> dict:
    """The first JSON object of a text, if it follows the schema. Raises ``ValueError`` that says what is wrong."""
    value = first_object(text)
    if why := mismatch(value, schema):
        raise ValueError(why)
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, and no database takes it
    return value


def circling(seen: list[str], times: int = 3) -> bool:
    """Whether the last turns are the same one, two or three turns, ``times`` times over.

    With their results: asking again is no circle while the answer changes.
    """
    for period in (1, 2, 3):
        last = seen[-period * times :]
        if len(last) == period * times and last == last[:period] * times:
            return True
    return False


# -- plans ----------------------------------------------------------------------------------------------------------

REFERENCE = re.compile(r"\$(\d+)((?:\.\w+)+)")  # $2.products.0.id: from the result of step 2


def waves(steps: list[dict]) -> list[list[int]]:
    """Step numbers, from 1, in groups: each waits only for steps of the groups before. Raises ``GiveUp`` if none can."""
    waits = {}
    for n, step in enumerate(steps, 1):
        named = {int(found[1]) for found in REFERENCE.finditer(json.dumps(step["args"]))}
        waits[n] = named | set(step.get("after", ()))
    order: list[list[int]] = []
    while waits:
        ready = [
            n for n, before in waits.items() if not before & waits.keys() and before <= set(range(1, len(steps) + 1))
        ]
        if not ready:
            raise GiveUp("the steps of the plan wait for each other, or for one that is not there")
        order.append(ready)
        for n in ready:
            del waits[n]
    return order


def fill(arguments: dict, results: dict[int, dict]) -> dict:
    """The arguments with references replaced by what they refer to. A reference is looked up, never evaluated."""

    def value(raw):
        found = REFERENCE.fullmatch(raw) if isinstance(raw, str) else None
        if not found:
            return raw
        there = results[int(found[1])]
        for part in found[2][1:].split("."):
            try:
                there = there[int(part) if isinstance(there, list) else part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise GiveUp(f"{raw} is not in the result: {json.dumps(results[int(found[1])])[:200]}") from None
        return there

    return {name: value(raw) for name, raw in arguments.items()}


# -- what the model is told -----------------------------------------------------------------------------------------


def _choices(policy: Policy, extra: tuple[str, ...], loosen: Callable[[dict], dict], **more) -> list[dict]:
    """One schema a tool. A tool that is not allowed is not offered; the run would refuse it all the same."""
    offered = {n: TOOLS[n].parameters["properties"] for n in policy.tools} | {n: ENDINGS[n][1] for n in extra}
    return [
        record(tool={"const": name}, args=record(**{k: loosen(v) for k, v in properties.items()}), **more)
        for name, properties in offered.items()
    ]


def action_schema(policy: Policy) -> dict:
    choices = _choices(policy, ("finish", "give_up"), lambda schema: schema)
    schema = record(calls={"type": "array", "items": {"anyOf": choices}, "minItems": 1, "maxItems": 4})
    thought = {"thought": {"type": "string", "maxLength": 200}}  # a model may reason before it acts; it need not
    return schema | {"properties": thought | schema["properties"]}


def plan_schema(policy: Policy) -> dict:
    reference = {"type": "string", "pattern": f"^{REFERENCE.pattern}$"}
    after = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 8}
    choices = _choices(policy, ("give_up",), lambda schema: {"anyOf": [schema, reference]}, after=after)
    return record(steps={"type": "array", "items": {"anyOf": choices}, "minItems": 1, "maxItems": 9})


ANSWER = record(answer=ENDINGS["finish"][1]["answer"])

REACT = """Reply with one JSON object: {"calls": [{"tool": "...", "args": {...}}]}. You then get the results.
End with finish or give_up. Examples of replies:
{"calls": [{"tool": "get_product", "args": {"product": "P5"}}]}
{"calls": [{"tool": "place_order", "args": {"customer": "C2", "product": "P11", "quantity": 4}}]}
{"calls": [{"tool": "finish", "args": {"answer": "4 candles are ordered."}}]}"""
PLAN = """Reply with one JSON object that holds all steps. A step lists the steps that it comes after; "$1.id" stands for
the id in the result of step 1. If the task cannot be done, give_up is the only step. Example:
{"steps": [{"tool": "get_customer", "args": {"customer": "Ben Okafor"}, "after": []},
{"tool": "place_order", "args": {"customer": "$1.id", "product": "P11", "quantity": 4}, "after": [1]}]}"""


def opening(policy: Policy, task: str, how: str) -> list[dict]:
    """The first messages: tools, form of the reply, task."""
    described = {n: (TOOLS[n].description, TOOLS[n].parameters["properties"]) for n in policy.tools} | ENDINGS
    tools = "\n".join(f"{name}({', '.join(p)}): {text}" for name, (text, p) in described.items())
    told = f"You work in a shop and act only by tools. Money is in cents.\n{tools}\n{how}"
    return [{"role": "system", "content": told}, {"role": "user", "content": task}]
