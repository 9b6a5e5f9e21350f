"""Seconds, real tokens per second, memory and loss of a training step: supertrainer beside transformers, TRL and Unsloth.

Every variant is a process of its own that loads the model, builds its trainer and then takes one step whenever it is told
to. First each runs alone in a fresh process, for its peak memory and its loss curve; then all of them live side by side
and take turns, one step of each per round, so that a busy machine is busy for all. A further process reads the machine's
matmul and copy rates in the same rounds. All get the same rows in the same order, as token ids with labels.

    python benchmarks/train_step.py smollm2 random --unsloth-python /path/to/venv/bin/python
    python benchmarks/train_step.py minilm digits --rounds 9 --json results.json
    python benchmarks/train_step.py gpu --dry-run              # what a GPU would be asked for, with sizes
    python benchmarks/train_step.py gpu --json gpu.json        # one bare machine, no network: the whole table
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its kernels.py would stand before the package of that name

from benchmarks.peers.workloads import WORKLOADS, Workload, prepare, tiny  # noqa: E402

TOLERANCE = 0.03  # of the reference's loss: what bfloat16 and another order of summation may change in a few steps
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
         "HF_HUB_DISABLE_TELEMETRY": "1"}


class Child:
    """A measured process."""

    def __init__(self, work: Workload, variant: str, folder: Path, steps: int, python: str, log: Path) -> None:
        self.variant, self.log = variant, log
        reading, self._words = os.pipe()
        answers, writing = os.pipe()
        command = [python, __file__, "--child", json.dumps(asdict(work)), variant, str(folder), str(steps), str(reading),
                   str(writing)]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            pass_fds=(reading, writing), env={**os.environ, **QUIET}, cwd=folder)
        os.close(reading)
        os.close(writing)
        self._answers = os.fdopen(answers)
        self.facts = self.read()

    def read(self) -> dict[str, Any]:
        """Return what the process says next."""
        line = self._answers.readline()
        if line:
            return json.loads(line)
        tail = self.log.read_text(errors="replace")[-400:]
        return {"event": "failed", "reason": f"ended with status {self.process.wait()}: {' '.join(tail.split())[-300:]}"}

    @property
    def alive(self) -> bool:
        return self.facts["event"] in ("ready", "step")

    def step(self) -> dict[str, Any] | None:
        """Let it take a step; return the figures, or `None` if it could not (`facts` says why)."""
        os.write(self._words, b"step\n")
        found = self.read()
        if found["event"] != "step":
            self.facts = found
            return None
        return found

    def stop(self) -> None:
        try:
            os.write(self._words, b"stop\n")
        except BrokenPipeError:
            pass
        os.close(self._words)
        self._answers.close()
        self.process.wait()


def available_mb() -> float:
    """Return the memory that new processes can have without swapping."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 / 1e6


