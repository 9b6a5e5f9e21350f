"""The whole journey: `preview(cfg)`, `train(cfg)`, `infer(cfg)`, `benchmark(cfg)`, and the run folder they leave."""

from supertrainer.run.answering import infer
from supertrainer.run.exporting import export
from supertrainer.run.folder import Run, runs_table, sweep_table
from supertrainer.run.preview import Preview, preview
from supertrainer.run.serving import serve
from supertrainer.run.side_by_side import benchmark
from supertrainer.run.talking import infer_command
from supertrainer.run.training import train

__all__ = ["Preview", "Run", "benchmark", "export", "infer", "infer_command", "preview", "runs_table", "serve", "sweep_table",
           "train"]
