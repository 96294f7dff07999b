"""Tutorials: scripts in percent format, which are run as notebooks and become pages with what they printed and drew.

A tutorial is a file of `docs/tutorials`: cells begin with `# %%`, cells of text with `# %% [markdown]`. It runs in the
kernel of Jupyter, so that the notebook which a reader downloads does the same. What goes to stderr (progress) is left
out of the page.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TIMEOUT_S = 600
_CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?\s*$", re.MULTILINE)
_TO_SCRIPT = re.compile(r"\]\((\w+)\.py\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def read_tutorial(file: Path) -> nbformat.NotebookNode:
    """The notebook of a tutorial, without outputs."""
    _, *parts = _CELL.split(file.read_text())
    cells = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        if kind:
            lines = (line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())
            cells.append(new_markdown_cell("\n".join(lines)))
        else:
            cells.append(new_code_cell(text.strip()))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run_notebook(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run all cells in a folder; CellExecutionError names the cell that fails."""
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        startup_timeout=TIMEOUT_S,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    done: nbformat.NotebookNode = client.execute()
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return done


def page_of(notebook: nbformat.NotebookNode, name: str, folder: Path) -> str:
    """The page of a notebook that was run; its pictures are written into `folder`, beside the page.

    A picture is described by the heading above it.
    """
    parts = list(_parts(notebook, name, folder))
    first, *rest = parts
    download = f"This page is a notebook that was run: [download it]({name}.ipynb)."
    return "\n\n".join([first, download, *rest]) + "\n"


def _parts(notebook: nbformat.NotebookNode, name: str, folder: Path) -> Iterator[str]:
    heading, n_pictures = name, 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # in the repository a link leads to the script, on the site to its page
            yield _TO_SCRIPT.sub(r"](\1.md)", cell.source)
            heading = (_HEADING.findall(cell.source) or [heading])[-1]
            continue
        yield f"```python\n{cell.source}\n```"
        for output in cell.outputs:
            if output.output_type == "stream":
                yield f"```text\n{output.text.rstrip()}\n```"
                continue
            data = output.get("data", {})
            if "image/png" in data:
                n_pictures += 1
                picture = folder / f"{name}_{n_pictures}.png"
                picture.write_bytes(base64.b64decode(data["image/png"]))
                yield f"![{heading}]({picture.name})"
            elif "text/plain" in data:
                yield f"```text\n{data['text/plain'].rstrip()}\n```"
