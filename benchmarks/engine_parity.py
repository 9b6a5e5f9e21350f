"""Do the engines agree with `hf` in float32 on real models? Writes benchmarks/results/engine_parity.md.

    python benchmarks/engine_parity.py --engines onnx openvino "openvino engine.precision=bf16" llama_cpp

An engine is named as in the registry, with overrides of `supertrainer infer` behind it. SmolLM2-135M-Instruct answers
questions about Python's standard library: the prompts' token ids must be those of hf; the log-probabilities of hf's
answers are held against its own; greedy tokens must be equal wherever hf's margin between its two likeliest tokens exceeds
twice the measured error. MiniLM with a fixed random head classifies the library's documentation.
"""

import argparse
import inspect
import json
import tempfile
import textwrap
import time
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch

from supertrainer import FastBERT, compose
from supertrainer.inference.base import Sampling
from supertrainer.models.base import load_finished
from supertrainer.run.answering import open_engine
from supertrainer.runtime import UserError

RESULTS = Path(__file__).parent / "results" / "engine_parity.md"
NAMES = ("textwrap.dedent", "os.path.join", "json.dumps", "random.shuffle", "shutil.copytree", "math.hypot", "re.sub", "time.sleep",
         "glob.glob", "base64.b64encode", "hashlib.sha256", "heapq.heappush", "bisect.insort", "itertools.chain", "difflib.unified_diff",
         "statistics.median")
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "xllamacpp", "vllm")


def questions():
    """Conversations of different lengths about functions of the standard library."""
    return [[{"role": "user", "content": f"What does `{name}` do?" + " Answer in one short sentence." * (number % 3)}]
            for number, name in enumerate(NAMES)]


def documents():
    """The documentation of the same functions, cut to different lengths."""
    found = []
    for number, name in enumerate(NAMES):
        module, _, attribute = name.rpartition(".")
        text = " ".join((inspect.getdoc(getattr(import_module(module), attribute)) or name).split())
        found.append(textwrap.shorten(text, 40 + 60 * (number % 8)))
    return found


def language_model():
    """Return SmolLM2 as a folder of float32 weights; the packaged GGUF file itself would be run in its 4 bits by llama.cpp."""
    folder = Path(tempfile.gettempdir()) / "supertrainer-benchmark" / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        _, model, tokenizer = load_finished("smollm2", dtype="float32", device="cpu")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def opened(name, path):
    """Open an engine by its name and overrides; return it and the seconds this took."""
    kind, *overrides = name.split()
    fixed = ["model_kwargs.dtype=float32", "model_kwargs.device=cpu"] if kind == "hf" else []
    start = time.perf_counter()
    _, engine = open_engine(compose("infer", f"model.path={path}", f"engine={kind}", *fixed, *overrides))
    return engine, time.perf_counter() - start


@torch.no_grad()
def reference(new_tokens):
    """Return hf's prompts, greedy answers, their log-probabilities and its margin at each place."""
    with opened("hf", language_model())[0] as hf:
        prompts = [hf.prompt_ids(turns) for turns in questions()]
        answers = [list(one.token_ids) for one in hf.generate(questions(), Sampling(max_new_tokens=new_tokens))]
        scores, margins = hf.score(prompts, answers), []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = hf.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            best = logits.log_softmax(-1).topk(2).values
            margins.append((best[:, 0] - best[:, 1]).numpy())
    return prompts, answers, scores, margins


def parting(own, answer):
    """Return the first place where two lists of tokens differ, or `None`."""
    place = next((place for place, (a, b) in enumerate(zip(own, answer, strict=False)) if a != b), min(len(own), len(answer)))
    return None if place == len(own) == len(answer) else place


def error_of(engine, wanted):
    """Return the largest error of a log-probability of hf's answers, and how many were compared."""
    prompts, answers, scores, _ = wanted
    try:
        got = engine.score(prompts, answers)
    except UserError:  # it cannot score a given answer: its own answers, as far as they are the same
        own = engine.generate(questions(), Sampling(max_new_tokens=max(map(len, answers)), log_probabilities=True))
        got = [np.array(one.log_probabilities[: parting(one.token_ids, answer)])
               for one, answer in zip(own, answers, strict=True)]
    errors = np.concatenate([np.abs(a - b[: len(a)]) for a, b in zip(got, scores, strict=True)])
    return float(errors.max()), len(errors)


