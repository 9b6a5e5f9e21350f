"""Train, measure and save an encoder, a language model and a vision-language model; end with a table and the reports."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("train_bert", "train_llm", "train_mllm")


def main(overrides: list[str]) -> int:
    """Run the three experiments one after another, each in a process of its own, with the same extra overrides."""
    folder = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # nothing here may reach a model hub
    started = time.time()
    done = []
    for number, experiment in enumerate(EXPERIMENTS, 1):
        print(f"\n[{number}/{len(EXPERIMENTS)}] {experiment}", flush=True)
        command = [sys.executable, "-m", "supertrainer.train", f"+experiment={experiment}",
                   f"run.dir={folder / experiment}", *overrides]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code:
            print(f"\n{experiment} stopped with exit code {code}; its message is above.", file=sys.stderr)
            return code
        done.append(ROOT / folder / experiment)
    from supertrainer.run import runs_table

    minutes = (time.time() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes on {os.cpu_count()} cores.\n\n{runs_table(done)}\n\nReports:")
    for run in done:
        print(f"  {run / 'report.html'}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
