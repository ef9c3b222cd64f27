"""Every notebook of the book is stored complete and in order; what it prints is compared by nbval, beside this file."""

from collections import Counter

import bookdata
import nb
import nbformat
import pytest

NOTEBOOKS = [path.relative_to(bookdata.ROOT).as_posix() for path in bookdata.notebooks()]
SAMPLE = "chapters/attention/self_attention.ipynb"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_structure(name):
    assert nb.problems(bookdata.ROOT / name) == []


def test_ids_and_claims_are_unique_in_the_book():
    questions = [question for path in bookdata.notebooks() for question in bookdata.questions(path)]
    claims = [
        claim["claim"]
        for path in bookdata.notebooks()
        for cell in bookdata.read(path).cells
        for claim in bookdata.claims(cell)
    ]
    assert questions and claims
    for names in ([question.id for question in questions], claims):
        assert [name for name, count in Counter(names).items() if count > 1] == []


def test_every_file_of_the_table_exists():
    missing = [
        name
        for name in bookdata.toc()
        if not any((bookdata.ROOT / f"{name}{end}").exists() for end in (".ipynb", ".md"))
    ]
    assert missing == []


def first(notebook, wanted):
    return next(cell for cell in notebook.cells if wanted(cell))


def question_cell(notebook):
    return first(notebook, lambda cell: "question" in cell.metadata)


def figure_cell(notebook):
    return first(notebook, lambda cell: "mystnb" in cell.metadata)


def checking_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and bookdata.claims(cell)]


def strip_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def drop_checks_of_the_first_question(notebook):
    start = notebook.cells.index(question_cell(notebook)) + 1
    for cell in notebook.cells[start:]:
        if cell.source.startswith("## "):
            return
        if cell.cell_type == "code":
            cell.source = cell.source.replace("check(", "print(")


# A stored notebook made wrong, and a part of the sentence that must say so.
FAULTS = {
    "outputs stripped": (strip_outputs, "stores no outputs"),
    "one execution count null": (
        lambda nb_: setattr(checking_cells(nb_)[0], "execution_count", None),
        "execution counts",
    ),
    "execution counts out of order": (
        lambda nb_: setattr(checking_cells(nb_)[0], "execution_count", 99),
        "execution counts",
    ),
    "an error stored": (
        lambda nb_: checking_cells(nb_)[0].outputs.append(
            nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
        ),
        "stores an error",
    ),
    "stderr stored": (
        lambda nb_: checking_cells(nb_)[0].outputs.append(
            nbformat.v4.new_output("stream", name="stderr", text="warning")
        ),
        "stderr",
    ),
    "comparison skipped without a reason": (
        lambda nb_: checking_cells(nb_)[0].metadata.update(tags=["nbval-ignore-output"], reason=" "),
        "without a reason",
    ),
    "comparison skipped by a comment": (
        lambda nb_: setattr(
            checking_cells(nb_)[0], "source", "# NBVAL_IGNORE_OUTPUT\n" + checking_cells(nb_)[0].source
        ),
        "by a comment",
    ),
    "no alt text": (lambda nb_: figure_cell(nb_).metadata.mystnb.pop("image"), "alt text"),
    "no caption": (lambda nb_: figure_cell(nb_).metadata.mystnb.pop("figure"), "caption"),
    "no Chinese wording": (
        lambda nb_: setattr(question_cell(nb_), "source", question_cell(nb_).source.replace("**", "")),
        "no Chinese wording",
    ),
    "no level": (
        lambda nb_: setattr(question_cell(nb_), "source", question_cell(nb_).source.replace(" · ", " · hard · ", 1)),
        "level",
    ),
    "no evidence kind": (
        lambda nb_: setattr(question_cell(nb_), "source", question_cell(nb_).source.replace("executed", "seen", 1)),
        "evidence",
    ),
    "no id": (lambda nb_: question_cell(nb_).metadata.question.pop("id"), "no id"),
    "an endless answer": (
        lambda nb_: setattr(question_cell(nb_), "source", question_cell(nb_).source + " word" * 150),
        "60 to 150",
    ),
    "executed without a check": (drop_checks_of_the_first_question, "makes a check"),
    "larger than 1 MiB": (lambda nb_: nb_.metadata.update(ballast="x" * 2**20), "larger than"),
    "a line magic": (
        lambda nb_: setattr(checking_cells(nb_)[0], "source", "%time\n" + checking_cells(nb_)[0].source),
        "magic",
    ),
    "a shell escape": (
        lambda nb_: setattr(checking_cells(nb_)[0], "source", "!ls\n" + checking_cells(nb_)[0].source),
        "magic",
    ),
    "the network": (
        lambda nb_: setattr(
            checking_cells(nb_)[0], "source", "import urllib.request\n" + checking_cells(nb_)[0].source
        ),
        "network",
    ),
    "another setup cell": (
        lambda nb_: setattr(first(nb_, bookdata.is_setup), "source", first(nb_, bookdata.is_setup).source + "\n"),
        "setup cell",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_structural_fault_is_found(fault, small_book):
    root = small_book(SAMPLE)
    path = root / SAMPLE
    assert nb.problems(path, root) == []
    notebook = bookdata.read(path)
    plant, expected = FAULTS[fault]
    plant(notebook)
    nbformat.write(notebook, path)
    assert any(expected in problem for problem in nb.problems(path, root))


def test_notebook_missing_from_the_table_is_found(small_book):
    root = small_book(SAMPLE)
    toc = root / "_toc.yml"
    toc.write_text(toc.read_text().replace("file: chapters/attention/self_attention", "file: chapters/attention/index"))
    assert "not in _toc.yml" in nb.problems(root / SAMPLE, root)
    assert root / SAMPLE in bookdata.notebooks(root)
