"""What all tests share: no network, one thread per worker, quiet libraries, a folder of their own to run in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")


sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests
import hub_server  # noqa: E402


@pytest.fixture(autouse=True)
def _threads():
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def seed():
    """A fresh seed; every assertion message names it."""
    import torch

    value = int.from_bytes(os.urandom(4), "little") % 2**31
    torch.manual_seed(value)
    return value


@pytest.fixture
def in_a_new_process():
    """Run Python code in a process of its own, where Triton can be told to interpret before it is imported."""
    pytest.importorskip("triton")

    def run(code, *args, **environment):
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=600,
                              cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})

    return run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that this process talks to as a user who may write (see `hub_server`)."""
    with hub_server.running() as made, hub_server.used_by_this_process(made, monkeypatch, tmp_path / "hub_cache"):
        yield made


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A loaded machine is slow, not wrong: no deadlines. A failing example prints the seed that repeats it.
settings.register_profile("house", deadline=None, max_examples=50, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
