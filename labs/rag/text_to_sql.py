"""python -m labs.rag.text_to_sql: SQL that SmolLM2 writes for questions about the corpus' signatures.

Freely and under a grammar, with the same examples before it. Writes results/text_to_sql.json with the SQL as text; nothing
is executed here: chapters/rag/operations.ipynb does so, in a database that can only be read. About four minutes on one core.
"""

from __future__ import annotations

import ast
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import torch

from labs.rag.corpus import Document
from labs.rag.experiments import record

SCHEMA = """\
CREATE TABLE documents (name TEXT PRIMARY KEY, package TEXT, module TEXT, parameters INTEGER, characters INTEGER);
CREATE TABLE parameters (document TEXT, position INTEGER, name TEXT, default_value TEXT);
"""

# Three wordings each with its SQL. The first is for whoever builds the system, the others are the test.
QUESTIONS = (
    (
        ("How many documents does torch have?", "SELECT count(*) FROM documents WHERE package = 'torch'"),
        ("Count the documents of transformers.", "SELECT count(*) FROM documents WHERE package = 'transformers'"),
        ("What is the number of documents that belong to torch?", "SELECT count(*) FROM documents WHERE package = 'torch'"),
    ),
    (
        ("How many documents are in the module torch.linalg?", "SELECT count(*) FROM documents WHERE module = 'torch.linalg'"),
        ("Count what is documented in torch.fft.", "SELECT count(*) FROM documents WHERE module = 'torch.fft'"),
        ("How many entries does torch.nn.functional have?", "SELECT count(*) FROM documents WHERE module = 'torch.nn.functional'"),
    ),
    (
        ("Which document has the most parameters?", "SELECT name FROM documents ORDER BY parameters DESC LIMIT 1"),
        ("What takes more parameters than anything else?", "SELECT name FROM documents ORDER BY parameters DESC LIMIT 1"),
        ("Name the document with the largest number of parameters.", "SELECT name FROM documents ORDER BY parameters DESC LIMIT 1"),
    ),
    (
        ("Which document in torch.optim has the longest text?", "SELECT name FROM documents WHERE module = 'torch.optim' ORDER BY characters DESC LIMIT 1"),
        ("What is the longest page of torch.linalg?", "SELECT name FROM documents WHERE module = 'torch.linalg' ORDER BY characters DESC LIMIT 1"),
        ("Name the document of torch.nn.init with the most characters.", "SELECT name FROM documents WHERE module = 'torch.nn.init' ORDER BY characters DESC LIMIT 1"),
    ),
    (
        ("What is the average number of parameters in torch.nn.functional?", "SELECT avg(parameters) FROM documents WHERE module = 'torch.nn.functional'"),
        ("How many parameters does something in torch.nn.init have on average?", "SELECT avg(parameters) FROM documents WHERE module = 'torch.nn.init'"),
        ("Mean parameter count of torch.optim.", "SELECT avg(parameters) FROM documents WHERE module = 'torch.optim'"),
    ),
    (
        ("How many documents have a parameter called eps?", "SELECT count(*) FROM parameters WHERE name = 'eps'"),
        ("How often does an argument dim occur?", "SELECT count(*) FROM parameters WHERE name = 'dim'"),
        ("In how many signatures is there a parameter named reduction?", "SELECT count(*) FROM parameters WHERE name = 'reduction'"),
    ),
    (
        ("What is the most common default of eps?", "SELECT default_value FROM parameters WHERE name = 'eps' AND default_value IS NOT NULL GROUP BY default_value ORDER BY count(*) DESC LIMIT 1"),
        ("Which default value of reduction is the most frequent?", "SELECT default_value FROM parameters WHERE name = 'reduction' AND default_value IS NOT NULL GROUP BY default_value ORDER BY count(*) DESC LIMIT 1"),
        ("What does momentum usually default to?", "SELECT default_value FROM parameters WHERE name = 'momentum' AND default_value IS NOT NULL GROUP BY default_value ORDER BY count(*) DESC LIMIT 1"),
    ),
    (
        ("What is the default of lr in torch.optim.SGD?", "SELECT default_value FROM parameters WHERE document = 'torch.optim.SGD' AND name = 'lr'"),
        ("Which value does betas have by default in torch.optim.AdamW?", "SELECT default_value FROM parameters WHERE document = 'torch.optim.AdamW' AND name = 'betas'"),
        ("torch.nn.Dropout: what is p if I do not give it?", "SELECT default_value FROM parameters WHERE document = 'torch.nn.Dropout' AND name = 'p'"),
    ),
    (
        ("Which module has the most documents?", "SELECT module FROM documents GROUP BY module ORDER BY count(*) DESC LIMIT 1"),
        ("What is the largest module?", "SELECT module FROM documents GROUP BY module ORDER BY count(*) DESC LIMIT 1"),
        ("Name the module that holds more documents than any other.", "SELECT module FROM documents GROUP BY module ORDER BY count(*) DESC LIMIT 1"),
    ),
    (
        ("How many different parameter names are there?", "SELECT count(DISTINCT name) FROM parameters"),
        ("Count the distinct names of parameters.", "SELECT count(DISTINCT name) FROM parameters"),
        ("How many names do parameters have, each counted once?", "SELECT count(DISTINCT name) FROM parameters"),
    ),
)  # fmt: skip

