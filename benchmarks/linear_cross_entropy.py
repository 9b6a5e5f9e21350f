"""Seconds and peak memory of the loss under an output embedding, forward and backward: three ways, the same rows.

- `torch`: all logits at once, in float32 for the loss, as transformers computes it.
- `masked rows`: the rows with loss only, their logits at once, the loss a few rows at a time (`kernels.row_losses`).
- `fused`: `kernels.linear_cross_entropy`: the rows with loss only, their logits never at once.

Each measurement is a fresh process and the ways take turns, so that a busy machine is busy for all of them.

    python benchmarks/linear_cross_entropy.py --output benchmarks/results/linear_cross_entropy.md
    python benchmarks/linear_cross_entropy.py --rounds 1 --only smollm2-frozen-bf16
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

WAYS = ("torch", "masked rows", "fused")
SHAPES = {"128k": (128_000, 512), "smollm2": (49_152, 576), "tiny": (500, 16)}  # vocabulary, hidden
BY_NAME_ONLY = ("tiny",)  # for the tests
HEADS = ("frozen", "trained")
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
ROWS, MASKED = 1024, 0.7


def status(field: str) -> float:
    """Return a field of this process's memory, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def measure(way: str, shape: str, head: str, kind: str, repeats: int) -> dict:
    """Take one step for the memory and `repeats` for the time; return the figures, and the loss to compare."""
    import torch
    import torch.nn.functional as F

    from supertrainer.kernels.cross_entropy import row_losses
    from supertrainer.kernels.linear_cross_entropy import linear_cross_entropy

    vocabulary, features = SHAPES[shape]
    torch.manual_seed(0)
    dtype = getattr(torch, TYPES[kind])
    weight = (torch.randn(vocabulary, features) * 0.05).to(dtype).requires_grad_(head == "trained")
    hidden = torch.randn(ROWS, features).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (ROWS,))
    targets[torch.rand(ROWS) < MASKED] = -100
    kept = targets != -100

    def step() -> float:
        hidden.grad = weight.grad = None
        if way == "torch":
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        elif way == "masked rows":
            loss = row_losses(F.linear(hidden[kept], weight), targets[kept]).sum() / kept.sum()
        else:
            loss = linear_cross_entropy(hidden, weight, targets, reduction="mean")
        loss.backward()
        return loss.item()

    (torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)).sum().item()  # the library's own start
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status("VmRSS")
    loss = step()
    memory = status("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"way": way, "case": f"{shape}-{head}-{kind}", "seconds": statistics.median(seconds), "mb": memory,
            "loss": loss, "gradient": hidden.grad.double().norm().item()}


def report(found: list[dict], cases: list[str], options: argparse.Namespace) -> str:
    """Return the table, with medians over the rounds, in Markdown."""
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    lines = ["# Output embedding and cross-entropy, forward and backward", "",
             f"{date.today()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
             f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}. "
             f"Load when it began: {options.load:.1f}, when it ended: {os.getloadavg()[0]:.1f}"
             + (f" ({options.note})." if options.note else "."), "",
             f"{ROWS:,} rows, {MASKED:.0%} of them without loss. Medians of {options.rounds} interleaved rounds, each in a "
             f"fresh process (the median of {options.repeats} steps after a first one). Memory: the peak of the first step "
             "above weights and hidden states, gradients included. `torch`: all logits at once; `masked rows`: only rows "
             "with loss, their logits at once; `fused`: `kernels.linear_cross_entropy`.", "",
             "| vocabulary x hidden | head | type | way | seconds (all rounds) | peak, MB | time against torch | "
             "memory against torch | loss |", "|---|---|---|---|---|---|---|---|---|"]
    for case in cases:
        shape, head, kind = case.split("-")
        middle = {(way, key): statistics.median(f[key] for f in found if f["case"] == case and f["way"] == way)
                  for way in WAYS for key in ("seconds", "mb", "loss")}
        for way in WAYS:
            rounds = ", ".join(f"{f['seconds']:.3f}" for f in found if f["case"] == case and f["way"] == way)
            lines.append(f"| {SHAPES[shape][0]:,} x {SHAPES[shape][1]} | {head} | {kind} | {way} | "
                         f"**{middle[way, 'seconds']:.3f}** ({rounds}) | {middle[way, 'mb']:,.0f} | "
                         f"{middle[way, 'seconds'] / middle['torch', 'seconds']:.2f} x | "
                         f"{middle[way, 'mb'] / middle['torch', 'mb']:.2f} x | {middle[way, 'loss']:.5f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in each process")
    parser.add_argument("--only", help="one case, such as 128k-frozen-bf16")
    parser.add_argument("--note", default="", help="what else the machine did, for the table")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file too")
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "SHAPE", "HEAD", "TYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.repeats)))
        return
    options.load = os.getloadavg()[0]
    cases = ["-".join(parts) for parts in itertools.product(SHAPES, HEADS, TYPES)]
    cases = [case for case in cases if case == options.only or (options.only is None and not case.startswith(BY_NAME_ONLY))]
    if not cases:
        parser.error(f"no case is called {options.only}")
    found = []
    for number in range(options.rounds):
        for case in cases:
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                command = [sys.executable, __file__, "--measure", way, *case.split("-"), "--repeats", str(options.repeats)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {case}, {way}: {found[-1]['seconds']:.3f} s", file=sys.stderr)
    table = report(found, cases, options)
    print(table)
    if options.output:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
