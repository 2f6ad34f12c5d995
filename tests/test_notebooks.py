"""The notebooks run from top to bottom, and show what they promise."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SHOWN = {
    "quickstart": ("decided by", "QuantLinear", "int4pack", "ratio [95%]", "bit-equal: True"),
    "report": ("quality    perplexity", "report.html", "image/png"),
}
"""What each notebook promises to show."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("demo_model")
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not [c for c in notebook.cells if c.get("outputs")], "commit notebooks without outputs"
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    shown = str([output for cell in notebook.cells for output in cell.get("outputs", [])])
    for expected in SHOWN[path.stem]:
        assert expected in shown
