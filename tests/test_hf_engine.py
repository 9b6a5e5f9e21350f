"""What the hf engine tells beside its texts, given answers it scores, and adapters it changes between, against plain libraries."""

import functools
import importlib.util
import json
import math
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from supertrainer.inference.base import ModelSpec
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.engines.unsloth import UnslothEngine
from supertrainer.inference.opening import adapter_folder, base_of, open_model
from supertrainer.runtime import UserError

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
QUESTIONS = ("Hi", "What does dedent do to a text, and when is it of use?", "Why?", "Name the days of the week.", "12")


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def byte_tokenizer(**names):
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"pad_token": "<pad>", "eos_token": "<eos>", **names})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama(tokenizer, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).eval()


def gpt2(tokenizer):
    """Positions are learned and absolute: padding on the wrong side, or uncounted, would show."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=48, n_layer=2, n_head=4,
                                      initializer_range=0.3, eos_token_id=1, bos_token_id=1)).eval()


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["rotary", "absolute"])
def engine(request):
    tokenizer = byte_tokenizer()
    return HFEngine(request.param(tokenizer), tokenizer, "llm", batch_size=3)


def by_hand(model, prompt, answer):
    """Log-probabilities from one plain forward pass, no cache, no padding, float64."""
    with torch.no_grad():
        table = model(torch.tensor([[*prompt, *answer]])).logits[0].double().numpy()
    table = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return np.array([table[len(prompt) - 1 + place, token] for place, token in enumerate(answer)])


@pytest.mark.parametrize("options", [
    {}, {"repetition_penalty": 1.7}, {"do_sample": True, "temperature": 1.7, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"stop": ["e", "a"]}, {"regex": "[a-f]{3,6}"}], ids=str)
def test_log_probabilities_are_the_models_own(engine, options):
    answers = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 12, "log_probabilities": True, **options})
    for conversation, answer in zip(ask(*QUESTIONS), answers, strict=True):
        wanted = by_hand(engine.model, engine.prompt_ids(conversation), answer.token_ids)
        assert len(answer.log_probabilities) == answer.tokens == len(answer.token_ids)
        assert np.allclose(answer.log_probabilities, wanted, atol=1e-4)
        assert 0 < answer.first_token_seconds <= answer.seconds
    plain = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 12, **options})
    assert [a.token_ids for a in plain] == [a.token_ids for a in answers] and plain[0].log_probabilities is None


def test_prompt_ids_are_those_of_the_template(engine):
    for conversation in ask(*QUESTIONS):
        wanted = engine.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert engine.prompt_ids(conversation) == list(wanted)


def test_given_answers_are_scored_in_any_batch(engine, monkeypatch):
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 200, size).tolist() for size in (1, 30, 4, 17, 9, 2, 30)]
    answers = [generator.integers(5, 200, size).tolist() for size in (3, 1, 25, 0, 9, 40, 2)]
    wanted = [by_hand(engine.model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for budget in (1 << 27, 1):  # of logits: as many rows as the batch holds, then one at a time
        monkeypatch.setattr("supertrainer.inference.scoring.MOST_LOGITS", budget)
        found = engine.score(prompts, answers)
        assert all(own.dtype == np.float64 and np.allclose(own, want, atol=1e-4) for own, want in zip(found, wanted, strict=True))
    assert engine.score([], []) == []


def test_what_cannot_be_scored(engine):
    with pytest.raises(UserError, match="row 2: a prompt without tokens"):
        engine.score([[1], []], [[1], [1]])
    with pytest.raises(UserError, match="more than the 256 of this model"):
        engine.score([[1]], [[1] * 300])
    with pytest.raises(UserError, match="1 prompts for 2 answers"):
        engine.score([[1]], [[1], [2]])


@pytest.mark.parametrize("pad", ["<pad>", "<|end|>"])
def test_a_repetition_penalty_does_not_see_padding(pad):
    """With the end of turn as padding, transformers' own penalty makes short rows of a batch end later than alone."""
    tokenizer = byte_tokenizer(pad_token=pad)
    engine = HFEngine(llama(tokenizer), tokenizer, "llm", batch_size=8)
    options = {"max_new_tokens": 20, "repetition_penalty": 1.5}
    together = engine.generate(ask(*QUESTIONS), options)
    for conversation, answer in zip(ask(*QUESTIONS), together, strict=True):
        ids = torch.tensor([engine.prompt_ids(conversation)])
        plain = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                                      repetition_penalty=1.5, pad_token_id=tokenizer.pad_token_id, eos_token_id=engine.generator.stop_ids)
        assert answer.token_ids == tuple(plain[0, ids.shape[1]:].tolist())


