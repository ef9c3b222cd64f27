"""What a maintainer does to a notebook: check it, refresh it, begin a new one. `make` calls this."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "_ext"))
import bookdata
from bookdata import ROOT

# One thread a notebook: two notebooks share two cores, and sums come out in one order.
# tqdm misses a widget that no page uses, and says so on stderr.
KERNEL_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
SECONDS = {"chapter": 60, "lab": 180}
MAX_BYTES = 2**20
SKIPPING_TAGS = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
SKIPPING_COMMENT = re.compile(r"#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)", re.IGNORECASE)
MAGIC = re.compile(r"get_ipython\s*\(|run_(line|cell)_magic")  # %x, !x and x? are no Python at all
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "socket", "huggingface_hub", "datasets", "ftplib"}


def seconds_allowed(path: Path) -> int:
    """How long a notebook may run in the suite, in seconds on two cores."""
    return SECONDS["lab" if Path(path).resolve().parent.parent.name == "labs" else "chapter"]


# --- the structure that the suite demands of every notebook -----------------------------------------------------------


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the notebook as it is stored, one line each; empty if it is in order."""
    notebook = bookdata.read(path)
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"larger than {MAX_BYTES // 2**10} KiB")
    name = path.resolve().relative_to(root).with_suffix("").as_posix()
    if name not in bookdata.toc(root):
        found.append("not in _toc.yml")
    if not notebook.cells or notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("the first cell is not a Markdown cell with the title")
    if not notebook.metadata.get("verified", {}).get("date"):
        found.append("never refreshed (no 'verified' in its metadata): run make refresh")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code or code[0].source != bookdata.setup_cell(notebook, root):
        found.append("the first code cell is not the setup cell: run make refresh")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("execution counts are not 1..n: run make refresh")
    if not any(cell.outputs for cell in code):
        found.append("stores no outputs: run make refresh")
    for number, cell in enumerate(code, start=1):
        found += [f"code cell {number}: {problem}" for problem in _cell_problems(cell)]
    for question in bookdata.questions(path, root):
        found += [f"«{question.text}»: {problem}" for problem in _question_problems(question)]
    return found


def _cell_problems(cell: Any) -> list[str]:
    found = []
    kinds = [output.output_type for output in cell.outputs]
    if "error" in kinds:
        found.append("stores an error")
    if any(output.get("name") == "stderr" for output in cell.outputs):
        found.append("prints to stderr")
    tags = SKIPPING_TAGS & set(cell.metadata.get("tags", []))
    if tags and not str(cell.metadata.get("reason", "")).strip():
        found.append(f"tagged {', '.join(sorted(tags))} without a reason in its metadata")
    if SKIPPING_COMMENT.search(cell.source):
        found.append("skips comparison by a comment: use a tag and a reason")
    if any(mime.startswith("image/") for output in cell.outputs for mime in output.get("data", {})):
        rendering = cell.metadata.get("mystnb", {})
        if not rendering.get("image", {}).get("alt", "").strip():
            found.append("draws without alt text (metadata mystnb.image.alt)")
        if not rendering.get("figure", {}).get("caption", "").strip():
            found.append("draws without a caption (metadata mystnb.figure.caption)")
    if bookdata.is_setup(cell):
        return found
    if MAGIC.search(cell.source):
        found.append("uses a magic")
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:
        return [*found, "is not plain Python (a magic?)"]
    used = {name.split(".")[0] for name in _imports(tree)} & NETWORK
    if used:
        found.append(f"uses the network ({', '.join(sorted(used))})")
    return found


def _question_problems(question: bookdata.Question) -> list[str]:
    found = []
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", question.id or ""):
        found.append("no id in the cell's metadata (question.id, lower-case words joined by hyphens)")
    if not isinstance(question.collections, int) or not 0 <= question.collections <= 14:
        found.append("no count of collections in the cell's metadata (question.collections, 0 to 14)")
    if not re.search(r"[\u4e00-\u9fff]", question.text_zh or ""):
        found.append("no Chinese wording")
    if question.level not in bookdata.LEVELS:
        found.append(f"level is not one of {', '.join(bookdata.LEVELS)}")
    if question.evidence not in bookdata.EVIDENCE:
        found.append(f"evidence is not one of {', '.join(bookdata.EVIDENCE)}")
    words = len(question.answer.split())
    if not 60 <= words <= 150:
        found.append(f"the answer has {words} words: say it in 60 to 150")
    found += [f"no {part}" for part in ("**Follow-ups**", "**Red flag") if part not in question.below]
    if question.evidence == "executed" and not any(
        bookdata.claims(cell) and _calls_check(cell.source) for cell in question.cells if cell.cell_type == "code"
    ):
        found.append("says executed, but no cell before the next question makes a check")
    if question.evidence == "judgement" and "**Sources" not in question.below:
        found.append("says judgement, but names no sources")
    return found


def _calls_check(source: str) -> bool:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
        for node in ast.walk(tree)
    )


