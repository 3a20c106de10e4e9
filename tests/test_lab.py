"""labs/crl_lab.ipynb runs from top to bottom, on a tiny model."""
import dataclasses
import json
from pathlib import Path

import pytest
import small_run

nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel to try the notebook")
pytest.importorskip("ipykernel")
import nbformat  # noqa: E402

LAB = Path(__file__).parent.parent / "labs" / "crl_lab.ipynb"


def test_the_lab_runs_from_top_to_bottom(small, tmp_path, monkeypatch):
    flags = dataclasses.asdict(small_run.flags(small, tmp_path))
    monkeypatch.setenv("CRL_LAB", json.dumps({key: v for key, v in flags.items() if v is not None and v != ()}))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(LAB, as_version=4)
    assert len(book.cells) <= 40 and not any(c.get("outputs") for c in book.cells)
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": LAB.parent}}).execute()
    printed = "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", ()))
    for words in ("8 training and 5 validation prompts", "validation: unsteered", "run directory: "):
        assert words in printed
    pictures = sum("image/png" in o.get("data", {}) for c in book.cells for o in c.get("outputs", ()))
    assert pictures >= 3 and "viewer.html" in str(book.cells[-2].outputs)