def compare_language_model(name, wanted, new_tokens):
    """Return one row of the table for SmolLM2."""
    prompts, answers, _, margins = wanted
    engine, seconds = opened(name, language_model())
    with engine:
        same_prompts = sum(engine.prompt_ids(turns) == prompt for turns, prompt in zip(questions(), prompts, strict=True))
        error, compared = error_of(engine, wanted)
        own = engine.generate(questions(), Sampling(max_new_tokens=new_tokens))
        limit = engine.log_probability_limit
    equal, above, least = 0, 0, []
    for one, answer, margin in zip(own, answers, margins, strict=True):
        place = parting(one.token_ids, answer)
        equal += place is None
        if place is not None:
            least.append(float(margin[place]))
            above += margin[place] > 2 * error
    parted = f"; margins where they part {', '.join(f'{value:.2g}' for value in least)}" if least else ""
    return {"engine": name, "opened in s": f"{seconds:.1f}", "same prompt ids": f"{same_prompts}/{len(prompts)}",
            "max error of a log-probability": f"{error:.2g} of {compared}", "limit": f"{limit:.2g}",
            "equal greedy answers": f"{equal}/{len(answers)}{parted}", "disagreements above the margin": str(above),
            "holds": "yes" if same_prompts == len(prompts) and error <= limit and not above else "NO"}


def compare_encoder(name, folder, wanted):
    """Return one row of the table for MiniLM, or `None` where the engine runs no encoders."""
    try:
        engine, seconds = opened(name, folder)
    except UserError as error:
        print(f"{name}: {error}")
        return None
    with engine:
        got = engine.classify(documents())
    error = max(abs(a.probabilities[label] - value) for a, b in zip(got, wanted, strict=True) for label, value in b.probabilities.items())
    same = sum(a.label == b.label for a, b in zip(got, wanted, strict=True))
    return {"engine": name, "opened in s": f"{seconds:.1f}", "same labels": f"{same}/{len(got)}",
            "max error of a class probability": f"{error:.2g}", "to 1e-4": "yes" if error < 1e-4 else "no"}


def table(rows):
    """Return rows of like keys as a table in Markdown."""
    heads = list(rows[0])
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads),
                      *("| " + " | ".join(row[head] for head in heads) + " |" for row in rows)])


def versions():
    """Return the versions of what computed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main():
    """Compare and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    wanted = reference(arguments.new_tokens)
    chat = []
    for name in arguments.engines:
        chat.append(compare_language_model(name, wanted, arguments.new_tokens))
        print(json.dumps(chat[-1]))
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/minilm"
        model, tokenizer = FastBERT.from_pretrained("minilm", num_labels=4, dtype="float32", device="cpu", seed=0)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.classifier.weight, std=0.5)  # a head whose classes differ
        model.save_pretrained(folder), tokenizer.save_pretrained(folder)
        with opened("hf", folder)[0] as hf:
            labels = hf.classify(documents())
        encoders = [row for name in arguments.engines if (row := compare_encoder(name, folder, labels))]
    lengths = [len(prompt) for prompt in wanted[0]]
    arguments.output.write_text(
        f"# Engines against hf in float32\n\nMade by `benchmarks/engine_parity.py`; {versions()}; {torch.get_num_threads()} thread(s) of torch. "
        "Times to open are those of a shared machine, a graph or file made before being reused.\n\n"
        f"## SmolLM2-135M-Instruct\n{len(wanted[0])} prompts of {min(lengths)} to {max(lengths)} tokens, up to {arguments.new_tokens} new "
        f"tokens each, in batches with padding on the left. Two greedy answers may part where the two likeliest tokens are nearer to each "
        f"other than twice the error.\n\n{table(chat)}\n" + (f"\n## all-MiniLM-L6-v2 with a fixed random head of 4 classes\n{len(labels)} "
        f"texts, in batches with padding.\n\n{table(encoders)}\n" if encoders else ""))
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