class Run:
    """The measurement of one workload."""

    def __init__(self, work: Workload, options: argparse.Namespace, folder: Path) -> None:
        self.work, self.options, self.folder = work, options, folder
        self.found: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.meter: list[dict[str, Any]] = []
        self.steps = max(options.rounds, options.alone) + 3

    def start(self, variant: str) -> Child | None:
        python = self.options.unsloth_python if variant == "unsloth" and self.options.unsloth_python else sys.executable
        child = Child(self.work, variant, self.folder, self.steps, python, self.folder / f"{variant}.log")
        if child.alive:
            return child
        self.missing[variant] = child.facts["reason"]
        print(f"{self.work.name}, {variant}: left out: {child.facts['reason']}", file=sys.stderr)
        child.stop()
        return None

    def alone(self, variant: str) -> None:
        """Take a few steps in a fresh process with nothing beside it: memory, losses, and the time of the start."""
        started = time.perf_counter()
        child = self.start(variant)
        if child is None:
            return
        steps = []
        for _ in range(self.options.alone):
            step = child.step()
            if step is None:
                self.missing[variant] = child.facts.get("reason", "it ended")
                print(f"{self.work.name}, {variant}: failed: {self.missing[variant]}", file=sys.stderr)
                break
            if not steps:
                child.facts["first_step_after"] = time.perf_counter() - started
            steps.append(step | {"number": len(steps)})
        child.stop()
        if len(steps) == self.options.alone:
            self.found[variant] = {**child.facts, "alone": steps, "mb": max(step["mb"] for step in steps), "rounds": []}
            print(f"{self.work.name}, {variant}, alone: {min(step['seconds'] for step in steps):.3f} s, "
                  f"{self.found[variant]['mb']:,.0f} MB above the model, loss {steps[0]['loss']:.4f}", file=sys.stderr)

    def together(self, variants: list[str]) -> None:
        """Let the processes of `variants` take turns for the rounds asked for, after a first step of each."""
        before = len(self.found["ours"]["rounds"]) if "ours" in self.found else 0
        children = {name: child for name in [*variants, "meter"] if (child := self.start(name)) is not None}
        for number in range(self.options.rounds + 1):
            names = list(children) if number % 2 == 0 else list(children)[::-1]
            for name in names:
                step = children[name].step()
                if step is None:
                    self.missing[name] = children.pop(name).facts.get("reason", "it ended")
                elif number and name == "meter":
                    self.meter.append(step)
                elif number:  # the first step compiles, allocates, reads files
                    self.found[name]["rounds"].append(step | {"number": number})
                    print(f"{self.work.name}, round {number}, {name}: {step['seconds']:.3f} s", file=sys.stderr)
        for child in children.values():
            child.stop()
        for name in variants:
            if "ours" in variants:
                self.found[name]["ours_rounds"] = [before, len(self.found["ours"]["rounds"])]

    def groups(self, able: list[str]) -> list[list[str]]:
        """Return sets of variants that fit into memory side by side; `ours` is in each, so that ratios are of one group."""
        room, resident = available_mb() * 0.85, 900  # what a process holds between its steps: libraries, weights, freed blocks
        common = [name for name in able if name == "ours"]
        found: list[list[str]] = []
        for name in sorted((name for name in able if name not in common), key=lambda name: -self.found[name]["mb"]):
            for group in found:
                if sum(self.found[other]["mb"] + resident for other in [*group, name]) < room:
                    group.append(name)
                    break
            else:
                found.append([*common, name])
        return found or [common]

    def take(self) -> dict[str, Any]:
        """Measure everything; return the figures."""
        wanted = [name for name in self.work.variants if self.options.only is None or name in self.options.only]
        for variant in wanted:
            self.alone(variant)
        able = [name for name in wanted if name in self.found]
        if self.work.device == "cuda" or self.options.apart:  # a GPU's memory is for one of them at a time
            for turn in range(2):
                for variant in able[::-1] if turn else able:
                    self.together([variant])
        else:
            for group in self.groups(able):
                self.together(group)
        return self.figures()

    def figures(self) -> dict[str, Any]:
        """Return the medians, beside everything they come from."""
        rows = json.loads((self.folder / "rows.json").read_text())
        size = self.work.rows_per_step
        per_step = [rows[start: start + size] for start in range(0, len(rows) - size + 1, size)]
        rates = {key: statistics.median(step[key] for step in self.meter) for key in ("bfloat16 FLOP/s", "float32 FLOP/s", "copy")
                 } if self.meter else {}
        flops = self.flops(per_step)
        for name, found in self.found.items():
            steps = found["rounds"] or found["alone"][1:] or found["alone"]
            found["seconds"] = statistics.median(step["seconds"] for step in steps)
            same_rows = self.work.family != "mllm" and not name.endswith("grouped")
            for step in [*found["rounds"], *found["alone"]]:
                if same_rows:
                    step["tokens"] = sum(len(row["input_ids"]) for row in per_step[step["number"] % len(per_step)])
            found["tokens_per_second"] = pace(steps)
            if flops and rates and same_rows:
                done = [flops[step["number"] % len(flops)] / step["seconds"] for step in steps]
                found["of_matmul_rate"] = statistics.median(done) / rates["bfloat16 FLOP/s"]
        for found in self.found.values():
            if "ours_rounds" in found and found["rounds"] and "ours" in self.found:
                found["ours_against"] = pace(self.found["ours"]["rounds"][slice(*found["ours_rounds"])]
                                             ) / found["tokens_per_second"]
        return {"workload": asdict(self.work), "rates": rates, "step_gflop": statistics.median(flops) / 1e9 if flops else None,
                "tokens_in_a_step": statistics.median(sum(len(row["input_ids"]) for row in part) for part in per_step)
                if self.work.family != "mllm" else None, "variants": self.found, "missing": self.missing,
                "meter": self.meter}

    def flops(self, per_step: list[list[dict]]) -> list[float]:
        """Return the FLOPs that each step needs; nothing for models with images."""
        if self.work.family == "mllm":
            return []
        from transformers import AutoConfig

        from benchmarks.peers.rates import model_facts, step_flops
        from benchmarks.peers.workloads import IGNORE

        path = self.folder / "model"
        config = (AutoConfig.from_pretrained(path) if (path / "config.json").is_file()
                  else AutoConfig.for_model(**self.work.shape))
        facts, causal = model_facts(config), self.work.family == "llm"
        return [step_flops(facts, [len(row["input_ids"]) for row in part],
                           sum(label != IGNORE for row in part for label in row["labels"][1:]) if causal else 0,
                           lora=self.work.lora, causal=causal) for part in per_step]


