"""Nothing outside changes by `import supertrainer`, by patching, or by a training run of ours, and `restore()` is exact.

Each check runs in a process of its own: a snapshot of every loaded module of transformers, peft, trl, accelerate and
torch, of torch's global state and of the environment; then our work; then the snapshot again.
"""

import json
import os
import subprocess
import sys

import pytest

SNAPSHOT = r'''
import copyreg, functools, json, logging, os, random, sys, types, warnings
import numpy, torch, transformers, peft, trl, accelerate, datasets

LIBRARIES = ("transformers", "peft", "trl", "accelerate", "torch", "datasets")


def modules():
    return {name: module for name, module in list(sys.modules.items())
            if name.split(".")[0] in LIBRARIES and isinstance(module, types.ModuleType)}


def is_ours(value):
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    value = value.fget if isinstance(value, property) else value
    owner = value if isinstance(value, (type, types.FunctionType, types.MethodType)) else type(value)
    return str(owner.__module__).split(".")[0] in ("supertrainer", "__main__")


SCALARS = (int, float, bool, str, bytes, type(None), tuple, frozenset)
keep = []  # objects that were seen stay alive, so that an id is never used twice


def identity(value):
    """What a later look must find again: plain values by value, a table also by its members, the rest by identity.

    Tables may grow (a module that is loaded later adds its own to them); what they held must stay.
    """
    if isinstance(value, SCALARS) and len(repr(value)) < 2000:
        return repr(value)
    keep.append(value)
    if type(value) is dict:
        keep.extend(value.values())
        return {"table": id(value), **{f"{type(key).__name__} {key!r}"[:300]: id(item) for key, item in list(value.items())}}
    return f"{type(value).__module__}.{type(value).__qualname__} {id(value)}"


def stays(before, after):
    if isinstance(before, dict) and isinstance(after, dict) and "table" in before:
        return all(after.get(key) == item for key, item in before.items())
    return before == after


def classes_of(module):
    return [value for value in list(vars(module).values()) if isinstance(value, type)
            and (getattr(value, "__module__", "") or "").split(".")[0] in LIBRARIES]


# What Python and torch write themselves while a module or a class is used for the first time.
UNSTABLE = {"__doc__", "__dict__", "__weakref__", "__abstractmethods__", "_abc_impl", "__annotations__", "__cached__",
            "__warningregistry__", "__static_attributes__", "__type_params__"}


def snapshot():
    found, seen = {}, set()
    for name, module in modules().items():
        for attribute, value in list(vars(module).items()):
            if attribute not in UNSTABLE:
                found[f"{name}.{attribute}"] = identity(value)
        for cls in classes_of(module):
            if cls in seen:
                continue
            seen.add(cls)
            keep.append(cls)
            for attribute, value in list(vars(cls).items()):
                if attribute not in UNSTABLE:
                    found[f"class {cls.__module__}.{cls.__qualname__}.{attribute}"] = identity(value)
    found.update({f"environment {name}": value for name, value in os.environ.items()})
    found["environment"] = sorted(os.environ)
    found.update(state())
    return found


def state():
    """torch's, Python's and numpy's global state, and the registries of transformers."""
    from transformers.activations import ACT2CLS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto
    loggers = {"table": 0} | {name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers), len(logger.filters))
               for name, logger in list(logging.root.manager.loggerDict.items()) if isinstance(logger, logging.Logger)
               and name.split(".")[0] in LIBRARIES}
    autos = {name: value for name, value in vars(modeling_auto).items() if hasattr(value, "_extra_content")}
    keep.extend([sys.excepthook, sys.displayhook, sys.stdout, sys.stderr, warnings.showwarning, warnings.formatwarning])
    return {
        "state dtype": str(torch.get_default_dtype()), "state device": str(torch.get_default_device()),
        "state threads": torch.get_num_threads(), "state interop threads": torch.get_num_interop_threads(),
        "state deterministic": torch.are_deterministic_algorithms_enabled(),
        "state deterministic warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "state precision": torch.get_float32_matmul_precision(), "state grad": torch.is_grad_enabled(),
        "state anomaly": torch.is_anomaly_enabled(), "state inference": torch.is_inference_mode_enabled(),
        "state autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "state autocast dtype": [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "state sdp": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
                      torch.backends.cuda.math_sdp_enabled()],
        "state tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "state cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled],
        "state mkldnn": torch.backends.mkldnn.enabled, "state threads variable": os.environ.get("OMP_NUM_THREADS"),
        "state random torch": hash(torch.get_rng_state().numpy().tobytes()),
        "state random numpy": hash(repr(numpy.random.get_state())),
        "state random python": hash(random.getstate()), "state gradient hooks": len(torch.utils.hooks.RemovableHandle.__mro__),
        "state module hooks": [len(getattr(torch.nn.modules.module, name)) for name in (
            "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
            "_global_module_registration_hooks", "_global_parameter_registration_hooks", "_global_buffer_registration_hooks")],
        "state pickling": sorted(str(kind) for kind in copyreg.dispatch_table),
        "state attention": sorted(map(str, ALL_ATTENTION_FUNCTIONS.valid_keys())),
        "state masks": sorted(map(str, ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())),
        "state activations": sorted(ACT2CLS), "state autos": {name: len(value._extra_content) for name, value in autos.items()},
        "state configs": len(configuration_auto.CONFIG_MAPPING._extra_content),
        "state tokenizers": len(tokenization_auto.TOKENIZER_MAPPING._extra_content),
        "state warnings": [repr(entry) for entry in warnings.filters], "state loggers": loggers,
        "state root logger": (logging.root.level, logging.root.manager.disable, [id(h) for h in logging.root.handlers]),
        "state hooks": [id(sys.excepthook), id(sys.displayhook), id(sys.stdout), id(sys.stderr), id(warnings.showwarning)],
        "state signals": [str(__import__("signal").getsignal(number)) for number in (2, 10, 12, 15)],
        "state verbosity": transformers.logging.get_verbosity(), "state path": list(sys.path), "state cwd": os.getcwd(),
        "state recursion": sys.getrecursionlimit(), "state umask": None, "state locale": str(__import__("locale").getlocale()),
    }


def told(before, after):
    if isinstance(before, dict) and isinstance(after, dict):
        return [str({key: (item, after.get(key)) for key, item in before.items() if after.get(key) != item})[:300]] * 2
    return [str(before)[:300], str(after)[:300]]


def differences(before, after):
    changed = {name: told(value, after.get(name, "gone")) for name, value in before.items()
               if not stays(value, after.get(name, "gone"))}
    for name, module in modules().items():  # a new name, in their namespace, that is ours
        for attribute, value in list(vars(module).items()):
            for item in (list(value.values()) if type(value) is dict else [value]):
                if is_ours(item):
                    changed[f"ours in {name}.{attribute}"] = ["", str(item)[:200]]
        for cls in classes_of(module):
            for attribute, value in list(vars(cls).items()):
                if is_ours(value):
                    changed[f"ours in {cls.__module__}.{cls.__qualname__}.{attribute}"] = ["", str(value)[:200]]
    return {**changed, **{name: ["absent", after[name]] for name in after
                          if name.startswith("environment ") and name not in before}}
'''

