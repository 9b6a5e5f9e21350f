"""The configuration: composition as typed, all errors at once, modes that act, a user's own tree, the strict dict."""

import copy
import dataclasses
import json
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from supertrainer.config import LockedConfig, MissingKey, StrictDict, compose, options
from supertrainer.config.arguments import dataclass_fields, quantization_arguments
from supertrainer.config.composition import normalise
from supertrainer.runtime import UserError

EXPERIMENTS = ("train_bert", "train_llm", "train_mllm")


def problems(*words, **kwargs) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        compose(*words, **kwargs)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("mode", ["full", "toy", "sanity_check"])
def test_every_experiment_composes_in_every_mode(experiment, mode):
    cfg = compose(experiment, f"mode={mode}")
    assert cfg.mode == mode and cfg.experiment == experiment
    assert compose("train", f"+experiment={experiment}", f"mode={mode}") == cfg
    assert compose("train", f"experiment={experiment}", f"+mode={mode}") == cfg


def test_every_option_of_the_tree_composes():
    family = {"train_bert": "bert", "train_llm": "llm", "train_mllm": "mllm"}
    for experiment, prefix in family.items():
        for group in ("model", "trainer"):
            for option in options(group):
                if option.startswith(f"{prefix}/"):
                    assert compose(experiment, f"{group}={option}").family == prefix


def test_values_win_over_modes_and_modes_over_experiments():
    assert compose("train_bert", "mode=toy").dataset.limit.train == 600
    assert compose("train_bert", "mode=toy", "dataset.limit.train=9").dataset.limit.train == 9
    cfg = compose("train_bert", "mode=toy", "trainer.training_kwargs.max_steps=7", "trainer.training_kwargs.num_train_epochs=10")
    assert (cfg.trainer.training_kwargs.max_steps, cfg.trainer.training_kwargs.num_train_epochs) == (7, 10)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_sanity_check_leaves_nothing_that_needs_an_evaluation(experiment):
    cfg = compose(experiment, "mode=sanity_check")
    training = cfg.trainer.training_kwargs
    assert training.max_steps == 2 and cfg.dataset.limit.train <= 32
    assert (training.eval_strategy, training.save_strategy, training.report_to) == ("no", "no", "none")
    assert not training.load_best_model_at_end and cfg.trainer.early_stopping is None and not cfg.benchmark.evaluate


def test_shared_building_blocks_as_typed():
    cfg = compose("train_mllm", "trainer/common/model_kwargs@trainer.model_kwargs=sdpa")
    assert cfg.trainer.model_kwargs.attn_implementation == "sdpa"
    cfg = compose("train_llm", "trainer/common/bitsandbytes_kwargs@trainer.bitsandbytes_kwargs=nf4")
    assert cfg.trainer.bitsandbytes_kwargs.load_in_4bit is True


def test_arguments_of_other_libraries_can_be_set_without_a_plus():
    cfg = compose("train_bert", "trainer.training_kwargs.adam_beta2=0.98", "trainer.training_kwargs.optim=adamw_torch")
    assert cfg.trainer.training_kwargs.adam_beta2 == 0.98
    assert compose("train_llm", "model.lora.use_rslora=true").model.lora.use_rslora is True


def test_one_override_takes_another_model_or_other_data():
    cfg = compose("train_mllm", "model.name=HuggingFaceTB/SmolVLM-256M-Instruct")
    assert cfg.model.name == "HuggingFaceTB/SmolVLM-256M-Instruct" and not cfg.model.config
    assert compose("train_bert", "model=minilm").model.name == "minilm"
    assert compose("train_llm", "model=tiny_llama").model.name == "tiny_llama"
    cfg = compose("train_bert", "dataset.path=rows.jsonl")
    assert cfg.dataset.path == "rows.jsonl" and cfg.dataset.name is None
    assert compose("train_bert", "dataset.path=null").dataset.name == "python_stdlib_modules"


