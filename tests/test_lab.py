"""labs/crl_lab.ipynb runs from top to bottom, on a tiny model."""

import dataclasses
from pathlib import Path

import pytest
import small_run

nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel to try the notebook")
pytest.importorskip("ipykernel")
import nbformat  # noqa: E402

LAB = Path(__file__).parent.parent / "labs" / "crl_lab.ipynb"


def test_the_lab_runs_from_top_to_bottom(small, tmp_path, monkeypatch):
    flags = dataclasses.asdict(small_run.flags(small, tmp_path))
    flags = {key: value for key, value in flags.items() if value is not None and value != ()}
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(LAB, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert len(book.cells) <= 40 and "args = crl.Args(**flags)" in first.source
    first.source = first.source.replace("crl.Args(**flags)", f"crl.Args(**{flags})")
    folder = {"metadata": {"path": LAB.parent}}
    nbclient.NotebookClient(book, timeout=240, resources=folder).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    for words in ("8 training and 5 validation prompts", "validation: unsteered", "run directory: "):
        assert words in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "viewer.html" in str(book.cells[-2].outputs)
