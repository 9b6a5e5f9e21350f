"""Seconds, memory, and the share of what the machine can do, kernel by kernel: ours, PyTorch eager, torch.compile, Liger.

For each kernel and size one process lets the ways take turns; then each way runs in a fresh process for its peak memory
above the inputs. On a GPU, bytes moved are set against the copy rate and FLOPs against the matmul rate read in the same
process; on a CPU those rates are printed too, but a buffer that fits the cache is faster than a copy that does not.

    python benchmarks/kernels.py --json kernels.json
    python benchmarks/kernels.py --only rms_norm lora_mlp --sizes smollm2 --rounds 5
    python benchmarks/kernels.py --device cuda --sizes llama-3.1-8b-gpu      # one bare GPU machine, no network
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its kernels.py would stand before the package of that name
KERNELS = ("rms_norm", "layer_norm", "rope", "glu", "gelu", "lora_linears", "lora_mlp", "attention", "linear_cross_entropy")
DIFFERENCE = 0.02  # relative, of outputs and gradients in bfloat16 against eager's; tests compare with float64


def make(name: str, size: str, dtype: str, device: str) -> Any:
    """Return the inputs and ways of a kernel; the same numbers on every call."""
    import torch

    from benchmarks.peers import kernel_cases

    torch.manual_seed(0)
    return kernel_cases.CASES[name](kernel_cases.SIZES[size], getattr(torch, dtype), device)


def passes(case: Any, function: Callable) -> tuple[Callable, Callable]:
    """Return (forward only, forward and backward) of a way; gradients come in as fixed random numbers."""
    import torch

    tensors = [value for value in (*case.inputs, *case.also) if isinstance(value, torch.Tensor) and value.requires_grad]
    arrived: list[Any] = []

    def forward() -> Any:
        with torch.no_grad():
            return function(*case.inputs)

    def both() -> tuple:
        found = function(*case.inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        if not arrived:
            torch.manual_seed(1)
            arrived.extend(torch.randn_like(output) for output in outputs)
        return *outputs, *torch.autograd.grad(outputs, tensors, arrived)

    return forward, both


def ways_of(case: Any, compiled: bool) -> tuple[dict[str, Callable], float | None, str | None]:
    """Return the ways with torch.compile among them, the seconds it took to compile, and why it is not there."""
    import shutil

    import torch

    if not compiled or (not torch.cuda.is_available() and shutil.which("g++") is None):
        return case.ways, None, None if not compiled else "torch.compile needs a C++ compiler on a CPU"
    fast = torch.compile(case.ways["eager"], dynamic=False)
    started = time.perf_counter()
    try:
        for run in passes(case, fast):
            run()
    except Exception as error:  # a machine without a working compiler still measures the rest
        return case.ways, None, f"torch.compile: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {"eager": case.ways["eager"], "compile": fast, **case.ways}, time.perf_counter() - started, None


def timed(function: Callable, device: str) -> float:
    """Return the seconds of one call, of as many as take a millisecond on a GPU."""
    import torch

    if device != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 5
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def relative(found: tuple, expected: tuple) -> float:
    """Return the largest relative difference (root mean square) of any output or gradient."""
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
               for a, b in zip(found, expected, strict=True))


def time_case(name: str, size: str, dtype: str, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Let the ways take turns; return medians, all rounds, and the machine's rates."""
    from benchmarks.peers import rates

    case = make(name, size, dtype, device)
    ways, compile_seconds, reason = ways_of(case, compiled)
    ready = {way: passes(case, function) for way, function in ways.items()}
    expected = ready["eager"][1]()
    apart = {way: relative(run[1](), expected) for way, run in ready.items()}
    seconds: dict[str, tuple[list, list]] = {way: ([], []) for way in ready}
    for number in range(rounds + 1):
        for way in list(ready) if number % 2 == 0 else list(ready)[::-1]:
            for run, kept in zip(ready[way], seconds[way], strict=True):
                found = timed(run, device)
                if number:
                    kept.append(found)
    matmul, copy = rates.matmul_rate(dtype, device), rates.copy_rate(device)
    return {"kernel": name, "size": size, "dtype": dtype, "compile_seconds": compile_seconds, "not_compiled": reason,
            "matmul": matmul, "copy": copy, "moved": case.moved, "flops": case.flops, "apart": apart,
            "rounds": {way: {"forward": kept[0], "both": kept[1]} for way, kept in seconds.items()},
            "seconds": {way: [statistics.median(part) for part in kept] for way, kept in seconds.items()}}


