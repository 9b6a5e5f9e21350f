"""Which architectures of the installed transformers train the same step with our patches as without: one table.

Every causal language model, vision-language model, masked language model and sequence classifier that a tiny
configuration can build (`tiny_configs`) takes one step in float32, by its own code and again with the patches of
`supertrainer.patching`: loss and gradients must be equal, and afterwards `restore()` must give its outputs back, bit for
bit. Each worker is a process of its own, so that a model that crashes or hangs costs one line.

    python benchmarks/coverage.py                                # all that benchmarks/results/coverage.json lacks
    python benchmarks/coverage.py --only 'qwen3.*' --again       # some of them once more
"""

import argparse
import copy
import dataclasses
import gc
import inspect
import json
import logging
import math
import os
import platform
import queue
import re
import resource
import select
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

LIMITS = {"parameters": 20_000_000, "cpu seconds": 20.0, "gigabytes": 6, "wall seconds": 300.0}
LOSS_LIMIT, GRADIENT_LIMIT, GRADIENT_FLOOR = 1e-5, 1e-4, 1e-6
DOUBT_FACTOR = 2.0  # times plain's own distance from float64, where float32 alone cannot say who is right
KINDS = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "vision": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
         "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"}
TITLES = {"causal": "causal language models", "vision": "vision-language models", "masked": "masked language models",
          "classifier": "sequence classifiers"}
STATES = ("equal", "differs", "patched step fails", "plain step fails", "not built", "crashed")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.md"
ROWS, LENGTH, SEED = 2, 24, 0


@dataclass
class Outcome:
    """What one architecture did.

    Attributes:
        state: one of `STATES`.
        parameters: how many it has.
        batch: what it was trained on: "text", "text and pictures", or "pictures".
        blind: why a vision-language model got text only.
        kept: kernel -> how many modules it computes; `refused`: kernel -> why, where a module stayed plain for its sake.
        loss_error: relative; `gradient_error`: the largest relative error of a gradient (see `gradient_errors`).
        restored: whether `restore()` gave the same outputs, bit for bit; `None` where plain itself repeats nothing.
    """

    name: str
    kind: str
    model: str
    state: str = "not built"
    note: str = ""
    parameters: int | None = None
    batch: str = ""
    blind: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    loss: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    restored: bool | None = None
    seconds: float = 0.0


def architectures() -> list[tuple[str, str, str]]:
    """Return (model type, kind, class name) of every architecture; one that is in two lists counts as vision-language."""
    from transformers.models.auto import modeling_auto

    seen = set(getattr(modeling_auto, KINDS["vision"]).items())
    found = []
    for kind, names in KINDS.items():
        for name, model in getattr(modeling_auto, names).items():
            model = model[0] if isinstance(model, (list, tuple)) else model
            if kind == "vision" or (name, model) not in seen:
                found.append((name, kind, model))
                seen.add((name, model))
    return found


# --- a model and its batch


def build(name: str, kind: str, model: str):
    """Return a tiny model in train mode, with weights that make every part of it matter.

    Raises:
        ValueError: it is larger than `LIMITS` allows.
    """
    import torch
    import transformers

    from benchmarks import tiny_configs

    model_class = getattr(transformers, model)
    config = tiny_configs.tiny_config(name, model_class)
    if kind == "causal" and "is_decoder" in vars(config):
        config.is_decoder = True
    config.num_labels = 3
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except (RuntimeError, NotImplementedError):  # reads a value while it is made
        parameters = 0
    if parameters > LIMITS["parameters"]:
        raise ValueError(f"{parameters / 1e6:.0f} M parameters at its smallest")
    torch.manual_seed(SEED)
    made = model_class(config).float().train()
    if hasattr(made, "set_default_language"):
        made.set_default_language(next(iter(config.languages)))
    disturb(made)
    return made


