"""The house guards itself: floors, notebooks and package in step, lint, module sizes, a light import."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODULES = sorted(path for path in (ROOT / "supertrainer").rglob("*.py") if path.name != "_modidx.py")
# A module above the limit needs its reason here: {"supertrainer/x.py": "why it is one chapter"}
LONG_MODULES: dict[str, str] = {}


def run(*command: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_imports_go_down_only():
    done = run(BIN / "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout


def test_the_contract_has_no_exceptions():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text()


def test_lint_is_clean():
    done = run(BIN / "ruff", "check", ".")
    assert done.returncode == 0, done.stdout


def test_notebooks_and_package_are_in_step():
    done = run(sys.executable, "tools/export.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_chapters(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 400 or str(path.relative_to(ROOT)) in LONG_MODULES, f"{lines} lines: two chapters?"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_read_as_chapters(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\n\n?> .+", cells[0].source), "a title and what it is for"
    in_a_row = 0
    for cell in cells:
        exported = cell.cell_type == "code" and cell.source.startswith("#| export")
        in_a_row = in_a_row + 1 if exported else 0
        assert in_a_row < 3, f"three exported cells without a word between: {cell.source[:80]}"


def test_package_data_is_shipped():
    import setuptools

    packages = setuptools.find_packages(str(ROOT), include=["supertrainer", "supertrainer.*"])
    assert {"supertrainer.config", "supertrainer.data", "supertrainer.models", "supertrainer.inference.engines"} <= set(packages)


def test_import_is_light_and_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import supertrainer\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'hydra', 'pydantic', 'numpy', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert dict(os.environ) == before\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "experiment=train_llm", "--cfg", "job"],
                                   ["train", "+experiment=train_brt"]])
def test_command_line_answers_without_torch(words):
    code = (
        "import sys; from supertrainer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    assert '--help' in sys.argv\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = run(sys.executable, "-c", code, *words)
    assert done.returncode == 0, done.stderr


def test_functions_and_modules_of_one_name_live_together():
    code = (
        "import supertrainer, supertrainer.benchmark.speed, supertrainer.train as module\n"
        "from supertrainer import benchmark, train\n"
        "assert callable(benchmark) and callable(train) and callable(module)\n"
        "assert benchmark.speed is supertrainer.benchmark.speed\n"
    )
    done = run(sys.executable, "-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_facade_is_there():
    code = ("import supertrainer\n"
            "for name in supertrainer.__all__:\n"
            "    assert callable(getattr(supertrainer, name)), name\n"
            "from supertrainer import FastBERT, FastLLM, FastMLLM, FastModel\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
