"""What the site shows of the book's questions: their anchors and facts, the index, the claims and `questions.json`.

Notebooks are plain Markdown and know nothing of this; `bookdata` reads them, here they become pages.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import bookdata
from bookdata import Question
from docutils import nodes
from markdown_it import MarkdownIt
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
_inline = MarkdownIt("commonmark").renderInline


# --- the notebook pages -----------------------------------------------------------------------------------------------


class NotebookPage(SphinxTransform):
    """Give each question of a notebook its own id, and mark up the lines that a reader looks for."""

    default_priority = 500  # before labels are collected (850) and links to anchors are resolved (879)

    def apply(self, **kwargs: Any) -> None:
        path = Path(self.env.doc2path(self.env.docname))
        if path.suffix != ".ipynb":
            return
        questions = bookdata.questions(path, _root(self.app))
        sections = [
            section for page in _sections(self.document) for section in _sections(page) if _is_question(section)
        ]
        if len(sections) != len(questions):
            logger.warning("a question's heading is not the first line of its cell", location=self.env.docname)
        for section, question in zip(sections, questions, strict=False):
            if question.id:
                self._anchor(section, question.id)
            _mark_facts(section, question)
        for page in _sections(self.document)[:1]:
            page.insert(1, nodes.raw("", _verified(bookdata.read(path).metadata.get("verified", {})), format="html"))
        for output in list(self.document.findall(_is_check)):
            output.replace_self(nodes.paragraph("", output.astext(), classes=["check"]))

    def _anchor(self, section: nodes.section, id: str) -> None:
        """Make ``id`` the section's first id: tables of contents, `[…](#id)` and `[…](page.ipynb#id)` lead to it."""
        section["ids"] = [id, *(other for other in section["ids"] if other != id)]
        section["names"].append(id)
        self.document.ids[id] = section
        self.document.nameids[id], self.document.nametypes[id] = id, True
        slugs = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
        slugs[id] = (section.line, id, section[0].astext())


def _sections(node: nodes.Element) -> list[nodes.section]:
    return [child for child in node.children if isinstance(child, nodes.section)]


def _is_question(section: nodes.section) -> bool:
    return section[0].astext().rstrip().endswith(("?", "？"))


def _mark_facts(section: nodes.section, question: Question) -> None:
    """The line under the heading, "**Chinese** · level · evidence", with classes for the style sheet."""
    if not question.text_zh:
        return
    line = next(section.findall(nodes.paragraph))
    wording = next(line.findall(nodes.strong))
    wording["classes"].append("language-zh")  # docutils writes this class as lang="zh"
    line["classes"].append("question-facts")
    rest = nodes.inline(classes=["rest"])
    for name, value in (("level", question.level), ("evidence", question.evidence)):
        rest += nodes.Text(" · ")
        rest += nodes.inline("", value, classes=["fact", f"{name}-{value}"])
    line.children = [wording, rest]


def _is_check(node: nodes.Node) -> bool:
    """The line that `labkit.claims.check` leaves in a cell's outputs."""
    return (
        isinstance(node, nodes.literal_block)
        and node.parent.get("mime_type") == "text/plain"
        and node.astext().startswith("✓ ")
    )


def _verified(facts: dict[str, str]) -> str:
    if not facts.get("date"):
        return ""
    versions = [f"{name} {facts[key]}" for key, name in _VERSIONS.items() if facts.get(key)]
    return (
        f'<p class="verified" data-pagefind-ignore>Last verified: {escape(" · ".join([facts["date"], *versions]))}</p>'
    )


_VERSIONS = {"python": "Python", "torch": "torch", "transformers": "transformers"}


# --- the pages made from all notebooks --------------------------------------------------------------------------------


class Listing(nodes.General, nodes.Element):
    """Stands for a list until every notebook has been read."""