def memory_case(name: str, size: str, dtype: str, device: str, way: str) -> float:
    """Return the peak of forward and backward above the inputs, in MB; in a process of its own."""
    from benchmarks.peers.stepping import Memory

    case = make(name, size, dtype, device)
    functions, _, _ = ways_of(case, way == "compile")
    _, both = passes(case, functions[way])
    if way == "compile" or device == "cuda":
        both()  # compiling is not what is asked for here
    memory = Memory(device)
    memory.mark()
    both()
    return memory.above()


def share(result: dict[str, Any], way: str, which: int) -> float | None:
    """Return the share of the copy rate (kernels that move) or of the matmul rate (kernels that multiply)."""
    seconds = result["seconds"][way][which]
    if result["moved"]:
        return result["moved"][which] / seconds / result["copy"]
    return result["flops"][which] / seconds / result["matmul"] if result["flops"] else None


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table in Markdown."""
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu}, {os.cpu_count()} cores"
    rates = {key: statistics.median(result[key] for result in results) / 1e9 for key in ("matmul", "copy")}
    lines = ["# Kernels", "",
             f"{date.today()}, {device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
             f"{torch.__version__}. Load when it began: {options.load:.1f}, when it ended: {os.getloadavg()[0]:.1f}"
             + (f" ({options.note})." if options.note else "."), "",
             f"Medians of {options.rounds} rounds in which the ways take turns, {options.dtype}. Matmul {rates['matmul']:,.0f} "
             f"GFLOP/s, copy {rates['copy']:,.1f} GB/s (bytes read and written). Memory: the peak of forward and backward above "
             "the inputs, in a fresh process. `reaches`: bytes that must be moved ÷ time ÷ copy rate, or FLOPs ÷ time ÷ matmul "
             "rate, forward and both passes. `apart`: the largest relative difference of outputs and gradients from eager's.", "",
             "| kernel | size | way | forward, ms | both, ms | both against eager | peak, MB | reaches | apart | compile, s |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        for way, (forward, both) in result["seconds"].items():
            reached = [share(result, way, which) for which in range(2)]
            text = "" if reached[0] is None else f"{reached[0]:.2f}, {reached[1]:.2f} of {'copy' if result['moved'] else 'matmul'}"
            warned = " (!)" if result["apart"][way] > DIFFERENCE else ""
            lines.append(f"| {result['kernel']} | {result['size']} | {way} | {forward * 1e3:.3f} | **{both * 1e3:.3f}** | "
                         f"{both / result['seconds']['eager'][1]:.2f} x | {result['mb'].get(way, float('nan')):,.1f} | {text} | "
                         f"{result['apart'][way]:.1e}{warned} | "
                         f"{format(result['compile_seconds'], '.1f') if way == 'compile' else ''} |")
    missing = dict.fromkeys(result["not_compiled"] for result in results if result["not_compiled"])
    return "\n".join([*lines, *(f"\n{reason}." for reason in missing)]) + "\n"


def child(*words: Any) -> Any:
    """Run this script in a fresh process; return what it prints last."""
    done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (kernel, size) pairs; on a CPU an encoder's size goes with an encoder's kernels."""
    from benchmarks.peers.kernel_cases import ENCODER, SIZES

    sizes = options.sizes or (["llama-3.2-1b-gpu", "qwen3-4b-gpu", "llama-3.1-8b-gpu"] if options.device == "cuda"
                              else ["smollm2", "llama-3.2-1b", "minilm"])
    for size in sizes:
        if size not in SIZES:
            raise SystemExit(f"No size is called {size}. There are: {', '.join(SIZES)}.")
    pairs = [(name, size) for name in options.only or KERNELS for size in sizes]
    return pairs if options.sizes or options.device == "cuda" else [
        (name, size) for name, size in pairs if (size == "minilm") == (name in ENCODER)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="kernels to measure")
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--note", default="", help="what else the machine did, for the table")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *words, last = options.child
        print(json.dumps(time_case(*words, options.rounds, last == "compile") if what == "time" else memory_case(*words, last)))
        return
    options.load = os.getloadavg()[0]
    results = []
    for name, size in chosen(options):
        words = (name, size, options.dtype, options.device)
        result = child("--rounds", options.rounds, "--child", "time", *words, "plain" if options.no_compile else "compile")
        result["mb"] = {way: child("--child", "memory", *words, way) for way in result["seconds"]}
        results.append(result)
        print(f"{name}, {size}: " + ", ".join(f"{way} {both * 1e3:.2f} ms" for way, (_, both) in result["seconds"].items()),
              file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    table = report(results, options)
    print(table)
    if options.output:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