def test_stop_texts_end_a_stream_where_they_end_an_answer(engine):
    for conversation in ask(*QUESTIONS):
        text = engine.generate([conversation], {"max_new_tokens": 30})[0].text
        for stop in {text[4:6], text[9:12], text[-1:], "never said"} - {""}:
            options = {"max_new_tokens": 30, "stop": [stop]}
            answer, = engine.generate([conversation], options)
            assert "".join(engine.stream(conversation, options)) == answer.text and stop not in answer.text


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}, {"regex": "([a-d]|[e-h]{4}|[i-z]{9,14})"}], ids=str)
@pytest.mark.parametrize("divided", [True, False], ids=["cache", "anew"])
def test_rows_that_have_ended_are_not_computed_and_the_others_answer_the_same(engine, options, divided, monkeypatch):
    if not divided:  # a cache of another kind
        monkeypatch.setattr("supertrainer.inference.generation.DynamicLayer", type("Other", (), {}))
    texts, end = ["ab" * number for number in range(16)], engine.tokenizer.convert_tokens_to_ids("<|end|>")
    forward, sizes = engine.model.forward, []

    @functools.wraps(forward)  # transformers looks which arguments it takes
    def counted(*arguments, **inputs):
        sizes.append((len(inputs["input_ids"]), inputs["input_ids"].shape[1]))
        output = forward(*arguments, **inputs)
        chance = (inputs["input_ids"][:, -1] * 7919 + inputs["position_ids"][:, -1] * 31) % 97 / 97
        output.logits[:, -1, end] += 40.0 * (chance > 0.85)  # answers end early, each at its own place
        return output

    monkeypatch.setattr(engine.model, "forward", counted)
    monkeypatch.setattr(engine, "batch_size", 16)
    options = {"max_new_tokens": 25, "log_probabilities": True, **options}
    together = engine.generate(ask(*texts), options)
    widths = [rows for rows, _ in sizes]
    assert widths == sorted(widths, reverse=True) and widths[0] == 16 and widths[-1] <= 8
    assert divided == all(new == 1 for _, new in sizes[1:])
    assert len({answer.tokens for answer in together}) > 1
    for conversation, answer in zip(ask(*texts), together, strict=True):
        alone, = engine.generate([conversation], options)
        assert alone.token_ids == answer.token_ids and alone.finish_reason == answer.finish_reason
        assert np.allclose(alone.log_probabilities, answer.log_probabilities, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- adapters

def lora(model, seed, folder, name):
    """Write an adapter with plain PEFT that changes what the model says."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
                             task_type="CAUSAL_LM", base_model_name_or_path=str(folder / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(folder / name)
    values = json.loads((folder / name / "adapter_config.json").read_text())
    (folder / name / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": str(folder / "base")}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, two adapters on it, and a run folder as training leaves it: merged model, checkpoints, configuration."""
    folder, tokenizer = tmp_path_factory.mktemp("adapters"), byte_tokenizer()
    llama(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, name in ((1, "first"), (2, "second")):
        lora(llama(tokenizer), seed, folder, name)
    run = folder / "run"
    plain_adapter(folder, "second").merge_and_unload().save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    for step, name in ((2, "first"), (10, "second")):
        (run / "checkpoints").mkdir(exist_ok=True)
        (folder / name).rename(run / "checkpoints" / f"checkpoint-{step}")
        (folder / name).symlink_to(run / "checkpoints" / f"checkpoint-{step}")
    (run / "config.yaml").write_text(f"model: {{name: {folder / 'base'}}}\n")
    return folder


def plain_adapter(folder, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return (base if name is None else peft.PeftModel.from_pretrained(base, folder / name)).eval()


def said(model, prompts):
    """Greedy tokens of plain transformers and PEFT, one by one."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0,
                             eos_token_id=[1, 4])
        found.append(tuple(out[0, ids.shape[1]:].tolist()))
    return found


def spec(path, **more):
    return ModelSpec(path, dtype="float32", device="cpu", **more)


def answers(engine, **more):
    return [one.token_ids for one in engine.generate(ask(*QUESTIONS), {"max_new_tokens": 10}, **more)]


def test_base_adapter_and_merged_of_a_run_and_of_an_adapter(folders):
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"] for turns in ask(*QUESTIONS)]
    base, second = said(plain_adapter(folders, None), prompts), said(plain_adapter(folders, "second"), prompts)
    assert base != second
    for path in (folders / "run", folders / "second"):
        for load, wanted in (("base", base), ("adapter", second), ("merged", second), ("auto", second)):
            with HFEngine.open(spec(path, load=load)) as engine:
                assert answers(engine) == wanted, (path, load)
                assert isinstance(engine.model, peft.PeftModel) == (load == "adapter" or load == "auto" and path.name == "second")
                score = engine.score(prompts[:2], wanted[:2])
                assert np.allclose(score[0], by_hand(plain_adapter(folders, None if load == "base" else "second"), prompts[0], wanted[0]),
                                   atol=1e-3)
    assert adapter_folder(folders / "run").name == "checkpoint-10" and base_of(folders / "run") == str(folders / "base")


def test_several_adapters_on_one_base_are_chosen_call_by_call(folders):
    prompts = [byte_tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
               for turns in ask(*QUESTIONS)]
    wanted = {name: said(plain_adapter(folders, name), prompts) for name in (None, "first", "second")}
    assert len(set(map(tuple, wanted.values()))) == 3
    named = {"one": str(folders / "first"), "two": str(folders / "run")}
    engine = HFEngine.open(spec(folders / "base", adapters=named))
    for name, adapter in ((None, None), ("first", "one"), ("second", "two"), (None, None), ("first", "one")):
        assert answers(engine, **({"adapter": adapter} if adapter else {})) == wanted[name]
    engine.generate(ask("Hi"), {"max_new_tokens": 2}, adapter="two")
    assert "".join(engine.stream(ask(QUESTIONS[0])[0], {"max_new_tokens": 10})) == engine.tokenizer.decode(
        wanted[None][0], skip_special_tokens=True)
    with pytest.raises(UserError, match="no adapter 'tow'.*Did you mean 'two'"):
        engine.generate(ask("Hi"), adapter="tow")
    own = HFEngine.open(spec(folders / "first", adapters={"two": str(folders / "second")}))
    assert [answers(own), answers(own, adapter="two"), answers(own)] == [wanted["first"], wanted["second"], wanted["first"]]


def test_what_cannot_be_opened_says_why(folders, tmp_path):
    for path, load, text in ((folders / "base", "adapter", "has no adapter"), (folders / "base", "base", "nothing in it tells its base"),
                             ("tiny_llama", "adapter", "has no adapter")):
        with pytest.raises(UserError, match=text):
            open_model(spec(path, load=load))
    with pytest.raises(UserError, match=r"model\.adapters\.x: .*has no adapter"):
        open_model(spec(folders / "base", adapters={"x": str(folders / "base")}))
    with pytest.raises(UserError, match="own adapter has this name"):
        open_model(spec(folders / "first", adapters={"default": str(folders / "second")}))
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-1" / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny_llama"}')
    with pytest.raises(UserError, match="made on the spot"):
        base_of(tmp_path)
    with pytest.raises(UserError, match=r"model\.load='bse' is unknown"):
        ModelSpec("x", load="bse")


def test_an_adapter_of_another_shape_is_refused(folders, tmp_path):
    tokenizer = byte_tokenizer()
    other = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2))
    (tmp_path / "base").mkdir()
    lora(other, 1, tmp_path, "wide")
    with pytest.raises(UserError, match=r"model\.adapters\.wide: .* does not fit the model"):
        open_model(spec(folders / "base", adapters={"wide": str(tmp_path / "wide")}))


# --------------------------------------------------------------------------------------------------------------- unsloth

def test_unsloth_says_what_it_lacks_and_cannot_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install unsloth" in UnslothEngine.missing()
    with pytest.raises(UserError) as caught:
        UnslothEngine.open(spec("me/model", load="merged", family="bert", adapters={"a": "b"}))
    assert all(text in str(caught.value) for text in ("model.load=merged", "several adapters", "family bert", "pip install unsloth"))


def test_unsloth_loads_and_the_rest_is_the_hf_engine(folders, monkeypatch):
    """With a stand-in for the package: it loads, and prompts, sampling and scoring are ours."""
    asked = {}

    def load_finished(path, **arguments):
        asked.update(arguments, path=path)
        return "llm", plain_adapter(folders, None), byte_tokenizer()

    monkeypatch.setattr("supertrainer.inference.engines.unsloth.load_finished", load_finished)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace())
    with UnslothEngine.open(spec(folders / "base"), batch_size=2) as engine, HFEngine.open(spec(folders / "base")) as plain:
        assert asked["engine"] == "unsloth" and asked["path"] == str(folders / "base") and engine.batch_size == 2
        assert answers(engine) == answers(plain) and engine.name == "unsloth"
        assert math.isclose(engine.score([[7]], [[8]])[0][0], plain.score([[7]], [[8]])[0][0], abs_tol=1e-5)


def test_the_benchmark_measures_both_ways_to_the_same_tokens(folders, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = importlib.util.spec_from_file_location("engine_hf", Path(__file__).parent.parent / "benchmarks" / "engine_hf.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    text = script.table(script.Ways(HFEngine.open(spec(folders / "base")), 3), [1, 2], 1, False)
    assert text.count("| plain generate |") == 2 and "| 2 of 2 |" in text


def test_a_model_in_memory_answers_with_its_adapter_and_is_not_changed():
    """A run asks the model that it has trained: for a while "after" silently equalled "before"."""
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=["a b c d e f g h"] * 8, dtype="float32")
    model = FastLLM.get_peft_model(model, r=4, target_modules="all-linear")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.5)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    engine = HFEngine(model, tokenizer, "llm")
    ids = engine.prompt_ids([{"role": "user", "content": "a b c"}])
    prompt = torch.tensor([ids])
    with torch.no_grad():
        trained = model.eval()(input_ids=prompt).logits[0, -1].log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=prompt).logits[0, -1].log_softmax(-1)
    token = int(trained.argmax())
    assert abs(float(trained[token] - base[token])) > 0.1
    assert abs(engine.score([ids], [[token]])[0][0] - float(trained[token])) < 1e-4
    told = engine.generate([[{"role": "user", "content": "a b c"}]], {"max_new_tokens": 1, "log_probabilities": True})[0]
    assert told.token_ids == (token,) and abs(told.log_probabilities[0] - float(trained[token])) < 1e-4
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trainable
