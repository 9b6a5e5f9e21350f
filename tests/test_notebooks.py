"""Every chapter runs from top to bottom, its tests included, and every example as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if path.name != "index.ipynb")
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_chapter_runs(path, tmp_path):
    nbdev_test = Path(sys.executable).parent / "nbdev-test"
    done = subprocess.run([nbdev_test, path, "--n-workers", "0"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore", "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, in_tmp):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # the examples say which cell to change; the tests change it to the smallest mode
        if cell.cell_type == "code":
            cell.source = cell.source.replace('"mode=toy"', '"mode=sanity_check"')
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(in_tmp)}}).execute()