def pace(steps: list[dict[str, Any]]) -> float:
    """Return the median of real tokens per second."""
    return statistics.median(step["tokens"] / step["seconds"] for step in steps)


def losses(found: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in found["alone"]]


def agreement(mine: list[float], other: list[float]) -> str:
    """Say how far two loss curves are apart, as a share of the second."""
    apart = max(abs(a - b) / abs(b) for a, b in zip(mine, other, strict=False))
    return f"{'agrees' if apart <= TOLERANCE else 'differs'} ({apart:.1%})"


def table(result: dict[str, Any]) -> str:
    """Return the figures of one workload in Markdown."""
    work, found = result["workload"], result["variants"]
    lines = [f"## {work['name']}", "", work["title"] + ".", ""]
    if result["rates"]:
        lines += [f"Rates in the same rounds: {result['rates']['bfloat16 FLOP/s'] / 1e9:,.0f} GFLOP/s in bf16, "
                  f"{result['rates']['float32 FLOP/s'] / 1e9:,.0f} in fp32 (square products), copy "
                  f"{result['rates']['copy'] / 1e9:,.1f} GB/s."
                  + (f" A step needs {result['step_gflop']:,.0f} GFLOP on {result['tokens_in_a_step']:,.0f} real tokens (median)."
                     if result["step_gflop"] else ""), ""]
    lines += ["| variant | s/step (fastest, slowest) | real tokens/s | MB above the model | tokens/s of `ours` to it | memory of "
              "`ours` to it | of the bf16 matmul rate | loss of the steps | against " + f"`{work['reference']}` | to the first step, s |",
              "|---|---|---|---|---|---|---|---|---|---|"]
    ours, reference = found.get("ours"), found.get(work["reference"])
    for name, one in found.items():
        times = [step["seconds"] for step in one["rounds"] or one["alone"]]
        ratio = one.get("ours_against", ours["tokens_per_second"] / one["tokens_per_second"] if ours else None)
        against = "" if ratio is None else f"{1.0 if name == 'ours' else ratio:.2f} x"
        memory = f"{ours['mb'] / max(one['mb'], 1):.2f} x" if ours else ""
        curve = ", ".join(f"{loss:.3f}" for loss in losses(one))
        comparable = reference and not name.endswith("grouped")
        lines.append(
            f"| {name} | **{one['seconds']:.3f}** ({min(times):.3f}, {max(times):.3f}) | "
            f"{one['tokens_per_second']:,.0f} | {one['mb']:,.0f} | {against} | {memory} | "
            f"{format(one['of_matmul_rate'], '.0%') if 'of_matmul_rate' in one else ''} | {curve} | "
            f"{agreement(losses(one), losses(reference)) if comparable else 'other rows'} | {one['first_step_after']:.1f} |")
    lines += [f"| {name} | left out: {reason} | | | | | | | | |" for name, reason in result["missing"].items()]
    return "\n".join(lines) + "\n"