@pytest.mark.parametrize(("words", "said"), [
    (["train_brt"], "experiment=train_brt: no such experiment. Did you mean 'train_bert'?"),
    (["train_bert", "mode=toyy"], "mode=toyy: no such mode. Did you mean 'toy'?"),
    (["train_bert", "trainer.training_kwargs.lerning_rate=1"],
     "trainer.training_kwargs.lerning_rate: no such key. Did you mean 'learning_rate'?"),
    (["train_bert", "trainer.training_kwargs.learning_rate=abc"],
     "trainer.training_kwargs.learning_rate: must be a number, but is the text 'abc'."),
    (["train_bert", "trainer.training_kwargs.learning_rate=-1"], "must be a number greater than 0, but is -1"),
    (["train_bert", "trainer.training_kwargs.eval_strategy=epochs"], "Did you mean 'epoch'?"),
    (["train_bert", "trainer.training_kwargs.output_dir=x"], "set run.dir instead"),
    (["train_bert", "trainer.training_kwargs.packing=true"], "set dataset.batching=packed instead"),
    (["train_bert", "datset.max_length=3"], "datset: no such key. Did you mean 'dataset'?"),
    (["train_bert", "dataset.max_lenth=3"], "dataset.max_lenth: no such key. Did you mean 'max_length'?"),
    (["train_bert", "dataset.max_length=long"], "dataset.max_length: must be a whole number"),
    (["train_bert", "dataset.eval_fraction=1.5"], "less than 1"),
    (["train_bert", "model=smollm2"], "is for the family llm, but the experiment train_bert is for bert"),
    (["train_bert", "trainer.name=sft"], "use trainer.name=classification"),
    (["train_bert", "dataset.name=null"], "exactly one of dataset.name"),
    (["train_llm", "trainer.class_weights=balanced"], "only the family bert has classes"),
    (["train_bert", "trainer.bitsandbytes_kwargs.load_in_4bit=true"], "set model.lora"),
    (["train_llm", "trainer.bitsandbytes_kwargs.load_in_4bits=true"], "Did you mean 'load_in_4bit'?"),
    (["train_llm", "model.lora.lora_alfa=8"], "Did you mean 'lora_alpha'?"),
    (["train_bert", "trainer.model_kwargs.dtype=float61"], "Did you mean 'float16'?"),
    (["train_bert", "trainer.early_stopping={patience: 2, threshold: 0.0}", "trainer.training_kwargs.eval_strategy=no",
      "trainer.training_kwargs.load_best_model_at_end=false"], "trainer.early_stopping: needs"),
    (["train_bert", "+dataset._target_=os.system"], "refused"),
    (["train_bert", "nonsense"], "not an override"),
    (["train_bert", "~dataset.nothing"], "cannot be deleted"),
    (["train_bert", "seed=[1"], "seed=[1: the value cannot be read"),
    (["train", "seed=1"], "experiment: required"),
    (["infer"], "model.path: required"),
    (["infer", "model.path=x", "sampling.temperatur=1"], "Did you mean 'temperature'?"),
])
def test_what_is_wrong_is_said_with_the_fix(words, said):
    found = problems(*words)
    assert any(said in problem for problem in found), found


def test_everything_wrong_is_said_at_once():
    found = problems("train_bert", "trainer.training_kwargs.lerning_rate=1", "trainer.training_kwargs.weight_decay=x",
                     "dataset.eval_fraction=2", "datset.path=x")
    assert len(found) == 4, found
    assert len(problems("train_brt", "mode=toyy")) == 2
    assert len(problems("train_bert", "mode=toyy", "nonsense", "seed=[1", "datset.path=x", "seed=x")) == 5


def test_errors_write_nothing(in_tmp):
    problems("train_bert", "mode=toyy")
    assert not list(in_tmp.iterdir())


