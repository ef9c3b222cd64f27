"""What stands behind the loop: a script, any OpenAI-compatible server, or SmolLM2 on this machine.

All get the messages so far and the JSON Schema that the reply should follow, and give back text. Nobody trusts that text:
the loop parses and validates it whoever wrote it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from labkit.models import smollm2


class ModelError(Exception):
    """The model cannot be asked: no server there, or it refuses the request."""


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # written by the model


def first_object(text: str):
    """The first JSON object of a text. Raises ``ValueError`` if there is none, or not all of it."""
    if "{" not in text:
        raise ValueError("there is no JSON object in the reply")
    try:
        return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


class Model(Protocol):
    def reply(self, messages: list[dict], schema: dict) -> Reply: ...


@dataclass(frozen=True)
class Scripted:
    """Says its lines in order, whatever it hears. How many it has said is counted in the messages: it has no state."""

    script: list  # of what can be written as JSON; a string is said as it is

    def reply(self, messages: list[dict], schema: dict) -> Reply:
        said = sum(m["role"] == "assistant" for m in messages)
        if said >= len(self.script):
            raise ModelError("the script has no more lines")
        line = self.script[said]
        return Reply(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False), 0)


class Served:
    """A model behind an OpenAI-compatible server, for example ``http://127.0.0.1:8000/v1``; the first that it offers.

    ``OPENAI_API_KEY`` is sent if it is set. Raises ``ModelError`` if the server cannot be reached.
    """

    def __init__(self, url: str, *, max_tokens: int = 512, timeout: float = 120.0):
        from openai import OpenAI

        self.url, self.max_tokens = url, max_tokens
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=2)
        self.name = self._ask(lambda: self.client.models.list().data[0].id)

    def reply(self, messages: list[dict], schema: dict) -> Reply:
        made = self._ask(
            lambda: self.client.chat.completions.create(
                model=self.name,
                messages=messages,
                temperature=0,
                max_tokens=self.max_tokens,
                response_format={"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}},
            )
        )
        return Reply(made.choices[0].message.content or "", made.usage.completion_tokens if made.usage else 0)

    def _ask(self, request):
        from openai import OpenAIError

        try:
            return request()
        except (OpenAIError, IndexError, ValueError) as error:  # no server, no model, no JSON
            raise ModelError(f"the server at {self.url} does not serve: {str(error) or type(error).__name__}") from None


class Local:
    """SmolLM2-135M, greedily. With ``constrained`` only tokens that keep the reply within the schema can be chosen.

    The mask comes from llguidance (https://github.com/guidance-ai/llguidance). Where the schema leaves one way to go on,
    the tokens are written without asking the model. The cache of keys and values is kept for the next call: what it shares
    with this prompt from the beginning is not computed again.
    """

    def __init__(self, *, constrained: bool = True, max_tokens: int = 128):
        self.constrained, self.max_tokens = constrained, max_tokens
        self._cache, self._cached = None, []

    @cached_property
    def _loaded(self):
        from labkit.hardware import quick_dtype  # brings torch, which a script does not need

        return smollm2(dtype=quick_dtype())

    @cached_property
    def _grammar_tokenizer(self):
        import llguidance.hf

        return llguidance.hf.from_tokenizer(self._loaded[1])

    def reply(self, messages: list[dict], schema: dict) -> Reply:
        tokenizer = self._loaded[1]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        said = self._constrained(prompt, schema) if self.constrained else self._free(prompt)
        return Reply(tokenizer.decode(said, skip_special_tokens=True), len(said))

    def _free(self, prompt: list[int]) -> list[int]:
        """Until the first JSON object is closed, or the model ends."""
        tokenizer, said = self._loaded[1], []
        while len(said) < self.max_tokens:
            said.append(int(self._logits(prompt + said).argmax()))
            if said[-1] == tokenizer.eos_token_id:
                break
            try:
                first_object(tokenizer.decode(said))
                break
            except ValueError:
                continue
        return said

    def _constrained(self, prompt: list[int], schema: dict) -> list[int]:
        import torch
        from llguidance import LLMatcher

        separators = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=separators)
        matcher = LLMatcher(self._grammar_tokenizer, grammar)
        if matcher.is_error():
            raise ValueError(f"no grammar for this schema: {matcher.get_error()}")
        said = matcher.compute_ff_tokens()
        matcher.consume_tokens(said)
        while len(said) < self.max_tokens and not matcher.is_stopped():
            allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            logits = self._logits(prompt + said)
            token = int(logits.masked_fill(~allowed[: len(logits)], float("-inf")).argmax())
            matcher.consume_token(token)
            forced = matcher.compute_ff_tokens()
            matcher.consume_tokens(forced)
            said += [token, *forced]
        return said

    def _logits(self, ids: list[int]):
        """(vocabulary,) logits of the token after ``ids``."""
        import torch
        from transformers import DynamicCache

        shared = 0
        while shared < min(len(ids) - 1, len(self._cached)) and ids[shared] == self._cached[shared]:
            shared += 1
        self._cache = self._cache or DynamicCache()
        if shared < len(self._cached):
            self._cache.crop(shared - len(self._cached))  # negative: so many are dropped
        with torch.inference_mode():
            out = self._loaded[0](torch.tensor([ids[shared:]]), past_key_values=self._cache, logits_to_keep=1)
        self._cached = list(ids)
        return out.logits[0, -1]