def head(options: argparse.Namespace) -> str:
    """Return the title and the machine."""
    import platform
    from importlib import metadata

    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores"
    versions = []
    for name in ("supertrainer", "torch", "transformers", "trl", "peft", "triton", "liger-kernel"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join([
        "# A training step", "",
        f"{date.today()}, {device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {', '.join(versions)}. "
        f"Load when it began: {options.load:.1f}, when it ended: {os.getloadavg()[0]:.1f}"
        + (f" ({options.note})." if options.note else "."), "",
        f"Medians of {options.rounds} rounds, one step of each variant a round, after a first step each. A step: forward, "
        "backward, clipping, AdamW, the trainer's own bookkeeping and the next batch. Memory: the peak of "
        f"{options.alone} steps in a fresh process with nothing beside it, above the loaded model; of real chats the longest row of "
        "the set is in the third of them, as it is in some step of every epoch. Real tokens: without "
        f"padding. Loss curves come from the same rows and first adapter weights and may differ by {TOLERANCE:.0%}; dropout is "
        "off. FLOPs: what one forward and backward pass over the real tokens needs, nothing counted twice.", ""])


def plan(works: list[Workload], options: argparse.Namespace) -> str:
    """Return what would be measured, with sizes."""
    from transformers import AutoConfig

    from benchmarks.peers.rates import model_facts, step_flops
    from benchmarks.peers.variants import described

    lines, seen = [], {}
    for work in works:
        lines.append(f"{work.name}: {work.title} ({work.device})")
        if work.shape:
            facts = model_facts(AutoConfig.for_model(**work.shape))
            tokens = [work.sequence] * work.rows_per_step
            flops = step_flops(facts, tokens, round(sum(tokens) * (1 - work.masked)), lora=work.lora, causal=True)
            lines.append(f"  {(facts['linear'] + facts['head']) / 1e9:.2f} G weights in linear layers and head, "
                         f"{facts['adapter'] / 1e6:.1f} M in the adapter; {sum(tokens):,} tokens and {flops / 1e12:,.1f} TFLOP a step")
        chosen = [name for name in work.variants if options.only is None or name in options.only]
        seen |= {name: described(name) for name in chosen}
        lines.append(f"  {', '.join(chosen)}: {options.alone} steps alone, {options.rounds} rounds")
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in seen.items())])


def chosen_works(names: list[str], is_tiny: bool) -> list[Workload]:
    """Return the workloads asked for; `gpu` and `cpu` stand for all of theirs."""
    found: dict[str, Workload] = {}
    for name in names:
        group = [work for work in WORKLOADS.values() if work.device == {"gpu": "cuda", "cpu": "cpu"}.get(name)]
        if not group and name not in WORKLOADS:
            raise SystemExit(f"No workload is called {name}. There are: cpu, gpu, {', '.join(WORKLOADS)}.")
        found |= {work.name: tiny(work) if is_tiny else work for work in group or [WORKLOADS[name]]}
    return list(found.values())


def needs_weights(work: Workload, options: argparse.Namespace) -> bool:
    """Return whether a variant reads the weights of random models from a folder."""
    import importlib.util

    if work.device == "cpu":
        return True
    if work.quantised:
        return importlib.util.find_spec("bitsandbytes") is not None
    return bool(options.unsloth_python) or importlib.util.find_spec("unsloth") is not None


def measure(work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one workload, in a folder that is gone afterwards unless `--folder` names one."""
    folder = (options.folder or Path(tempfile.mkdtemp())) / work.name
    steps = max(options.rounds, options.alone) + 3
    try:
        if not (folder / "rows.json").is_file():
            command = [sys.executable, __file__, "--prepare", json.dumps(asdict(work)), str(folder), str(steps),
                       str(int(needs_weights(work, options)))]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **QUIET})
        return Run(work, options, folder).take()
    finally:
        if options.folder is None:
            shutil.rmtree(folder.parent, ignore_errors=True)


def inside(arguments: list[str]) -> None:
    """Be one of the processes that this script starts."""
    if arguments[0] == "--child":
        from benchmarks.peers import stepping

        stepping.main(arguments[1:])
        return
    described = json.loads(arguments[1])
    described["variants"] = tuple(described["variants"])
    prepare(Workload(**described), Path(arguments[2]), int(arguments[3]), bool(int(arguments[4])))


def main() -> None:
    if sys.argv[1:2] in (["--child"], ["--prepare"]):
        inside(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["smollm2", "random"], help="cpu, gpu, or " + ", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", type=int, default=4, help="steps in a fresh process, for memory and losses")
    parser.add_argument("--only", nargs="+", help="variants to measure")
    parser.add_argument("--apart", action="store_true", help="one process at a time, in two orders (GPUs always)")
    parser.add_argument("--unsloth-python", help="the interpreter of an environment that has Unsloth")
    parser.add_argument("--tiny", action="store_true", help="small models and short rows on the CPU: tries the code, measures nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument("--note", default="", help="what else the machine did, for the table")
    parser.add_argument("--folder", type=Path, help="keep models and rows here, and use what is there")
    parser.add_argument("--json", type=Path, help="write all figures here, after each workload")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args()
    works = chosen_works(options.workloads, options.tiny)
    if options.dry_run:
        print(plan(works, options))
        return
    options.load = os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    for work in works:
        results.append(measure(work, options))
        print(table(results[-1]), file=sys.stderr)
        text = head(options) + "\n".join(table(result) for result in results)
        if options.json:
            options.json.write_text(json.dumps({"about": head(options), "results": results}, indent=1))
        if options.output:
            options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