MODEL = r'''
from transformers import LlamaConfig, LlamaForCausalLM

def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))

def rows():
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone(); labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
'''


def run(code: str, **environment: str) -> dict:
    """Run `code` after the definitions above in a fresh process; return what it assigns to `result`."""
    script = f"{SNAPSHOT}\n{MODEL}\n{code}\nprint('RESULT ' + json.dumps(result))"
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


IMPORT_ALL = """
import importlib, pkgutil
import supertrainer
for module in pkgutil.walk_packages(supertrainer.__path__, "supertrainer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

TRAINING = """
import tempfile
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]",
                                   eos_token="[EOS]")

def dataset():
    return Dataset.from_list([{"input_ids": list(range(3, 15)), "labels": [-100] * 5 + list(range(8, 15)), "length": 12}] * 4)

def collate(items):
    batch = {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

def adapted():
    return get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
"""


def test_importing_the_package_alone_loads_no_library():
    code = "import sys, os; before = dict(os.environ); import supertrainer; print([name for name in (" \
           "'torch', 'transformers', 'peft', 'trl', 'numpy', 'datasets') if name in sys.modules], before == dict(os.environ))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


PATCHING = """
from supertrainer import patching
outcomes = []
for make in (tiny, adapted):
    model = make().eval()
    before = snapshot()
    own = model(**rows()).logits
    if hasattr(patching, "patch_model"):
        patching.patch_model(model, rows())
    patching.prove_masked_loss(model, rows())
    patching.masked_loss(model, rows()).backward()
    with patching.plain(model):
        plain = model(**rows()).logits
    kept = sum(patch.kept for patch in patching.patches(model))
    patching.patches(model).restore()
    restored = model(**rows()).logits
    left = [name for name, module in model.named_modules() if "forward" in vars(module)]
    outcomes.append([differences(before, snapshot()), torch.equal(own, plain), torch.equal(own, restored), kept, left])
"""

TRAINING_RUNS = """
from trl import SFTConfig, SFTTrainer
from supertrainer.trainers.base import build_trainer
from supertrainer.trainers.llm import ChatTrainer

def plain_run():
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(model=adapted(), train_dataset=dataset(), data_collator=collate, processing_class=tokenizer(), args=SFTConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, save_strategy="no", bf16=False)).train()

plain_run()  # what accelerate and transformers set up once
before = snapshot()
plain_run()
theirs = differences(before, snapshot())
before = snapshot()
model = adapted()
if hasattr(patching, "patch_model"):
    patching.patch_model(model, rows())