class ListDirective(SphinxDirective):
    """``{questions}`` the whole index with its filter, ``{questions} slug`` those of one chapter, ``{claims}`` all claims."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [Listing(kind=self.name, chapter=self.arguments[0] if self.arguments else None)]


def rewrite(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Which pages to write although their sources did not change.

    The pages in Markdown, because some hold lists made from the notebooks (there are few: all are written at every
    build); and every page when a title changed, because titles stand in the sidebar.
    """
    titles = {name: title.astext() for name, title in env.titles.items()}
    changed = titles != getattr(env, "book_titles", None)
    env.book_titles = titles
    return [name for name in env.found_docs if changed or env.doc2path(name).endswith(".md")]


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the lists in place."""
    for listing in list(doctree.findall(Listing)):
        questions = all_questions(app)
        if listing["kind"] == "claims":
            html = _claims_page(app, docname, questions)
        elif listing["chapter"]:
            html = _chapter_list(app, docname, [q for q in questions if q.chapter == listing["chapter"]])
        else:
            html = _question_index(app, docname, questions)
        listing.replace_self(nodes.raw("", html, format="html"))


def all_questions(app: Sphinx) -> list[Question]:
    """Every question of the notebooks that are pages of the site, in reading order."""
    root = _root(app)
    paths = [path for path in bookdata.notebooks(root) if _docname(path, root) in app.env.found_docs]
    return [question for path in paths for question in _read(path, path.stat().st_mtime_ns, root)]


@cache
def _read(path: Path, changed: int, root: Path) -> list[Question]:
    return bookdata.questions(path, root)


def _root(app: Sphinx) -> Path:
    return Path(app.srcdir).resolve()


def _docname(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _link(app: Sphinx, docname: str, question: Question) -> str:
    target = app.builder.get_relative_uri(docname, question.notebook.removesuffix(".ipynb"))
    return f'<a href="{target}#{question.id}">{_inline(question.text)}</a>'


def _page_title(app: Sphinx, question: Question) -> str:
    return app.env.titles[question.notebook.removesuffix(".ipynb")].astext()


def _chapter_title(app: Sphinx, question: Question) -> str:
    front = f"{Path(question.notebook).parent.as_posix()}/index"
    return app.env.titles[front].astext() if front in app.env.titles else _page_title(app, question)


def _entry(app: Sphinx, docname: str, question: Question, page: str = "") -> str:
    asked = f"asked by {question.collections} of 14 collections" if question.collections else ""
    checks = len(question.claims)
    facts = [page, question.level, question.evidence, asked, f"{checks} check{'s' * (checks != 1)}" if checks else ""]
    data = {"chapter": question.chapter, "level": question.level, "evidence": question.evidence}
    return (
        "<li" + "".join(f' data-{key}="{escape(value or "")}"' for key, value in data.items()) + ">"
        f'{_link(app, docname, question)} <span lang="zh">{escape(question.text_zh or "")}</span> '
        f'<span class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</span></li>\n'
    )


def _entries(items: Iterable[str]) -> str:
    return f'<ul class="question-list">\n{"".join(items)}</ul>\n'


def _chapter_list(app: Sphinx, docname: str, questions: list[Question]) -> str:
    html = ""
    for notebook, group in groupby(questions, key=lambda question: question.notebook):
        group = list(group)
        href = app.builder.get_relative_uri(docname, notebook.removesuffix(".ipynb"))
        html += f'<h3><a href="{href}">{escape(_page_title(app, group[0]))}</a></h3>\n'
        html += _entries(_entry(app, docname, question) for question in group)
    return f'<div class="chapter-questions" data-pagefind-ignore>\n{html}</div>\n'


def _question_index(app: Sphinx, docname: str, questions: list[Question]) -> str:
    chapters = {question.chapter: _chapter_title(app, question) for question in questions}
    choices = {
        "chapter": chapters,
        "level": {level: level for level in bookdata.LEVELS},
        "evidence": {evidence: evidence for evidence in bookdata.EVIDENCE},
    }
    html = (
        '<form class="question-filter" role="search" aria-label="Filter the questions" hidden>\n'
        '<label>Words, in English or Chinese <input type="search" name="text" autocomplete="off"></label>\n'
    )
    for name, options in choices.items():
        tags = "".join(f'<option value="{escape(key)}">{escape(title)}</option>' for key, title in options.items())
        html += (
            f'<label>{name.capitalize()} <select name="{name}"><option value="">all</option>{tags}</select></label>\n'
        )
    html += "</form>\n"
    html += f'<p class="question-count" role="status">{_count(questions, "question")}</p>\n'
    for chapter, group in groupby(questions, key=lambda question: question.chapter):
        group = list(group)
        html += f"<section><h2>{escape(chapters[chapter])}</h2>\n"
        html += (
            _entries(_entry(app, docname, question, _page_title(app, question)) for question in group) + "</section>\n"
        )
    return f'<div id="question-index" data-pagefind-ignore>\n{html}</div>\n'


def _claims_page(app: Sphinx, docname: str, questions: list[Question]) -> str:
    answered = [question for question in questions if question.claims]
    claims = sum(len(question.claims) for question in answered)
    pages = len({question.notebook for question in answered})
    html = (
        f'<p class="claim-count">{claims:,} claim{"s" * (claims != 1)}, under {_count(answered, "question")} '
        f"on {pages} page{'s' * (pages != 1)}.</p>\n"
    )
    for _, group in groupby(answered, key=lambda question: question.notebook):
        group = list(group)
        html += f"<section><h2>{escape(_page_title(app, group[0]))}</h2>\n"
        for question in group:
            rows = "".join(_claim_row(claim) for claim in question.claims)
            html += f'<h3>{_link(app, docname, question)}</h3>\n<table class="claims table" role="table">{_HEAD}'
            html += f'<tbody role="rowgroup">\n{rows}</tbody></table>\n'
        html += "</section>\n"
    return f'<div id="all-claims" data-pagefind-ignore>\n{html}</div>\n'


# The roles say what the tags say; they keep a table a table on a narrow screen, where the style sheet stacks its cells.
_COLUMNS = ("Claim", "Predicted", "Measured", "Apart", "Demanded")
_HEAD = (
    '<thead role="rowgroup"><tr role="row">'
    + "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in _COLUMNS)
    + "</tr></thead>"
)


def _claim_row(claim: dict[str, Any]) -> str:
    unit = claim.get("unit", "")
    cells = [
        claim["claim"],
        f"{number(claim['predicted'])} {unit}".rstrip(),
        f"{number(claim['measured'])} {unit}".rstrip(),
        apart(claim["predicted"], claim["measured"]),
        claim["condition"].replace(">=", "≥").replace("<=", "≤").replace("==", "="),
    ]
    tags = "".join(
        f'<td role="cell" data-label="{name}">{escape(cell)}</td>' for name, cell in zip(_COLUMNS, cells, strict=True)
    )
    return f'<tr role="row">{tags}</tr>\n'


def number(value: Any) -> str:
    """A claim's value as the page shows it: thousands set off, floats as recorded (three digits, see `labkit.claims`)."""
    if _is_number(value) and (isinstance(value, int) or 1000 <= math.fabs(value) < 1e12):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def apart(predicted: Any, measured: Any) -> str:
    """How far the measured value lies from the predicted one, relative to it; a dash where that has no meaning."""
    if predicted == measured:
        return "equal"
    if not (_is_number(predicted) and _is_number(measured) and predicted) or not math.isfinite(predicted + measured):
        return "–"
    ratio = measured / predicted
    return f"×{ratio:.3g}" if ratio >= 2 else f"{100 * (ratio - 1):+.2g} %".replace("-", "−")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(items: list[Any], name: str) -> str:
    return f"{len(items):,} {name}{'s' * (len(items) != 1)}"


def write_json(app: Sphinx, exception: Exception | None) -> None:
    """Write `questions.json`: for the site's search, and for whoever wants the questions without the pages."""
    if exception or app.builder.format != "html":
        return
    records = [
        {
            "id": question.id,
            "question": question.text,
            "question_zh": question.text_zh,
            "chapter": question.chapter,
            "level": question.level,
            "evidence": question.evidence,
            "url": question.url,
            "claims": question.claims,
            "collections": question.collections,
        }
        for question in all_questions(app)
    ]
    text = json.dumps(records, ensure_ascii=False, indent=1)
    (Path(app.outdir) / "questions.json").write_text(text + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(Listing)
    app.add_directive("questions", ListDirective)
    app.add_directive("claims", ListDirective)
    app.add_transform(NotebookPage)
    app.connect("env-updated", rewrite)
    app.connect("doctree-resolved", fill)
    app.connect("build-finished", write_json)
    # A change of this file or of the reader makes the cached pages stale: then Sphinx reads all of them again.
    sources = [Path(__file__), Path(bookdata.__file__)]
    stamp = zlib.crc32(b"".join(source.read_bytes() for source in sources))
    return {"env_version": stamp, "parallel_read_safe": True, "parallel_write_safe": True}