def disturb(model) -> None:
    """Move every vector and every constant matrix away from its initial value: ones and zeros hide what is left out."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.mul_(1 + 0.1 * noise.abs()).add_(0.02 * noise)
            elif not bool(parameter.isfinite().all()) or bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(0.05 * noise)


def text_batch(model, kind: str) -> dict[str, Any]:
    """Return two rows of random tokens, the second padded, with labels as `kind` has them."""
    import torch

    from benchmarks.tiny_configs import FIRST_TOKEN

    generator = torch.Generator().manual_seed(SEED)
    text = model.config.get_text_config()
    vocabulary = min(int(getattr(text, "vocab_size", 0) or 128), 128)
    low = min(FIRST_TOKEN, vocabulary // 2)
    ids = torch.randint(low, vocabulary, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    pad = getattr(text, "pad_token_id", None)
    ids = ids.masked_fill(mask == 0, pad if isinstance(pad, int) and pad >= 0 else 0)
    if kind == "classifier":
        labels = torch.tensor([0, 2])
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int):  # an encoder-decoder reads its answer there
            ids[torch.arange(ROWS), mask.sum(1) - 1] = end
    else:
        labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.4), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind == "vision":
        taken = inspect.signature(model.forward).parameters
        batch |= {"bbox": torch.zeros(ROWS, LENGTH, 4)} if "bbox" in taken else {}
        batch |= {name: torch.zeros_like(ids) for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
    return batch


def _vision_sizes(config) -> tuple[int, int, int, int]:
    """Return image size, patch size, channels and frames per patch, as the vision part of `config` names them."""
    part = next((vars(config)[name] for name in ("vision_config", "encoder", "vision_tower_config") if vars(config).get(name)), config)
    values = vars(part)
    single = [values.get(name) for name in ("image_size", "patch_size", "temporal_patch_size")]
    image, patch, frames = (value[0] if isinstance(value, (list, tuple)) else value for value in single)
    channels = next((values[name] for name in ("num_channels", "in_channels", "in_chans") if type(values.get(name)) is int), 3)
    return image or 32, patch or 8, channels, frames or 1


def pictures(model) -> Iterator[dict[str, Any]]:
    """Return the ways in which vision towers take two random pictures, as inputs of `model`, likely ones first."""
    import torch

    image, patch, channels, frames = _vision_sizes(model.config)
    side = image // patch
    generator = torch.Generator().manual_seed(SEED)
    taken = inspect.signature(model.forward).parameters
    inner = getattr(model, "model", model)
    features = getattr(inner, "get_image_features", None) or getattr(model, "get_image_features", None)
    taken = {*taken, *(inspect.signature(features).parameters if features else ())}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    single = torch.ones(ROWS, 1, dtype=torch.long)
    extras = {"image_sizes": torch.tensor([[image, image]] * ROWS), "batch_num_images": single[:, 0],
              "high_res_pixel_values": draw(ROWS, channels, image, image), "aspect_ratio_ids": single,
              "aspect_ratio_mask": single[:, None], "cross_attention_mask": single[:, None, None].expand(-1, LENGTH, 1, 1),
              "image_attention_mask": single[:, None].expand(-1, LENGTH, 1), "qformer_input_ids": single.expand(-1, 5),
              "target_sizes": torch.tensor([[side, side]] * ROWS)}
    extras = {name: value for name, value in extras.items() if name in taken}
    grid = torch.tensor([[1, side, side]] * ROWS)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
    flat = draw(ROWS * side * side, channels * frames * patch * patch)
    if "image_grid_thw" in taken:
        more = {"image_merge_sizes": torch.full((ROWS,), 2)} if "image_merge_sizes" in taken else {}
        for size in dict.fromkeys((frames, 1, 2)):
            yield {"pixel_values": draw(ROWS * side * side, channels * size * patch * patch), "image_grid_thw": grid, **more}
        yield {"pixel_values": draw(ROWS * side * side, channels, patch, patch), "image_grid_thw": grid, **more}
    if "image_grid_hw" in taken:
        yield {"pixel_values": flat, "image_grid_hw": grid[:, 1:]}
    if "spatial_shapes" in taken:
        yield {"pixel_values": flat.view(ROWS, side * side, -1), "spatial_shapes": grid[:, 1:],
               "pixel_attention_mask": torch.ones(ROWS, side * side, dtype=torch.long)}
    for name in ("image_position_ids", "pixel_position_ids"):
        if name in taken:
            yield {"pixel_values": draw(ROWS, side * side, channels * patch * patch).sigmoid(), name: places.expand(ROWS, -1, -1)}
    if "flattened_patches" in taken:
        rows = torch.cat([places.expand(ROWS, -1, -1) + 1.0, draw(ROWS, side * side, channels * patch * patch)], -1)
        yield {"flattened_patches": rows}
    if "pixel_values" in taken:
        yield {"pixel_values": draw(ROWS, channels, image, image), **extras}
        yield {"pixel_values": draw(ROWS, channels, image, image)}
        for count in (1, 2):
            yield {"pixel_values": draw(ROWS, count, channels, image, image), **extras}
            yield {"pixel_values": draw(ROWS, count, channels, image, image)}
        if "aspect_ratio_ids" in taken:
            yield {"pixel_values": draw(ROWS, 1, 1, channels, image, image), **extras}


def _image_token(config) -> int | None:
    for part in (config, config.get_text_config()):
        for name in ("image_token_id", "image_token_index", "media_placeholder_token_id", "im_patch_id",
                     "video_token_index"):
            if type(vars(part).get(name)) is int:
                return vars(part)[name]
    return None


def _feature_count(model, shown: dict[str, Any]) -> int:
    """Return how many vectors the vision tower gives for `shown`, so that as many places can be held for them."""
    import torch

    owner = next(part for part in (getattr(model, "model", None), model) if hasattr(part, "get_image_features"))
    taken = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad():
        found = owner.get_image_features(**{name: value for name, value in shown.items() if name in taken})
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


def with_pictures(model, shown: dict[str, Any]) -> dict[str, Any]:
    """Return the text batch with `shown`, and a place in the text for each vector of a picture."""
    import torch

    batch = text_batch(model, "vision")
    token = _image_token(model.config)
    taken = inspect.signature(model.forward).parameters
    if token is not None and any(hasattr(part, "get_image_features") for part in (model, getattr(model, "model", None))):
        frames = shown["pixel_values"].shape[1] if shown["pixel_values"].ndim == 5 else 1
        queries = getattr(model.config, "num_query_tokens", None)
        count = queries * frames if queries else _feature_count(model, shown) // ROWS
        held = torch.full((ROWS, count), token)
        start = vars(model.config).get("vision_start_token_id")
        if type(start) is int:
            held = torch.cat([torch.full((ROWS, 1), start), held], 1)
        batch["input_ids"] = torch.cat([held, batch["input_ids"]], 1)
        batch["attention_mask"] = torch.cat([torch.ones_like(held), batch["attention_mask"]], 1)
        batch["labels"] = torch.cat([torch.full_like(held, -100), batch["labels"]], 1)
    if "image_embeds_position_mask" in taken:
        count = model.config.latent_query_num
        batch["image_embeds_position_mask"] = (torch.arange(LENGTH) < count).long().expand(ROWS, -1)
        batch["labels"][:, :count] = -100
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in taken and token is not None:
            batch[name] = (batch["input_ids"] == token).long()
    return {**batch, **shown}


def batches(model, kind: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Return what `model` may train on, pictures first, each with its name for the table and what makes it."""
    if kind == "vision":
        for shown in pictures(model):
            yield "text and pictures", partial(with_pictures, model, shown)
    batch = text_batch(model, kind)
    yield "text", lambda: batch
    yield "text", lambda: {name: value for name, value in batch.items() if name != "attention_mask"}
    if kind == "causal":  # one codebook of sound
        yield "text", lambda: {**batch, "labels": batch["labels"].unsqueeze(-1)}
    if "inputs" in inspect.signature(model.forward).parameters:
        yield "text", lambda: {"inputs" if name == "input_ids" else name: value for name, value in batch.items()}
    if kind == "vision":
        for shown in pictures(model):
            yield "pictures", partial(dict, shown, labels=batch["labels"])