with tempfile.TemporaryDirectory() as folder:
    trainer = build_trainer("llm", model=model, processing_class=tokenizer(), train_dataset=dataset(), data_collator=collate,
                            output_dir=folder, training_kwargs={"max_steps": 1, "per_device_train_batch_size": 2})
    assert isinstance(trainer, ChatTrainer)
    trainer.train()
patching.patches(model).restore()
ours = differences(before, snapshot())
"""

COUNTER = "class torch.utils.hooks.RemovableHandle.next_id"  # counts every hook anyone ever registers


@pytest.fixture(scope="module")
def done() -> dict:
    """What changed by importing ours, by patching and restoring two models, and by a training run, in one process.

    The modules of others that ours load are loaded first: what these do to the process then is theirs.
    """
    needed = run(IMPORT_ALL + "result = [name for name in sys.modules if name.split('.')[0] not in ('supertrainer', '__main__')]")
    return run(f"""
import contextlib, importlib
for name in {needed!r}:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
tiny()(**rows()).loss.backward()  # what torch and transformers set up on their first use is theirs
before = snapshot()
{IMPORT_ALL}
imported = [len(before), sum(name.startswith("supertrainer.") for name in sys.modules), differences(before, snapshot())]
{TRAINING}{PATCHING}{TRAINING_RUNS}
result = dict(imported=imported, patched=outcomes, theirs=theirs, ours=ours, steps=trainer.state.global_step)
""")


def test_importing_every_module_of_ours_changes_nothing(done):
    seen, modules, changed = done["imported"]
    assert seen > 50_000 and modules > 80  # the snapshot is not an empty one, and ours are loaded
    assert changed == {}


@pytest.mark.parametrize("which", [0, 1], ids=["full", "adapter"])
def test_patching_and_restoring_changes_nothing_and_gives_the_bits_back(done, which):
    changed, plain_equal, restored_equal, kept, left = done["patched"][which]
    assert plain_equal and restored_equal and kept >= 1 and left == []
    assert set(changed) <= {COUNTER}, changed


def test_a_training_run_of_ours_changes_no_more_than_one_of_trl(done):
    assert done["steps"] == 1
    seeded = {"state random torch", "state random numpy", "state random python"}  # a trainer sets the seed that it is given
    assert set(done["ours"]) <= set(done["theirs"]) | seeded | {COUNTER}, done["ours"]


CHANGES = {
    "a method of a class": "transformers.LlamaForCausalLM.forward = lambda self, **inputs: None",
    "a method that did not exist": "transformers.PreTrainedModel.faster = lambda self: self",
    "a class of ours in a module of theirs": "transformers.utils.proof = supertrainer.check.Check",
    "a function of a module": "torch.nn.functional.silu = lambda x, inplace=False: x",
    "a function in a table": "torch.overrides.get_default_nowrap_functions = print",
    "an environment variable": "os.environ['TOKENIZERS_PARALLELISM_NEW'] = '1'",
    "a registered attention": "from transformers import AttentionInterface; AttentionInterface.register('ours', print)",
    "an activation": "from transformers.activations import ACT2CLS; ACT2CLS['ours'] = torch.nn.SiLU",
    "an entry replaced in a table": "from transformers.activations import ACT2CLS; ACT2CLS['gelu'] = torch.nn.SiLU",
    "an automatic class": "transformers.AutoConfig.register('ours', type('C', (transformers.PreTrainedConfig,), {'model_type': 'ours'}))",
    "the default type": "torch.set_default_dtype(torch.float64)",
    "the precision of matrix products": "torch.set_float32_matmul_precision('high')",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "the number of threads": "torch.set_num_threads(3)",
    "gradients switched off": "torch.set_grad_enabled(False)",
    "a random number of torch": "torch.rand(1)",
    "a random number of Python": "random.random()",
    "a filter of warnings": "warnings.simplefilter('ignore')",
    "a level of a logger": "transformers.logging.set_verbosity_error()",
    "a global hook": "torch.nn.modules.module.register_module_forward_hook(lambda *args: None)",
    "an adapter's method": "peft.tuners.lora.Linear.forward = print",
    "a trainer's method": "trl.SFTTrainer.compute_loss = print",
}


def test_each_change_outside_would_be_found():
    """The negative control: the snapshot sees one change of every sort, and nothing where there is none."""
    found = run(f"""
import supertrainer.check
tiny()(**rows()).loss.backward()
trl.SFTTrainer, peft.tuners.lora.Linear, transformers.LlamaForCausalLM  # loaded when they are asked for
before = snapshot()
result = dict(nothing=sorted(differences(before, snapshot())))
for name, change in {CHANGES!r}.items():
    exec(change)
    after = snapshot()
    result[name] = sorted(differences(before, after))
    before = after
""")
    assert found.pop("nothing") == []
    assert found.keys() == CHANGES.keys()
    assert [name for name, changed in found.items() if not changed] == []
    assert "ours in transformers.utils.proof" in found["a class of ours in a module of theirs"]
