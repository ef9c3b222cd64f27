"""A test of the tests: faults are planted in copies of real notebooks, and `make check` must catch every one.

Unlike the structural faults in test_notebooks.py, most of these leave a notebook that looks in order: only running it shows
the fault.
"""

import ast
import re
import subprocess
import sys

import bookdata
import nbformat
import pytest

NOTEBOOKS = ("chapters/attention/self_attention.ipynb", "chapters/attention/transformer_block.ipynb")


def compared(notebook):
    """The code cells whose outputs nbval compares."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code"
        and not bookdata.is_setup(cell)
        and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]


def digit_of_a_stored_output(notebook):
    for cell in compared(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and (digit := re.search(r"\d", output.text)):
                at = digit.start()
                output.text = output.text[:at] + str((int(digit[0]) + 1) % 10) + output.text[at + 1 :]
                return


def predicted_value(notebook):
    for cell in compared(notebook):
        for claim in bookdata.claims(cell):
            if not isinstance(claim["predicted"], int | float) or isinstance(claim["predicted"], bool):
                continue
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.keyword) and node.arg == "predicted":
                    value = ast.get_source_segment(cell.source, node.value)
                    cell.source = cell.source.replace(f"predicted={value}", f"predicted=7 + 3 * ({value})", 1)
                    return


def seeds(notebook):
    """All of them: a seed that another one follows at once decides nothing."""
    for cell in compared(notebook):
        cell.source = re.sub(r"manual_seed\((\d+)\)", lambda found: f"manual_seed({int(found[1]) + 1})", cell.source)


def import_removed(notebook):
    cell = next(cell for cell in compared(notebook) if "from labkit.claims import check\n" in cell.source + "\n")
    cell.source = (cell.source + "\n").replace("from labkit.claims import check\n", "").rstrip()


def outputs_stripped(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def one_output_stripped(notebook):
    next(cell for cell in compared(notebook) if cell.outputs).outputs = []


def unknown_magic(notebook):
    cell = compared(notebook)[-1]
    cell.source = "%frobnicate\n" + cell.source


def cell_reordered(notebook):
    """The last cell goes before the imports, and the counts are renumbered, so that the file looks in order."""
    last, imports = compared(notebook)[-1], compared(notebook)[0]
    notebook.cells.remove(last)
    notebook.cells.insert(notebook.cells.index(imports), last)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def prints_to_stderr(notebook):
    cell = compared(notebook)[-1]
    cell.source += '\nimport sys\n\nprint("careful", file=sys.stderr)'


FAULTS = (
    digit_of_a_stored_output,
    predicted_value,
    seeds,
    import_removed,
    outputs_stripped,
    one_output_stripped,
    unknown_magic,
    cell_reordered,
    prints_to_stderr,
)


def check(root, name):
    command = [sys.executable, "tools/nb.py", "check", name]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_planted_fault_is_caught(name, small_book, record_property):
    root = small_book(name)
    path = root / name
    sound = path.read_text(encoding="utf-8")
    untouched = check(root, name)
    assert untouched.returncode == 0, untouched.stdout + untouched.stderr

    missed = []
    for plant in FAULTS:
        notebook = nbformat.reads(sound, as_version=4)
        plant(notebook)
        assert notebook != nbformat.reads(sound, as_version=4), f"{plant.__name__} planted nothing in {name}"
        nbformat.write(notebook, path)
        if check(root, name).returncode == 0:
            missed.append(plant.__name__)
    record_property("faults", (len(FAULTS), len(FAULTS) - len(missed)))  # the closing table adds them up
    assert missed == []
