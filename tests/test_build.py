"""`make book`: an incremental build is a correct one, and a warning fails it however often it is tried."""

import shutil
import subprocess
import sys
from pathlib import Path

import bookdata
import nbformat
import pytest
from bookdata import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Builds a book of two notebooks with this book's machinery; `make.root` is its folder."""
    root = tmp_path_factory.mktemp("book")
    for name in ("_config.yml", "Makefile", "questions.md", "claims.md", "requirements.txt", "requirements-models.txt"):
        shutil.copy(ROOT / name, root / name)
    for name in ("_ext", "_static", "_templates"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "intro.md").write_text("# Intro\n")
    write_notebook(root / "one.ipynb", title="One", measured=2)
    write_notebook(root / "two.ipynb", title="Two", measured=2)
    write_toc(root, "one", "two")
    # An existing file as the stamp: the environment that runs the suite is the one to build with.
    variables = [f"BIN={Path(sys.executable).parent}", "STAMP=requirements.txt"]

    def make():
        return subprocess.run(["make", "book", *variables], cwd=root, capture_output=True, text=True)

    make.root = root
    first = make()
    assert first.returncode == 0, first.stdout + first.stderr
    return make


def write_notebook(path: Path, title: str, measured: int, text: str = "An answer."):
    record = {"claim": "c", "predicted": 2, "measured": measured, "unit": "B", "condition": "equal"}
    output = new_output("display_data", {"text/plain": "✓ c", bookdata.CLAIM_MIME: record})
    question = new_markdown_cell(
        f"## Why {path.stem}?\n\n**为什么？** · screen · executed\n\n{text}",
        metadata={"question": {"id": f"why-{path.stem}", "collections": 1}},
    )
    cells = [new_markdown_cell(f"# {title}"), question, new_code_cell("1", outputs=[output], execution_count=1)]
    nbformat.write(new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), path)


def write_toc(root: Path, *notebooks: str):
    chapters = "".join(f"- file: {name}\n" for name in (*notebooks, "questions", "claims"))
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: intro\nchapters:\n{chapters}")


def test_a_changed_notebook_changes_what_is_made_from_it(make):
    """Its claim and its title, on the pages made from all notebooks and in the sidebar of a page that did not change."""
    write_notebook(make.root / "one.ipynb", title="Renamed", measured=12345)
    assert make().returncode == 0
    html = make.root / "_build" / "html"
    assert "12,345 B" in (html / "claims.html").read_text()
    assert "Renamed" in (html / "questions.html").read_text()
    assert "Renamed" in (html / "two.html").read_text()


def test_a_removed_notebook_is_gone_everywhere(make):
    (make.root / "two.ipynb").unlink()
    write_toc(make.root, "one")
    assert make().returncode == 0
    html = make.root / "_build" / "html"
    assert not (html / "two.html").exists() and "two.html" not in (html / "sitemap.xml").read_text()
    for name in ("questions.html", "claims.html", "questions.json"):
        text = (html / name).read_text()
        assert "why-one" in text and "why-two" not in text


def test_a_warning_fails_the_build_each_time(make):
    write_notebook(make.root / "one.ipynb", title="One", measured=2, text="[nowhere](#nowhere)")
    for _ in range(2):
        process = make()
        assert process.returncode != 0 and "nowhere" in process.stderr