def _imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


# --- the verbs --------------------------------------------------------------------------------------------------------


def check(path: Path) -> int:
    """Validate one notebook as the suite does. Returns the exit status."""
    found = problems(path)
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)], cwd=ROOT)
    return 1 if found else tests.returncode


def refresh(path: Path) -> int:
    """Run a notebook from top to bottom and store its outputs; whatever goes wrong, the old file stays."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = bookdata.read(path)
    _place_setup_cell(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    os.environ.update(KERNEL_ENV)
    client = NotebookClient(
        notebook,
        timeout=2 * seconds_allowed(path),
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return _refused(path, f"a cell fails:\n{error}")
    except DeadKernelError:
        return _refused(path, "the kernel died (out of memory?)")
    except TimeoutError:
        return _refused(path, f"a cell runs longer than {2 * seconds_allowed(path)} s")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _join_streams(cell)
    versions = {name: version(name) for name in ("torch", "transformers")}
    notebook.metadata["verified"] = {
        "date": date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **versions,
    }
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python"}
    try:
        _write_atomically(path, nbformat.writes(notebook) + "\n")
    except OSError as error:
        return _refused(path, f"cannot be written: {error.strerror}")
    print(f"{path}: refreshed")
    return 0


def new(chapter: str, topic: str) -> int:
    """Write a topic notebook with one question to fill in, and enter it in `_toc.yml` after its chapter's last page."""
    for slug in (chapter, topic):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
            print(f"{slug!r}: a slug has lower-case letters, digits and underscores", file=sys.stderr)
            return 2
    folder, toc = ROOT / "chapters" / chapter, ROOT / "_toc.yml"
    path = folder / f"{topic}.ipynb"
    if path.exists():
        print(f"{path}: exists already", file=sys.stderr)
        return 2
    text = toc.read_text(encoding="utf-8")
    entry = re.search(rf"^( *)- file: chapters/{chapter}/index *\n", text, re.MULTILINE)
    if not entry:
        print(
            f"{chapter!r} is not a chapter in _toc.yml: write chapters/{chapter}/index.md and enter it", file=sys.stderr
        )
        return 2
    indent = entry[1] + "  "
    pages = re.compile(rf"{indent}sections:\n(?:{indent}  ?- file: .*\n)+").match(text, entry.end())
    at = pages.end() if pages else entry.end()
    lines = "" if pages else f"{indent}sections:\n"
    dash = re.search(r"\n( *)- file", pages[0])[1] if pages else indent
    _write_atomically(toc, text[:at] + f"{lines}{dash}- file: chapters/{chapter}/{topic}\n" + text[at:])
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(
                f"# {topic.replace('_', ' ').capitalize()}\n\nOne sentence on what the page is about."
            ),
            nbformat.v4.new_code_cell("from labkit.claims import check"),
            nbformat.v4.new_markdown_cell(
                "## What is the question?\n\n**问题是什么？** · screen · executed\n\n"
                "The answer, 60 to 150 words, in four moves: the principle; when it matters; what an engineer does about it; "
                "how you would observe and verify it.",
                metadata={"question": {"id": f"{chapter}-{topic}-first".replace("_", "-"), "collections": 0}},
            ),
            nbformat.v4.new_code_cell('check("what is claimed", predicted=2, measured=1 + 1, rel=0)'),
            nbformat.v4.new_markdown_cell(
                "**Follow-ups**\n\n- *A deeper probe?* Its answer in one to three sentences.\n\n"
                '**Red flag:** "A wrong answer often heard." What refutes it.\n\n**Sources:** [the primary source](https://…)'
            ),
        ]
    )
    _place_setup_cell(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, nbformat.writes(notebook) + "\n")
    print(f"{path.relative_to(ROOT)}: fill it in, then make refresh NB={path.relative_to(ROOT)}")
    return 0


def _place_setup_cell(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if not bookdata.is_setup(cell)]
    notebook.cells = cells
    cell = nbformat.v4.new_code_cell(bookdata.setup_cell(notebook), metadata={"tags": ["remove-cell"]}, id="setup")
    notebook.cells = [*cells[:1], cell, *cells[1:]]


def _join_streams(cell: Any) -> None:
    """Make one output of prints that follow each other: the kernel cuts them wherever a message happens to end."""
    joined = []
    for output in cell.outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("output_type") == "stream" and last["name"] == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    cell.outputs = joined


def _refused(path: Path, why: str) -> int:
    print(f"{path}: not refreshed, the file is as it was: {why}", file=sys.stderr)
    return 1


def _write_atomically(path: Path, text: str) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("check", "refresh"):
        verbs.add_parser(verb).add_argument("path", type=Path)
    arguments = verbs.add_parser("new")
    arguments.add_argument("chapter")
    arguments.add_argument("topic")
    given = parser.parse_args()
    try:
        if given.verb == "new":
            return new(given.chapter, given.topic)
        return {"check": check, "refresh": refresh}[given.verb](given.path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
