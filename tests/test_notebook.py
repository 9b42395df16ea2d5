"""The notebook runs from its first cell to its last, and is committed without what it printed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FILE = Path(__file__).resolve().parent.parent / "notebooks" / "comcat.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_it_is_committed_without_outputs():
    cells = code_cells(nbformat.read(FILE, as_version=4))
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count]


@pytest.mark.processes
def test_it_runs_and_shows_what_it_says():
    """What is equal to the bit, the notebook itself asserts."""
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    text = printed(notebook)
    dense, _, small = (float(share) for share in re.findall(r"MACs +accuracy ([\d.]+)%", text))
    assert small > dense - 2
    before, after = (int(share) for share in re.findall(r"sevens: (\d+)%", text))
    assert after > before + 20
