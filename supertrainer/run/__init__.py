"""The whole journey: `preview(cfg)`, `train(cfg)`, `infer(cfg)`, `benchmark(cfg)`, and the run folder they leave."""

from supertrainer.run.answering import infer, infer_command
from supertrainer.run.exporting import export
from supertrainer.run.folder import Run, runs_table, sweep_table
from supertrainer.run.measuring import benchmark
from supertrainer.run.preview import Preview, preview
from supertrainer.run.training import train

__all__ = ["Preview", "Run", "benchmark", "export", "infer", "infer_command", "preview", "runs_table", "sweep_table", "train"]
