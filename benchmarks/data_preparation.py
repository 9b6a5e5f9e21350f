"""Rows per second and peak memory of preparing chat rows: supertrainer beside TRL, on the same rows in the same run.

Preparation is everything between rows of messages and rows a trainer batches: the chat template, tokens, the loss mask
(assistant only), the cut to `--max-length`, and best-fit-decreasing packing. Both sides get the same rows, tokenizer,
template (with `{% generation %}` markers) and number of processes. Each measurement is a fresh process; the sides take
turns, so that a busy machine is busy for both.

    python benchmarks/data_preparation.py                 # 100,000 rows, all cores, three rounds
    python benchmarks/data_preparation.py --rows 200 --rounds 1 --tokenizer local
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

SIDES = ("supertrainer", "trl")
SYSTEM = "You answer questions about Python's standard library."


def build_rows(count: int, seed: int) -> list[dict]:
    """Return conversations of one to five exchanges made of the standard library's own documentation.

    Args:
        count: how many.
        seed: decides which objects are asked for, in which order, and how much of their documentation is the answer.
    """
    from supertrainer.data import stdlib
    from supertrainer.data.builtin import documented_objects

    objects = documented_objects()[0]
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.5 else []
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            asked = rng.choice(objects)
            answer = asked["doc"][: rng.randint(100, 3000)].strip()
            turns += [{"role": "user", "content": stdlib.question(asked["name"], asked["kind"])},
                      {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    return rows


def build_tokenizer(which: str, rows: list[dict]):
    """Return SmolLM2's tokenizer (`smollm2`), a byte-level BPE trained on the rows (`local`), or the first there is (`auto`)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from supertrainer.chat import CHATML_TEMPLATE
    from supertrainer.models.catalogue import get_entry, locate
    from supertrainer.runtime import UserError, quiet

    tokenizer = None
    if which in ("smollm2", "auto"):
        try:
            file = locate(get_entry("smollm2"))
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except UserError:
            if which == "smollm2":
                raise
    if tokenizer is None:
        from tokenizers import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        texts = [turn["content"] for row in rows[:5000] for turn in row["messages"]]
        trained.train_from_iterator(texts, vocab_size=8000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|im_end|>",
                                            pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


class TreeMemory:
    """The peak of the memory that this process and its children use, above what it was at the start.

    Shared pages count once, by their proportional share (`Pss` of `/proc/*/smaps_rollup`). The result file that both
    sides map is left out of it: those pages belong to the system's cache.
    """

    def __init__(self, interval: float = 0.1) -> None:
        self.interval, self._stop = interval, threading.Event()

    def _now(self) -> float:
        total, waiting = 0.0, [os.getpid()]
        while waiting:
            pid = waiting.pop()
            try:
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss_Anon:"):
                        total += int(line.split()[1]) * 1024 / 1e6
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
            except OSError:  # it ended meanwhile
                continue
        return total

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> "TreeMemory":
        self.begin = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.peak = max(self.peak, self._now())
        self._stop.set()
        self._thread.join()
        self.added = self.peak - self.begin


def prepare_supertrainer(dataset, tokenizer, max_length: int, num_proc: int) -> Callable[[], dict]:
    from supertrainer.data.encode import encode_split
    from supertrainer.data.packing import PackedDataset, fill

    def prepare() -> dict:
        split = encode_split(dataset, tokenizer, kind="chat", max_length=max_length, num_proc=num_proc, progress=False)
        packed = PackedDataset(split.dataset, max_length)
        return {"tokens": split.tokens, "trained": split.trained_tokens, "bins": len(packed),
                "fill": fill(packed.row_lengths, packed.bins, max_length)}

    return prepare


def prepare_trl(dataset, tokenizer, max_length: int, num_proc: int) -> Callable[[], dict]:
    """Return a call of SFTTrainer's own preparation; the trainer around it is made beforehand, on four rows."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1))
    args = SFTConfig(output_dir=tempfile.mkdtemp(), assistant_only_loss=True, packing=True, packing_strategy="bfd",
                     max_length=max_length, dataset_num_proc=num_proc, report_to="none", use_cpu=True, bf16=False,
                     shuffle_dataset=False)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset.select(range(4)), processing_class=tokenizer)

    def prepare() -> dict:
        packed = trainer._prepare_dataset(dataset, tokenizer, args, True, None, "train")
        return {"packed": packed}

    return prepare


def count_trl(packed, max_length: int) -> dict:
    """Return the figures of a set that TRL packed; not part of what is timed."""
    tokens = trained = 0
    for batch in packed.select_columns(["labels"]).with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens, trained = tokens + len(labels), trained + int((labels != -100).sum())
    return {"tokens": tokens, "trained": trained, "bins": len(packed), "fill": tokens / (len(packed) * max_length)}


def measure(side: str, folder: Path, max_length: int, num_proc: int) -> dict:
    """Prepare the rows in `folder` once and return the figures."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()  # a second round must not find the first one's work
    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(str(folder / "rows"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prepare = {"supertrainer": prepare_supertrainer, "trl": prepare_trl}[side](dataset, tokenizer, max_length, num_proc)
    with TreeMemory() as memory:
        started, spent = time.perf_counter(), sum(os.times()[:4])
        found = prepare()
        seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - spent
    if side == "trl":
        found = count_trl(found["packed"], max_length)
    return {**found, "side": side, "seconds": seconds, "cpu_seconds": cpu_seconds,
            "rows_per_second": len(dataset) / seconds, "mb": memory.added}


def report(rounds: list[dict], options: argparse.Namespace, tokenizer: str) -> str:
    """Return the table, with medians over the rounds, in Markdown."""
    def median(side: str, key: str) -> float:
        return statistics.median(found[key] for found in rounds if found["side"] == side)

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in
                         ("supertrainer", "trl", "transformers", "datasets", "tokenizers", "pyarrow"))
    lines = [f"# Preparing {options.rows:,} chat rows", "",
             f"{date.today()}, {platform.system()} {platform.machine()}, {options.num_proc} processes on "
             f"{os.cpu_count()} cores, Python {platform.python_version()}. {versions}.", "",
             f"Template, tokens, loss mask, cut to {options.max_length:,} tokens, packing; tokenizer: {tokenizer}; seed "
             f"{options.seed}. Medians of {options.rounds} interleaved rounds, each in a fresh process. Memory: the peak "
             "of the process tree above its start, shared pages once.", "",
             "| | rows/s | seconds (all rounds) | CPU seconds | peak memory, MB | tokens | trained tokens | bins | filled |",
             "|---|---|---|---|---|---|---|---|---|"]
    for side in SIDES:
        seconds = ", ".join(f"{found['seconds']:.1f}" for found in rounds if found["side"] == side)
        lines.append(f"| {side} | {median(side, 'rows_per_second'):,.0f} | {seconds} | {median(side, 'cpu_seconds'):.1f} | "
                     f"{median(side, 'mb'):,.0f} | "
                     f"{median(side, 'tokens'):,.0f} | {median(side, 'trained'):,.0f} | {median(side, 'bins'):,.0f} | "
                     f"{median(side, 'fill'):.2%} |")
    speed = median("supertrainer", "rows_per_second") / median("trl", "rows_per_second")
    memory = median("supertrainer", "mb") / max(median("trl", "mb"), 1e-9)
    bins = median("supertrainer", "bins") / median("trl", "bins")
    lines += ["", f"supertrainer / TRL: {speed:.2f} x the rows per second, {memory:.2f} x the memory, {bins:.3f} x the bins."]
    return "\n".join(lines) + "\n"


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--num-proc", type=int, default=cores, help="default: all cores")
    parser.add_argument("--tokenizer", choices=("auto", "smollm2", "local"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file too")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, folder = options.measure
        print(json.dumps(measure(side, Path(folder), options.max_length, options.num_proc)))
        return

    import datasets

    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = build_rows(options.rows, options.seed)
        tokenizer = build_tokenizer(options.tokenizer, rows)
        tokenizer.save_pretrained(folder / "tokenizer")
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
        del rows
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                command = [sys.executable, __file__, "--measure", side, name, "--max-length", str(options.max_length),
                           "--num-proc", str(options.num_proc)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {side}: {rounds[-1]['seconds']:.1f} s", file=sys.stderr)
    label = f"{tokenizer.name_or_path.rpartition('/')[2] or 'byte-level BPE trained on the rows'} ({len(tokenizer):,} tokens)"
    table = report(rounds, options, label)
    print(table)
    if options.output:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
