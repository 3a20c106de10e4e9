"""Run the notebook from top to bottom and save what it prints and draws in it, without progress bars.

    pip install nbclient ipykernel && python labs/run_lab.py

Takes some eight minutes on two cores. The viewer's frame is left out, since its page is in runs/.
"""

import base64
import io
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

LAB = Path(__file__).resolve().parent / "crl_lab.ipynb"


def shrink(picture):
    """A PNG in base64, in 64 colours."""
    small = io.BytesIO()
    whole = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    whole.quantize(64).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def tidy(outputs):
    """What is worth keeping of a cell's outputs: one text, then the pictures."""
    text = ""
    pictures = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout":
            text += output.text
        elif "image/png" in output.get("data", {}):
            data = {"image/png": shrink(output.data["image/png"])}
            pictures.append(nbformat.v4.new_output("display_data", data))
    printed = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return printed + pictures


def main():
    book = nbformat.read(LAB, as_version=4)
    folder = {"metadata": {"path": str(LAB.parent)}}
    nbclient.NotebookClient(book, timeout=3600, resources=folder).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    nbformat.write(book, LAB)


if __name__ == "__main__":
    main()
