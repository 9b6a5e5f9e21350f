"""Notebooks -> package -> README: export, clean, and write README.md from nbs/index.ipynb.

Usage: python tools/export.py [--check]   (--check changes nothing and fails when something is out of step)
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
KEEP_OUTPUTS = ("index.ipynb",)


def readme(root: Path) -> str:
    """Return README.md as nbs/index.ipynb says it."""
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = body.replace("](images/", "](nbs/images/")
    return "<!-- Made from nbs/index.ipynb by `make export`; edit that. -->\n\n" + body.strip() + "\n"


def clean(path: Path) -> None:
    """Strip outputs, counts and editor metadata; cell ids stay, so that a change is a small diff."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            if path.name not in KEEP_OUTPUTS:
                cell.outputs = []
    nbformat.write(notebook, path)


def export(root: Path) -> None:
    """Do the whole step in the checkout at `root`."""
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            clean(path)
    subprocess.run([BIN / "nbdev-export"], cwd=root, check=True)
    (root / "supertrainer" / "_modidx.py").unlink(missing_ok=True)  # nbdev's index for its documentation, not ours
    (root / "README.md").write_text(readme(root), "utf-8")


def differences(a: Path, b: Path) -> list[str]:
    """Return the files that differ between the two checkouts' exported parts."""
    found = [] if filecmp.cmp(a / "README.md", b / "README.md", shallow=False) else ["README.md"]
    for part in ("supertrainer", "nbs"):
        names = {p.relative_to(x) for x in (a, b) for p in (x / part).rglob("*")
                 if p.is_file() and p.suffix in (".py", ".ipynb") and p.name != "_modidx.py"
                 and ".ipynb_checkpoints" not in p.parts}
        found += [str(n) for n in sorted(names) if not ((a / n).is_file() and (b / n).is_file()
                                                        and filecmp.cmp(a / n, b / n, shallow=False))]
    return found


def check(root: Path) -> list[str]:
    """Return what an export would change, without changing it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        copy.mkdir()
        for name in ("nbs", "supertrainer"):
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("pyproject.toml", "settings.ini", "README.md"):
            shutil.copy(root / name, copy / name)
        export(copy)
        return differences(root, copy)


if __name__ == "__main__":
    if "--check" in sys.argv:
        out_of_step = check(ROOT)
        print("\n".join(["Out of step; run `make export`:", *out_of_step]) if out_of_step else "In step.")
        sys.exit(bool(out_of_step))
    export(ROOT)
