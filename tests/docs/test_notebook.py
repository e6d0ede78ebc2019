"""The notebook of the examples runs from its DataFrames to a trained model."""

import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.doc_blocks import ROOT
from transformers import AutoModelForCausalLM

NOTEBOOK = ROOT / "examples" / "select_and_train.ipynb"
pytestmark = pytest.mark.filterwarnings("default")  # those of the libraries that talk to the kernel


def test_it_is_kept_without_what_it_printed() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_from_dataframes_to_a_trained_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = json.loads((folder / ".winnow" / "stack.json").read_text())
    monkeypatch.setenv("WINNOW_URL", stack["url"])
    monkeypatch.setenv("WINNOW_API_KEY", stack["api_key"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "examples")}}).execute()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert all("text/html" in data for data in shown if "DataFrame" in data["text/plain"])
    before, after = (list(map(float, line.split()[1:])) for line in shown[-1]["text/plain"].splitlines()[1:])
    assert before[0] == before[1]
    assert all(math.isfinite(loss) and loss != before[0] for loss in after)
    assert AutoModelForCausalLM.from_pretrained(folder / "examples" / "trained").num_parameters() > 0
