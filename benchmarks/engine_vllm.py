"""Does the vllm engine agree with `hf` in float32 on SmolLM2-135M-Instruct? Starts a server of its own and prints the answer.

    python benchmarks/engine_vllm.py --venv DIR

DIR is the environment that `python tools/vllm_server.py install --venv DIR` makes. Compared: prompts' token ids, the
log-probabilities of hf's greedy answers, greedy tokens wherever hf's margin exceeds twice the measured error, probabilities
of choices, structured answers, an adapter beside its merged model, and tokens per second at 1, 4 and 16 requests at once.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_parity import questions  # noqa: E402
from vllm_server import serving  # noqa: E402

from supertrainer import FastLLM  # noqa: E402
from supertrainer.inference.base import ModelSpec, Sampling  # noqa: E402
from supertrainer.inference.engines.hf import HFEngine  # noqa: E402
from supertrainer.inference.engines.vllm import VLLMEngine  # noqa: E402
from supertrainer.models.base import load_finished  # noqa: E402

STRUCTURES = {"regex": Sampling(regex="[0-9]{3}"), "grammar": Sampling(grammar='start: "red" | "green"'),
              "json_schema": Sampling(max_new_tokens=40, json_schema={
                  "type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False})}


def write_models(folder):
    """Write SmolLM2 in float32 and an adapter of random weights on it."""
    _, model, tokenizer = load_finished("smollm2", dtype="float32", device="cpu")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    base, _ = FastLLM.from_pretrained(str(folder / "model"), device="cpu", dtype="float32")
    adapted = FastLLM.get_peft_model(base, r=8, random_state=1, init_lora_weights=False,
                                     target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted.save_pretrained(folder / "adapter")


@torch.no_grad()
def margins_of(engine, prompts, answers):
    """Return hf's gap between its two likeliest tokens at each place of its answers."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        best = engine.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).topk(2).values
        found.append((best[:, 0] - best[:, 1]).numpy())
    return found


def compare(hf, vllm, new_tokens):
    """Print the agreement of the two engines."""
    asked = questions()
    prompts = [hf.prompt_ids(turns) for turns in asked]
    same = sum(vllm.prompt_ids(turns) == ids for turns, ids in zip(asked, prompts, strict=True))
    print(f"prompt token ids equal: {same}/{len(asked)}")
    wanted = hf.generate(asked, Sampling(max_new_tokens=new_tokens, log_probabilities=True))
    answers = [list(one.token_ids) for one in wanted]
    errors = [np.abs(a - b).max() for a, b in zip(vllm.score(prompts, answers), hf.score(prompts, answers), strict=True)]
    print(f"max |d log-probability| of {sum(map(len, answers))} scored tokens: {max(errors):.2e}")
    got = vllm.generate(asked, Sampling(max_new_tokens=new_tokens, log_probabilities=True))
    decided, near = 0, 0
    for one, two, margin in zip(wanted, got, margins_of(hf, prompts, answers), strict=True):
        for place, gap in enumerate(margin):
            if place >= len(two.token_ids) or one.token_ids[place] != two.token_ids[place]:
                assert gap <= 2 * max(errors), (place, gap)
                near += 1
                break
            decided += 1
    print(f"greedy tokens equal: {decided}, answers that part at a near tie: {near}, that part elsewhere: 0")
    told = max(np.abs(np.subtract(a.log_probabilities, b.log_probabilities)).max()
               for a, b in zip(wanted, got, strict=True) if a.token_ids == b.token_ids)
    print(f"max |d log-probability| told while generating: {told:.2e}")
    chosen = Sampling(choices=("yes", "no", "perhaps"))
    shares = max(abs(a.probabilities[key] - b.probabilities[key]) for a, b in
                 zip(hf.generate(asked[:4], chosen), vllm.generate(asked[:4], chosen), strict=True) for key in chosen.choices)
    print(f"max |d probability| of choices: {shares:.2e}")
    for name, sampling in STRUCTURES.items():
        pairs = zip(hf.generate(asked[:4], sampling), vllm.generate(asked[:4], sampling), strict=True)
        print(f"{name}: {sum(a.text == b.text for a, b in pairs)}/4 answers equal")


def main():
    """Start the server, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--adapter", action="store_true", help="start a second server, with an adapter")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        hf = HFEngine.open(ModelSpec(str(folder / "model"), dtype="float32", device="cpu"))
        model, log = str(folder / "model"), options.venv / "server.log"
        fixed = ["--max-model-len", "2048", "--max-num-seqs", "16"]
        begin = time.perf_counter()
        with serving(model, options.venv, log, fixed) as url:
            print(f"server ready after {time.perf_counter() - begin:.1f} s")
            with VLLMEngine.open(ModelSpec(model), url=url) as vllm:
                compare(hf, vllm, options.new_tokens)
                for number in (1, 4, 16):
                    start = time.perf_counter()
                    done = vllm.generate(questions()[:number], Sampling(max_new_tokens=options.new_tokens))
                    print(f"{number:>2} at once: {sum(one.tokens for one in done) / (time.perf_counter() - start):.1f} tokens/s")
        if options.adapter:
            with serving(model, options.venv, log, [*fixed, "--enable-lora", "--lora-modules", f"tuned={folder / 'adapter'}"]) as url:
                compare_adapter(folder, url)


def compare_adapter(folder, url):
    """Print the agreement of the base with an adapter on it."""
    asked, short = questions()[:6], Sampling(max_new_tokens=12)
    tuned = HFEngine.open(ModelSpec(str(folder / "adapter"), dtype="float32", device="cpu"))
    spec = ModelSpec(str(folder / "model"), adapters={"tuned": str(folder / "adapter")})
    with VLLMEngine.open(spec, url=url, served_name=str(folder / "model")) as vllm:
        wanted, got, plain = tuned.generate(asked, short), vllm.generate(asked, short, adapter="tuned"), vllm.generate(asked, short)
    other = sum(a.token_ids != b.token_ids for a, b in zip(plain, got, strict=True))
    print(f"adapter: {sum(a.token_ids == b.token_ids for a, b in zip(wanted, got, strict=True))}/6 greedy answers equal to hf's, "
          f"{other}/6 differ from the base's")
    if not other:
        raise SystemExit("the adapter changes no answer, so nothing is shown about it")


if __name__ == "__main__":
    main()
