"""GGUF files of a model: size, seconds to write, and how far llama.cpp's answers are from the model's, type by type.

Each type is written twice: by supertrainer from the model folder, and by llama.cpp's own quantiser from the f32 file, through
a Python that has llama-cpp-python (it needs a compiler, so it is no part of the project). Both files are then asked the same:
distributions at places of held-out rows against transformers in float32, and perplexity on those rows.

    python benchmarks/gguf_files.py runs/my-run --reference /tmp/llama/bin/python --output table.md
    python benchmarks/gguf_files.py FOLDER --types q8_0 q4_k_m        # ours alone
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its kernels.py would stand before the package of that name

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from supertrainer.export.gguf import proof  # noqa: E402
from supertrainer.export.gguf.architectures import plan  # noqa: E402
from supertrainer.export.gguf.convert import convert  # noqa: E402
from supertrainer.export.gguf.limits import Distance, distance  # noqa: E402
from supertrainer.inference.llama import Llama  # noqa: E402
from supertrainer.models.sources import model_folder  # noqa: E402
from supertrainer.run.exporting import held_out_ids  # noqa: E402

QUANTISE = """
import ctypes, sys, time, llama_cpp
source, target, kind, threads = sys.argv[1:]
how = llama_cpp.llama_model_quantize_default_params()
how.ftype, how.nthread = int(kind), int(threads)
started = time.perf_counter()
failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how))
print(time.perf_counter() - started)
sys.exit(failed)
"""
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
              "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32}  # llama.h, llama_ftype


def by_llama(python: str, source: Path, target: Path, method: str) -> float:
    """Let llama.cpp quantise the f32 file; return the seconds it took."""
    done = subprocess.run([python, "-c", QUANTISE, str(source), str(target), str(FILE_TYPES[method]), str(torch.get_num_threads())],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp did not write {method}: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def judge(path: Path, rows: list[list[int]], wanted: list) -> tuple[Distance, float]:
    """Ask a file: its distance from transformers' distributions, and its perplexity on the rows."""
    with Llama(path) as llama:
        return distance(wanted, proof.file_distributions(llama, rows)), math.exp(proof.file_loss(llama, rows))


def main() -> None:
    """Write each type, ask each file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder of a language model, or a model folder")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q6_k", "q4_k_m"], choices=list(FILE_TYPES))
    parser.add_argument("--rows", type=int, default=12, help="held-out rows to ask about")
    parser.add_argument("--reference", help="a Python with llama-cpp-python")
    parser.add_argument("--output", help="write the table to this Markdown file too")
    wish = parser.parse_args()

    folder = model_folder(Path(wish.model))
    run = folder.parent if (folder.parent / "results.json").is_file() else None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = held_out_ids(run, tokenizer, wish.rows, 128) if run else proof.default_rows(tokenizer, True)
    made = plan(folder)
    model = proof.load_reference(folder, made, torch.float32)
    with torch.no_grad():
        wanted, loss = proof.model_distributions(model, rows), proof.model_loss(model, rows)
    del model
    places = len(wanted)
    lines = [f"# GGUF files of {made.parameters / 1e6:.1f} M parameters", "",
             f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch {version('torch')}, xllamacpp {version('xllamacpp')}"
             + (", llama.cpp of llama-cpp-python " + subprocess.run([wish.reference, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
                                                                    capture_output=True, text=True).stdout.strip() if wish.reference else "")
             + f". {len(rows)} {'held-out rows of the run' if run else 'prompts'}, {sum(map(len, rows))} tokens; distributions at "
             f"{places} places against transformers in float32, whose perplexity is {math.exp(loss):.3f}.", "",
             "| type | written by | MB | s to write | mean KL, nats | other first choices | perplexity |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as place:
        whole = convert(folder, Path(place) / "whole.gguf", "f32", progress=False)
        for method in wish.types:
            writers = [("supertrainer", None)] + ([("llama.cpp", wish.reference)] if wish.reference else [])
            for name, python in writers:
                path = Path(place) / f"{name}-{method}.gguf"
                started = time.perf_counter()
                if python:
                    seconds = by_llama(python, whole, path, method)
                else:
                    convert(folder, path, method, progress=False)
                    seconds = time.perf_counter() - started
                found, perplexity = judge(path, rows, wanted)
                lines.append(f"| {method} | {name} | {path.stat().st_size / 1e6:.1f} | {seconds:.1f} | {found.kl.mean():.4f} | "
                             f"{len(found.margin)} of {places} | {perplexity:.3f} |")
                print(lines[-1], flush=True)
                path.unlink()
    if wish.output:
        Path(wish.output).write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
