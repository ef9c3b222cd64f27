"""What several tests share: a small copy of the book in a temporary folder."""

import shutil
from pathlib import Path

import bookdata
import pytest

ROOT = bookdata.ROOT
# What `tools/nb.py` and the suite need besides notebooks.
BOOK_FILES = ("conftest.py", "pyproject.toml", "_config.yml", "_toc.yml", "requirements-models.txt")


@pytest.fixture
def small_book(tmp_path):
    """A function: copies the book's machinery and the named notebooks to a folder of its own and returns that folder."""

    def make(*notebooks: str) -> Path:
        root = tmp_path / "book"
        root.mkdir()
        for name in (*BOOK_FILES, *notebooks):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for folder in ("_ext", "tools"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        return root

    return make