# What may be written: one SELECT on one table, with that table's columns. llguidance reads it (Lark's syntax).
GRAMMAR = r"""
start: docs | params
docs: "SELECT " dshow " FROM documents" (" WHERE " dcond (" AND " dcond)*)? (" GROUP BY " dcol)? (" ORDER BY " dorder)? (" LIMIT 1")?
params: "SELECT " pshow " FROM parameters" (" WHERE " pcond (" AND " pcond)*)? (" GROUP BY " pcol)? (" ORDER BY " porder)? (" LIMIT 1")?
dshow: "count(*)" | dcol | FUNCTION "(" dnum ")" | "count(DISTINCT " dcol ")"
pshow: "count(*)" | pcol | "count(DISTINCT " pcol ")"
dcol: "name" | "package" | "module" | "parameters" | "characters"
dnum: "parameters" | "characters"
pcol: "document" | "position" | "name" | "default_value"
dcond: dcol " = " VALUE
pcond: pcol " = " VALUE | "default_value IS NOT NULL"
dorder: ("count(*)" | dnum) (" DESC")?
porder: "count(*)" (" DESC")?
FUNCTION: "avg" | "max" | "min" | "sum"
VALUE: /'[A-Za-z0-9_.]+'/
"""


def parameters(signature: str) -> list[tuple[str, str | None]] | None:
    """Names and defaults of a signature, as the corpus writes it; None where there is none or it is not Python."""
    try:
        arguments = ast.parse(f"def f{signature}: pass").body[0].args
    except SyntaxError:
        return None
    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(plain, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(a.arg, None if value is None else ast.unparse(value)) for a, value in pairs]


def database(documents: Sequence[Document], path: Path) -> None:
    """Write the two tables of SCHEMA to a new file."""
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
        for d in documents:
            listed = parameters(d.signature) if d.signature else None
            row = d.name, d.package, d.name.rpartition(".")[0], None if listed is None else len(listed), len(d.body)
            connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", row)
            rows = [(d.name, position, *pair) for position, pair in enumerate(listed or ())]
            connection.executemany("INSERT INTO parameters VALUES (?, ?, ?, ?)", rows)
    connection.close()


def prompt(tokenizer, question: str) -> torch.Tensor:
    """Token ids (1, n): the schema, the first wordings as examples, the question."""
    examples = [m for wordings in QUESTIONS for m in (("user", wordings[0][0]), ("assistant", wordings[0][1]))]
    system = f"Write one SQLite query that answers the question.\n{SCHEMA}"
    chat = [{"role": r, "content": c} for r, c in (("system", system), *examples, ("user", question))]
    made = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return made["input_ids"]


@torch.inference_mode()
def write(model, tokenizer, question: str, vocabulary=None, most: int = 64) -> str:
    """The model's SQL, greedily; with a ``vocabulary`` (llguidance's view of the tokenizer) only what GRAMMAR allows."""
    matcher = None
    if vocabulary is not None:
        import llguidance
        import llguidance.torch

        matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(GRAMMAR))
        mask = llguidance.torch.allocate_token_bitmask(1, vocabulary.vocab_size)
    ids, cache, said = prompt(tokenizer, question), None, []
    for _ in range(most):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if matcher is not None:
            llguidance.torch.fill_next_token_bitmask(matcher, mask)
            llguidance.torch.apply_token_bitmask_inplace(logits, mask)
        ids = logits.argmax(-1, keepdim=True)
        if int(ids) == tokenizer.eos_token_id:
            break
        said.append(int(ids))
        if matcher is not None:
            matcher.consume_token(said[-1])
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def main() -> None:
    import llguidance.hf

    from labkit.models import smollm2

    model, tokenizer = smollm2(dtype=torch.bfloat16)
    vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)
    rows = []
    for kind, wordings in enumerate(QUESTIONS):
        for question, gold in wordings[1:]:
            free, bound = write(model, tokenizer, question), write(model, tokenizer, question, vocabulary)
            rows.append({"kind": kind, "question": question, "gold": gold, "free": free, "grammar": bound})
            print(rows[-1], flush=True)
    record(
        "text_to_sql", {"what": "SQL that SmolLM2 writes with ten examples, freely and under a grammar", "rows": rows}
    )


if __name__ == "__main__":
    main()