def test_a_tree_of_ones_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model" / "bert").mkdir(parents=True)
    (tmp_path / "model" / "bert" / "mine.yaml").write_text("# mine\nname: tiny_bert\nconfig: {hidden_size: 64}\n")
    (tmp_path / "experiment" / "topics.yaml").write_text(
        "# @package _global_\ndefaults:\n  - train_bert\n  - override /model: bert/mine\n  - _self_\nexperiment: topics\nseed: 7\n")
    cfg = compose("topics", config_dir=tmp_path)
    assert cfg.seed == 7 and cfg.model.config.hidden_size == 64 and cfg.experiment == "topics"
    assert compose("train_bert", "model=mine", config_dir=tmp_path).model.config.hidden_size == 64
    assert "topics" in options("experiment", tmp_path)
    (tmp_path / "mode").mkdir()
    (tmp_path / "mode" / "toy.yaml").write_text("mode: toy\n")
    assert "rename it" in problems("train_bert", config_dir=tmp_path)[0]
    assert "no such folder" in problems("train_bert", config_dir=tmp_path / "absent")[0]


def test_a_broken_file_of_ones_own_is_a_sentence(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("# @package _global_\na: [1\n")
    assert "cannot be read" in problems("broken", config_dir=tmp_path)[0]


def test_sweeps_keep_their_commas():
    words = normalise("train", ["experiment=train_bert", "model=tiny_bert,minilm", "seed=1,2"])
    assert "model=bert/tiny_bert,bert/minilm" in words and "seed=1,2" in words


def test_argument_names_equal_the_installed_classes():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments
    from trl import SFTConfig

    for real in (TrainingArguments, SFTConfig, LoraConfig):
        assert set(dataclass_fields(real.__name__)) == {f.name for f in dataclasses.fields(real) if f.init}
    BitsAndBytesConfig(**dict.fromkeys(quantization_arguments()) | {
        "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": None})


# --- the strict dict: properties over random trees -------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text("abcxyz", min_size=1, max_size=3) | st.integers(-5, 20)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)
mappings = st.dictionaries(keys, trees, max_size=5)


@given(mappings)
def test_to_dict_gives_back_what_went_in(tree):
    plain = StrictDict(tree).to_dict()
    assert plain == tree and type(plain) is dict
    assert yaml.safe_load(yaml.safe_dump(plain)) == tree


@given(mappings)
def test_copies_and_pickles_are_equal_strict_and_apart(tree):
    cfg = StrictDict({"root": tree, "list": [tree]})
    for twin in (copy.copy(cfg), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg)), cfg | {}, cfg.copy()):
        assert twin == cfg and type(twin.root) is StrictDict
        with pytest.raises(LockedConfig):
            twin.list.append(1)
        with twin.unlocked():
            twin.root["added"] = 1
        assert "added" not in cfg.root


@given(st.dictionaries(st.integers(-3, 30) | st.integers(-3, 30).map(str), st.integers(), max_size=6))
def test_integer_like_keys_answer_the_same_everywhere(tree):
    cfg = StrictDict(tree)
    for key in tree:
        for asked in (key, str(key), int(key)):
            assert asked in cfg and cfg.get(asked, "absent") == cfg[asked]
    assert 99 not in cfg and "99" not in cfg and cfg.get(99) is None


def test_the_lock_returns_on_every_exit_even_nested():
    cfg = StrictDict({"a": {"b": [1, {"c": 2}]}})
    with pytest.raises(ZeroDivisionError), cfg.unlocked():
        with cfg.a.unlocked():
            cfg.a.b.append({"d": 3})
        cfg.a.e = 1  # the outer block is still open
        taken = cfg.a.pop("b")
        raise ZeroDivisionError
    for change in (lambda: cfg.a.__setitem__("x", 1), lambda: taken.append(1), lambda: taken[2].__setitem__("d", 4)):
        with pytest.raises(LockedConfig):
            change()


def test_missing_keys_name_the_path_and_the_nearest():
    cfg = StrictDict({"trainer": {"training_kwargs": {"learning_rate": 1.0}}})
    with pytest.raises(MissingKey, match="trainer.training_kwargs.lerning_rate.*'learning_rate'"):
        _ = cfg.trainer.training_kwargs["lerning_rate"]
    with pytest.raises(KeyError):
        _ = cfg["nothing"]
    assert getattr(cfg, "nothing", None) is None and json.loads(json.dumps(cfg)) == cfg
