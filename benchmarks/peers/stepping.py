"""The inside of a measured process: a trainer that takes one step whenever it is told to, and says what that cost."""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Told(Exception):
    """The measuring process wants no more steps."""


class Line:
    """Two pipes to the measuring process: words come in, JSON goes out."""

    def __init__(self, reading: int, writing: int) -> None:
        self.words, self.answers = os.fdopen(reading), os.fdopen(writing, "w", buffering=1)

    def say(self, **facts: Any) -> None:
        self.answers.write(json.dumps(facts) + "\n")

    def wait(self) -> None:
        """Return when the next step is wanted.

        Raises:
            Told: none is.
        """
        if self.words.readline().strip() != "step":
            raise Told


def status(field: str) -> float:
    """Return a field of this process's memory (Linux), in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


class Memory:
    """The peak above what the process, or the GPU, held when `mark` was called."""

    def __init__(self, device: str) -> None:
        self.device, self.base = device, 0.0

    def mark(self) -> None:
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() / 1e6
            return
        (torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)).sum()  # the library's own start
        ctypes.CDLL(None).malloc_trim(0)  # what loading left behind is no part of the model
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        self.base = status("VmRSS")

    def above(self) -> float:
        """Return the peak so far above the mark, in MB."""
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e6 if self.device == "cuda" else status("VmHWM")
        return peak - self.base


class Turns(TrainerCallback):
    """Holds a trainer at the beginning of each step until it is told to go on, and reports the step before.

    A step lasts from there to the beginning of the next: forward, backward, clipping, the optimizer, the trainer's own
    bookkeeping, and making the next batch.
    """

    def __init__(self, line: Line, memory: Memory) -> None:
        self.line, self.memory = line, memory
        self.since: float | None = None
        self.losses: list[Any] = []
        self.tokens = self.positions = 0

    def _now(self) -> float:
        if self.memory.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.since is not None:
            seconds = self._now() - self.since
            self.line.say(event="step", seconds=seconds, loss=float(sum(float(loss) for loss in self.losses)),
                          tokens=self.tokens, positions=self.positions, mb=self.memory.above())
        self.losses, self.tokens, self.positions = [], 0, 0
        self.line.wait()
        self.since = self._now()

    def watch(self, trainer: Any) -> None:
        """Note the loss of each step of `trainer`, and the positions of its batches."""
        inner = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.positions += inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            real = mask is not None and mask.dim() == 2
            self.tokens += int(mask.sum()) if real else inputs["input_ids"].numel()
            loss = inner(model, inputs, *args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        trainer.training_step = training_step


def serve(line: Line, device: str, build: Callable[[Callable[[Any], None]], tuple[Any, Any]]) -> None:
    """Build a trainer and take its steps as they are asked for.

    Args:
        build: called with a function that it calls with the loaded model; returns the trainer, and a context to train in.
    """
    memory, started, facts = Memory(device), time.perf_counter(), {}

    def loaded(model: Any) -> None:
        for parameter in model.parameters():
            parameter.detach().flatten()[::1024].sum()  # weights of a mapped file come in when they are read
        facts["load_seconds"] = time.perf_counter() - started
        memory.mark()

    trainer, context = build(loaded)
    turns = Turns(line, memory)
    turns.watch(trainer)
    trainer.add_callback(turns)
    facts |= {"build_seconds": time.perf_counter() - started,
              "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
              "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})}
    facts["patches"] = str(getattr(_plain(trainer.model), "patches", ""))
    facts["base_mb"] = memory.base
    line.say(event="ready", **facts)
    try:
        with context:
            trainer.train()
    except Told:
        return
    line.say(event="end")


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def main(arguments: list[str]) -> None:
    """Run a child: `WORK_JSON VARIANT FOLDER STEPS READ WRITE`."""
    from . import variants
    from .workloads import Workload

    work, variant, folder, steps, reading, writing = arguments
    line, described = Line(int(reading), int(writing)), json.loads(work)
    described["variants"] = tuple(described["variants"])
    try:
        if variant == "meter":
            meter(line, described["device"])
            return
        build = variants.VARIANTS[variant]
        workload = Workload(**described)
        serve(line, workload.device, lambda loaded: build(workload, Path(folder), int(steps), loaded))
    except Told:
        return
    except variants.Missing as reason:
        line.say(event="missing", reason=str(reason))
    except Exception as error:  # a peer that fails is a line of the table, with the reason; the log has the traceback
        import traceback

        traceback.print_exc()
        line.say(event="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.exit(1)


def meter(line: Line, device: str) -> None:
    """Measure the machine whenever a step is asked for, so that its rates are read in the same minutes."""
    from . import rates

    line.say(event="ready")
    while True:
        line.wait()
        started = time.perf_counter()
        found = {f"{name} FLOP/s": rates.matmul_rate(name, device) for name in ("bfloat16", "float32")}
        line.say(event="step", seconds=time.perf_counter() - started, **found, copy=rates.copy_rate(device), loss=0.0, mb=0.0)
