"""The hf engine beside plain `model.generate` with left padding, and beside transformers' continuous batching.

The same weights, prompts, number type and threads; conversation in, text out, so that templates, tokenising and decoding count
for both. Interleaved, one after the other in each repeat; the order changes from repeat to repeat; medians of the ratios.

    OMP_NUM_THREADS=1 python benchmarks/engine_hf.py --output benchmarks/results/engine_hf.md
"""

import argparse
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its kernels.py would stand before the package

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig  # noqa: E402

from supertrainer.inference.base import ModelSpec  # noqa: E402
from supertrainer.inference.engines.hf import HFEngine  # noqa: E402

SUBJECTS = ("textwrap.dedent", "os.path.join", "json.dumps", "itertools.chain", "re.sub", "random.shuffle", "math.gcd", "zip",
            "collections.Counter", "functools.lru_cache", "pathlib.Path.glob", "str.partition", "heapq.merge", "bisect.insort",
            "statistics.median", "contextlib.suppress")
NAMES = {"engine": "hf engine", "plain": "plain generate", "continuous": "continuous batching"}


def conversations(count: int) -> list[list[dict]]:
    """Questions of different lengths."""
    more = ("", " Answer in one sentence.", " Show one example and say in a few words when it is of use and when it is not.")
    return [[{"role": "user", "content": f"What does {name} do in Python?{more[number % 3]}"}]
            for number, name in enumerate(SUBJECTS[:count])]


def plain_twin(engine: HFEngine) -> torch.nn.Module:
    """The same weights in an untouched model of transformers."""
    config = type(engine.model.config).from_dict(engine.model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    twin.load_state_dict(engine.model.state_dict())
    return twin


class Ways:
    """Three ways from conversations to texts."""

    def __init__(self, engine: HFEngine, new: int) -> None:
        self.engine_, self.model, self.tokenizer, self.new = engine, plain_twin(engine), engine.tokenizer, new
        self.paged: torch.nn.Module | None = None  # it changes its model's attention, so it gets one of its own
        self.stops, self.pad = engine.generator.stop_ids, engine.generator.pad_token_id

    def prompts(self, turns: list[list[dict]]) -> list[str]:
        return [self.tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False) for own in turns]

    def engine(self, turns: list[list[dict]]) -> list[list[int]]:
        return [list(one.token_ids) for one in self.engine_.generate(turns, {"max_new_tokens": self.new})]

    def plain(self, turns: list[list[dict]]) -> list[list[int]]:
        inputs = self.tokenizer(self.prompts(turns), padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            made = self.model.generate(**inputs, max_new_tokens=self.new, do_sample=False, eos_token_id=self.stops,
                                       pad_token_id=self.pad)[:, inputs["input_ids"].shape[1]:].tolist()
        self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [cut(row, self.stops) for row in made]

    def continuous(self, turns: list[list[dict]]) -> list[list[int]]:
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.prompts(turns)]
        self.paged = self.paged or plain_twin(self.engine_)
        # without limits it takes nine tenths of the machine's memory for its cache
        limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=1024, max_requests_per_batch=max(2, len(ids)))
        config = GenerationConfig(max_new_tokens=self.new, do_sample=False, eos_token_id=self.stops, pad_token_id=self.pad)
        with torch.no_grad():
            made = self.paged.generate_batch(inputs=ids, generation_config=config, continuous_batching_config=limits)
        rows = [list(made[key].generated_tokens) for key in sorted(made, key=lambda name: int(str(name).split("_")[-1]))]
        self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [cut(row, self.stops) for row in rows]


def cut(row: list[int], stops: list[int]) -> list[int]:
    """The row up to its first stop."""
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def measure(ways: Ways, count: int, repeats: int, names: list[str]) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list]]:
    """Return wall and processor seconds of each way and repeat, and the answers; one round to warm up."""
    turns, times, answers = conversations(count), {name: [] for name in names}, {}
    for name in names:
        answers[name] = getattr(ways, name)(turns)
    for repeat in range(repeats):
        for name in names if repeat % 2 else reversed(names):
            wall, cpu = time.perf_counter(), time.process_time()
            getattr(ways, name)(turns)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times, answers


def works(ways: Ways, name: str) -> str:
    """Return why a way does not run here; empty if it does."""
    try:
        getattr(ways, name)(conversations(2))
    except Exception as error:  # whatever it is, it is what the table says
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def table(ways: Ways, requests: list[int], repeats: int, continuous: bool) -> str:
    """Measure and return the report's lines."""
    why = ""
    names = ["engine", "plain"] + (["continuous"] if continuous and not (why := works(ways, "continuous")) else [])
    lines = ["| requests at once | way | tokens/s | wall s | processor s | wall, against plain | processor, against plain | same tokens |",
             "|---|---|---|---|---|---|---|---|"]
    for count in requests:
        times, answers = measure(ways, count, repeats, names)
        for name in names:
            tokens = sum(map(len, answers[name]))
            wall, cpu = (statistics.median(pair[kind] for pair in times[name]) for kind in (0, 1))
            ratios = [statistics.median(own[kind] / base[kind] for own, base in zip(times[name], times["plain"], strict=True))
                      for kind in (0, 1)]
            same = sum(a == b for a, b in zip(answers[name], answers["plain"], strict=True))
            lines.append(f"| {count} | {NAMES[name]} | {tokens / wall:.1f} | {wall:.2f} | {cpu:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} | "
                         f"{same} of {count} |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", f"Continuous batching does not run here: {why}" if why else ""]).rstrip() + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--continuous", action="store_true", help="measure transformers' continuous batching too")
    options = parser.parse_args()
    engine = HFEngine.open(ModelSpec(options.model, dtype="float32", device="cpu"), batch_size=16)
    text = table(Ways(engine, options.new), options.requests, options.repeats, options.continuous)
    head = (f"# The hf engine beside plain generate\n\n{options.model}, float32, {torch.get_num_threads()} thread(s), at most "
            f"{options.new} new tokens, greedy, one warm-up and {options.repeats} repeats, interleaved; medians. Conversations in, "
            f"texts out. A ratio below 1 is faster than plain `model.generate` with left padding.\n\n"
            f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, "
            f"{platform.machine()}.\n\n")
    print(head + text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(head + text)


if __name__ == "__main__":
    main()
