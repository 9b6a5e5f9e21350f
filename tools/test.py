"""Run every test with one thread per worker; the last line is pytest's own count."""

import os
import sys

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
sys.exit(pytest.main(["-n", os.environ.get("TEST_WORKERS", "2"), "--dist", "worksteal", *sys.argv[1:]]))