# --- one step, twice


def step(model, batch: dict[str, Any], loss_of=None) -> tuple[float, dict[str, Any]]:
    """Return the loss of one training step and the gradients by parameter name; dropout is off, chance is seeded."""
    import torch

    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
    if loss is None:
        raise ValueError("it returns no loss")
    loss.backward()
    grads = {name: weight.grad.detach().clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


def outputs(model, batch: dict[str, Any]) -> list:
    """Return every floating tensor that `model` returns for `batch` in evaluation mode."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = model(**batch)
    for module, training in modes:
        module.training = training
    values = found.values() if hasattr(found, "values") else found
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def same_bits(first: list, second: list) -> bool:
    """Return whether two lists of tensors agree in every bit of every value."""
    import torch

    return len(first) == len(second) and all(map(lambda a, b: torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), first, second))


def gradient_errors(found: dict[str, Any], own: dict[str, Any]) -> dict[str, float]:
    """Return for every parameter the norm of the difference over its gradient's norm, where that counts.

    A gradient that is zero but for rounding (the bias of a key under softmax) has no relative error worth the name: what
    is below `GRADIENT_FLOOR` of the norm of all gradients together is left out of the difference.
    """
    import torch

    if found.keys() != own.keys():
        return {name: float("inf") for name in found.keys() ^ own.keys()}
    whole = float(torch.stack([grad.double().norm() for grad in own.values()]).norm()) if own else 0.0
    errors = {}
    for name, grad in own.items():
        away = float((found[name].double() - grad.double()).norm())
        beyond = max(0.0, away - GRADIENT_FLOOR * whole) if math.isfinite(away) else math.inf
        errors[name] = beyond / max(float(grad.double().norm()), 1e-30)
    return errors


def compare(model, batch: dict[str, Any], own: tuple[float, dict], found: tuple[float, dict]) -> tuple[float, float, str]:
    """Return the relative errors of loss and gradients of `found` against `own`, and why they do not count as equal ("").

    Where float32 leaves a doubt, the same step in float64 decides: `found` must be no further from it than
    `DOUBT_FACTOR` times what `own` is (an expert that is chosen by a hair, a state that is summed up over many steps).
    """
    loss_error = abs(found[0] - own[0]) / max(abs(own[0]), 1e-6)
    errors = gradient_errors(found[1], own[1])
    gradient_error = max(errors.values(), default=0.0)
    if loss_error <= LOSS_LIMIT and gradient_error <= GRADIENT_LIMIT:
        return loss_error, gradient_error, ""
    worst = max(errors, key=errors.get) if errors else "no gradient"
    reason = f"loss {found[0]:.7g} against {own[0]:.7g}; worst gradient {worst}: {gradient_error:.1e}"
    try:
        exact = step(copy.deepcopy(model).double(), {name: value.double() if value.is_floating_point() else value
                                                     for name, value in batch.items()})
    except Exception as error:
        return loss_error, gradient_error, f"{reason} (no float64 step: {first_line(error)})"
    theirs, ours = gradient_errors(own[1], exact[1]), gradient_errors(found[1], exact[1])
    loss_right = abs(found[0] - exact[0]) <= max(DOUBT_FACTOR * abs(own[0] - exact[0]), LOSS_LIMIT * abs(exact[0]))
    right = loss_right and ours.keys() == theirs.keys() and all(
        ours[name] <= max(DOUBT_FACTOR * theirs[name], GRADIENT_LIMIT) for name in ours)
    return loss_error, gradient_error, "" if right else reason


def first_line(error: BaseException) -> str:
    """Return an error in one line, with where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


# --- one architecture


def trained(model, kind: str) -> tuple[str, dict[str, Any], tuple[float, dict], str]:
    """Return the first batch on which `model` takes a plain step, its name, the step, and why it is shown no picture.

    Raises:
        Exception: that of the text, if no batch works.
    """
    failures: dict[str, BaseException] = {}
    for name, make in batches(model, kind):
        try:
            batch = make()
            own = step(model, batch)
            if not math.isfinite(own[0]) or not own[1]:
                raise ValueError(f"loss {own[0]}, {len(own[1])} gradients")
            if name == "text and pictures" and not _sees(model, batch, own[0]):
                raise ValueError("the loss does not depend on the picture")
            blind = first_line(failures["text and pictures"]) if name == "text" and "text and pictures" in failures else ""
            return name, batch, own, blind
        except Exception as error:
            failures.setdefault(name, error)
    raise failures["text"]


def _sees(model, batch: dict[str, Any], loss: float) -> bool:
    import torch

    name = next(name for name in ("pixel_values", "flattened_patches") if name in batch)
    other = batch[name] + torch.linspace(-1, 1, batch[name].numel()).view_as(batch[name])
    return step(model, {**batch, name: other})[0] != loss


def patch(model, kind: str, batch: dict[str, Any]):
    """Patch `model` as a training run does; return the function that gives its loss."""
    from supertrainer import patching

    if hasattr(patching, "patch_model"):
        patching.patch_model(model, batch)
    if kind in ("causal", "vision"):
        patching.prove_masked_loss(model, batch)
        return patching.masked_loss
    return None


def list_patches(model, outcome: Outcome) -> None:
    """Write into `outcome` what computes how many modules, and why the others stayed plain."""
    from supertrainer.patching import patches

    served = {line.module for line in patches(model) if line.kept}
    outcome.kept = dict(Counter(line.kernel for line in patches(model) if line.kept))
    outcome.refused = {line.kernel: line.reason for line in patches(model) if not line.kept and line.module not in served}


def examine(name: str, kind: str, model_name: str, patch_with=patch) -> Outcome:
    """Build one architecture, train it plain and patched, take the patches back, and say what came out.

    Args:
        name: its model type; kind: a key of `KINDS`; model_name: its class in transformers.
        patch_with: what patches the model, as `patch` (a test puts a wrong one here).
    """
    from supertrainer.patching import patches

    outcome = Outcome(name, kind, model_name)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        model = build(name, kind, model_name)
        outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
        if time.process_time() - cpu > LIMITS["cpu seconds"]:
            raise ValueError(f"building it takes {time.process_time() - cpu:.0f} s")
        outcome.state = "plain step fails"
        outcome.batch, batch, own, outcome.blind = trained(model, kind)
        outcome.loss = own[0]
        before, repeats = outputs(model, batch), outputs(model, batch)
        outcome.state = "patched step fails"
        loss_of = patch_with(model, kind, batch)
        found = step(model, batch, loss_of)
        list_patches(model, outcome)
        patches(model).restore()
        outcome.restored = same_bits(before, outputs(model, batch)) if same_bits(before, repeats) else None
        outcome.loss_error, outcome.gradient_error, outcome.note = compare(model, batch, own, found)
        if outcome.restored is False:
            outcome.note = f"restore() does not give the outputs back. {outcome.note}"
        outcome.state = "differs" if outcome.note else "equal"
        if outcome.note and outcome.restored is not False and compare(model, batch, own, step(model, batch))[2]:
            outcome.state, outcome.note = "plain step fails", "its own step, taken twice with one seed, differs"
    except Exception as error:
        outcome.note = first_line(error)
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


# --- many of them


def serve() -> None:
    """Examine what standard input names, line by line; write one line of JSON each. The life of a worker."""
    limit = int(LIMITS["gigabytes"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is no answer
    quiet_libraries()
    for line in sys.stdin:
        outcome = examine(*json.loads(line))
        print(json.dumps(dataclasses.asdict(outcome)), file=answers, flush=True)
        gc.collect()


def quiet_libraries() -> None:
    """Leave only errors on the screen: a model that is made on the spot warns about much that is meant."""
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


class Worker:
    """A process that examines one architecture after another, and is replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def examine(self, asked: tuple[str, str, str]) -> dict[str, Any]:
        """Return what `examine` says of `asked`, as a dictionary."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        start = time.perf_counter()
        self.process.stdin.write((json.dumps(asked) + "\n").encode())
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LIMITS["wall seconds"])
        answer = self.process.stdout.readline() if ready else b""
        if answer:
            return json.loads(answer)
        self.close()
        note = f"no answer in {LIMITS['wall seconds']:.0f} s" if not ready else f"its process ended with {self.process.returncode}"
        return dataclasses.asdict(Outcome(*asked, state="crashed", note=note,
                                          seconds=round(time.perf_counter() - start, 2)))

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run(wanted: list[tuple[str, str, str]], workers: int, found: dict[str, dict], save) -> None:
    """Examine `wanted` with some workers; every outcome goes into `found` and `save()` is called."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for asked in wanted:
        waiting.put(asked)
    lock = threading.Lock()

    def work() -> None:
        worker = Worker()
        try:
            while True:
                asked = waiting.get_nowait()
                outcome = worker.examine(asked)
                with lock:
                    found[key(*asked)] = outcome
                    save()
                    print(f"{len(found)}: {outcome['kind']} {outcome['name']}: {outcome['state']} "
                          f"({outcome['seconds']:.0f} s) {outcome['note']}", flush=True)
        except queue.Empty:
            return
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def key(name: str, kind: str, *rest: str) -> str:
    """Return what an architecture is called in the JSON."""
    return f"{kind}:{name}"


# --- the table


def report(found: list[dict[str, Any]]) -> str:
    """Return totals and the table, in Markdown."""
    built = [one for one in found if one["state"] not in ("not built", "crashed")]
    plain = [one for one in built if one["state"] != "plain step fails"]
    equal = [one for one in plain if one["state"] == "equal"]
    wrong = [one for one in plain if one["state"] == "differs"]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    lines = ["# Architectures that train the same step with patches as without", "",
             f"{date.today()}, Python {platform.python_version()}, {versions}, {platform.system()} {platform.machine()}, "
             "CPU, float32. Made by `python benchmarks/coverage.py`.", "",
             f"Every model is built from its configuration's defaults, shrunk by the names of the fields, with random "
             f"weights. Equal: loss within {LOSS_LIMIT:g} (relative), every gradient within {GRADIENT_LIMIT:g} of its own norm "
             f"(beyond {GRADIENT_FLOOR:g} of the norm of all), or no further from the step in float64 than {DOUBT_FACTOR:g} "
             "times plain's own distance; and `restore()` gives the outputs back bit for bit. Not built: above "
             f"{LIMITS['parameters'] / 1e6:.0f} M parameters or {LIMITS['cpu seconds']:.0f} s of CPU, or the reason given.", "",
             "| kind | in transformers | built | plain step trains | equal with patches | of those that train | differ |",
             "|---|---|---|---|---|---|---|"]
    for kind, title in (*TITLES.items(), (None, "all")):
        counts = [sum(kind in (None, one["kind"]) for one in group) for group in (found, built, plain, equal, wrong)]
        share = f"{counts[3] / counts[2]:.1%}" if counts[2] else ""
        lines.append(f"| {title} | {counts[0]} | {counts[1]} | {counts[2]} | {counts[3]} | {share} | {counts[4]} |")
    kernels = Counter()
    for one in plain:
        kernels.update(one["kept"].keys())
    lines += ["", "Architectures in which a kernel is in use: "
              + (", ".join(f"{name} {count}" for name, count in kernels.most_common()) or "none") + ".", "",
              "| architecture | kind | parameters | state | trained on | kernels in use (modules) | loss difference | "
              "gradient difference | note |", "|---|---|---|---|---|---|---|---|---|"]
    for one in sorted(found, key=lambda one: (list(KINDS).index(one["kind"]), one["name"])):
        lines.append(_line(one))
    return "\n".join(lines) + "\n"


def _line(one: dict[str, Any]) -> str:
    figures = ["" if one[name] is None else f"{one[name]:.1e}" for name in ("loss_error", "gradient_error")]
    kept = ", ".join(f"{name} ({count})" for name, count in one["kept"].items())
    refused = "; ".join(f"{name}: {reason}" for name, reason in one["refused"].items())
    note = ". ".join(part for part in (one["note"], f"plain: {refused}" if refused else "",
                                f"no picture: {one['blind']}" if one["blind"] else "") if part).replace("|", "\\|")
    size = "" if one["parameters"] is None else f"{one['parameters']:,}"
    return (f"| {one['name']} (`{one['model']}`) | {one['kind']} | {size} | {one['state']} | {one['batch']} | {kept} | "
            f"{figures[0]} | {figures[1]} | {note} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression of model types")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind only")
    parser.add_argument("--state", choices=STATES, help="only those that came out so before; they are run again")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="at most so many")
    parser.add_argument("--again", action="store_true", help="also what the JSON has already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the Markdown file; the JSON lies beside it")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    file = options.out.with_suffix(".json")
    found = json.loads(file.read_text(encoding="utf-8"))["architectures"] if file.exists() else {}

    def save() -> None:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(outcome)}" for name, outcome in sorted(found.items()))
        text = f'{{"versions": {json.dumps(versions)}, "architectures": {{\n{lines}\n}}}}'
        file.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        file.with_suffix(".part").replace(file)

    wanted = [asked for asked in architectures()
              if re.fullmatch(options.only or ".*", asked[0]) and options.kind in (None, asked[1])
              and (not options.state or found.get(key(*asked), {}).get("state") == options.state)
              and (options.again or options.state or key(*asked) not in found)][: options.limit]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run(wanted, options.workers, found, save)
    options.out.write_text(report(list(found.values())), encoding="utf-8")
    print("\n".join(report(list(found.values())).splitlines()[:14]))


if __name__ == "__main__":
    # not this folder: its kernels.py would stand before the package of that name, which transformers asks for
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]
    main()
