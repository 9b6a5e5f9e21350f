"""The engines onnx, openvino and tensorrt against plain transformers: one graph for all sizes, padding, cache, structure."""

import copy
import json
import math
import shutil
import types

import numpy as np
import onnxruntime
import openvino
import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from supertrainer.check import CheckFailed
from supertrainer.inference import graph_cache
from supertrainer.inference.base import ModelSpec, Sampling
from supertrainer.inference.engines import openvino as openvino_engine
from supertrainer.inference.engines import tensorrt, tensorrt_llm
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.engines.onnx import ONNXEngine
from supertrainer.inference.engines.openvino import OpenVINOEngine
from supertrainer.inference.graph_cache import graph_of
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.runtime import UserError

ENGINES = (ONNXEngine, OpenVINOEngine)
LINES = ["What does dedent do to a text?", "Why is it so? It is not.", "Name the days of the week, please.", "12 and 30 and 4"] * 5
QUESTIONS = ["Hi", "What does dedent do to a text?", "Why?", "Name the days of the week, please. All of them."]
TEXTS = ["dedent", "What does dedent do to a text? It is so.", "Why is it so?", "days of the week"]


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoder(kind, folder, **changes):
    """A random decoder with large weights, so that its choices are clear ones."""
    tokenizer = train_byte_bpe(LINES, vocab_size=320)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
             "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma": (Gemma3TextConfig, Gemma3ForCausalLM)}[kind]
    torch.manual_seed(0)
    return save(folder, model(config(**{**shape, **changes})).eval(), tokenizer), tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return decoder("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def engine(request, chat):
    with request.param.open(ModelSpec(chat[0]), batch_size=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(chat):
    return LlamaForCausalLM.from_pretrained(chat[0], dtype=torch.float32).eval()


@torch.no_grad()
def alone(model, ids, new):
    """Greedy tokens after one unpadded prompt and their log-probabilities, by forward passes without a cache."""
    ids, tokens, told = list(ids), [], []
    for _ in range(new):
        values = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        tokens.append(int(values.argmax()))
        told.append(float(values[tokens[-1]]))
        ids.append(tokens[-1])
    return tokens, told


def test_greedy_tokens_and_log_probabilities_are_the_models(engine, plain):
    answers = engine.generate(ask(*QUESTIONS), Sampling(max_new_tokens=12, log_probabilities=True))
    assert len({len(engine.prompt_ids(turns)) for turns in ask(*QUESTIONS)}) > 2  # so rows are padded on the left
    for turns, answer in zip(ask(*QUESTIONS), answers, strict=True):
        tokens, told = alone(plain, engine.prompt_ids(turns), len(answer.token_ids))
        assert list(answer.token_ids) == tokens
        assert np.abs(np.array(told) - answer.log_probabilities).max() < engine.log_probability_limit
        assert answer.text == engine.tokenizer.decode(tokens, skip_special_tokens=True)


def test_score_streaming_and_draws_are_those_of_hf(engine, chat):
    with HFEngine.open(ModelSpec(chat[0], device="cpu", dtype="float32"), batch_size=3) as hf:
        prompts, answers = [[7, 8, 9, 10], [11], [12, 13]], [[20, 21], [22, 23, 24, 25], [26]]
        for ours, theirs in zip(engine.score(prompts, answers), hf.score(prompts, answers), strict=True):
            assert np.abs(ours - theirs).max() < 1e-3
        draws = Sampling(max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)
        assert [a.text for a in engine.generate(ask(*QUESTIONS), draws)] == [a.text for a in hf.generate(ask(*QUESTIONS), draws)]
        whole = engine.generate(ask(QUESTIONS[1]), Sampling(max_new_tokens=12))[0].text
        assert "".join(engine.stream(ask(QUESTIONS[1])[0], Sampling(max_new_tokens=12))) == whole


def test_structure(engine, chat):
    with HFEngine.open(ModelSpec(chat[0], device="cpu", dtype="float32"), batch_size=3) as hf:
        choices = Sampling(choices=("yes", "no", "It is not."), max_new_tokens=30)
        for ours, theirs in zip(engine.generate(ask(*QUESTIONS), choices), hf.generate(ask(*QUESTIONS), choices), strict=True):
            assert ours.text == theirs.text and math.isclose(sum(ours.probabilities.values()), 1, abs_tol=1e-9)
            assert all(abs(ours.probabilities[name] - value) < 1e-4 for name, value in theirs.probabilities.items())
    found = engine.generate(ask(*QUESTIONS), Sampling(regex="[0-9]{3}", max_new_tokens=8))
    assert all(len(one.text) == 3 and one.text.isdigit() and one.finish_reason == "stop" for one in found)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    (one,) = engine.generate(ask("Why?"), Sampling(json_schema=schema, max_new_tokens=60))
    assert json.loads(one.text)["n"] in (1, 2)


def test_a_sliding_window_is_kept_over_a_long_prompt(tmp_path):
    folder, tokenizer = decoder("gemma", tmp_path / "model", head_dim=16, sliding_window=8, sliding_window_pattern=2)
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    for kind in ENGINES:
        with kind.open(ModelSpec(folder)) as engine:
            answers = engine.generate(ask(*QUESTIONS), Sampling(max_new_tokens=10))
            for turns, answer in zip(ask(*QUESTIONS), answers, strict=True):
                prompt = engine.prompt_ids(turns)
                assert list(answer.token_ids) == alone(model, prompt, len(answer.token_ids))[0] and len(prompt) > 8


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66,
         "initializer_range": 0.3}
ENCODERS = {
    "bert": (BertConfig, BertForSequenceClassification, {**SMALL, "num_labels": 3}),
    "several labels": (RobertaConfig, RobertaForSequenceClassification,
                       {**SMALL, "num_labels": 4, "problem_type": "multi_label_classification", "pad_token_id": 1}),
    "window": (ModernBertConfig, ModernBertForSequenceClassification,
               {**SMALL, "num_labels": 3, "local_attention": 8, "global_attn_every_n_layers": 2, "reference_compile": False}),
    "tags": (DistilBertConfig, DistilBertForTokenClassification,
             {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 66, "initializer_range": 0.3,
              "num_labels": 3, "id2label": {0: "O", 1: "B-X", 2: "I-X"}}),
}


def encoder(kind, folder):
    tokenizer = train_wordpiece(LINES, vocab_size=120)
    config, head, values = ENCODERS[kind]
    names = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    torch.manual_seed(1)
    model = head(config(vocab_size=len(tokenizer), **{**names, **values})).eval()
    if kind == "several labels":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return save(folder, model, tokenizer), model, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small classifier with its graph beside it."""
    place = tmp_path_factory.mktemp("small")
    folder, model, tokenizer = encoder("bert", place / "model")
    graph_of(ModelSpec(folder))
    return place, model, tokenizer


@pytest.fixture
def small(made, tmp_path):
    """A copy of it for one test."""
    place, model, tokenizer = made
    for name in ("model", "model.graphs"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path / "model", model, tokenizer


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "tags"])
def test_class_probabilities_are_the_models(kind, tmp_path, request):
    folder, model, tokenizer = request.getfixturevalue("small") if kind == "bert" else encoder(kind, tmp_path / "model")
    for engine_class in ENGINES:
        with engine_class.open(ModelSpec(folder), batch_size=3) as engine, torch.no_grad():
            for text, answer in zip(TEXTS, engine.classify(TEXTS), strict=True):
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0]  # alone, so without padding
                want = logits.sigmoid() if kind == "several labels" else logits.softmax(-1)
                assert np.abs(np.array(list(answer.probabilities.values())) - want.numpy()).max() < 1e-4
            assert engine.check.passed


def test_tags_are_the_models(tmp_path):
    folder, model, tokenizer = encoder("tags", tmp_path / "model")
    with HFEngine(model, tokenizer, "bert", batch_size=3) as hf:
        want = hf.classify(TEXTS)
    for engine_class in ENGINES:
        with engine_class.open(ModelSpec(folder), batch_size=3) as engine:
            for ours, theirs in zip(engine.classify(TEXTS), want, strict=True):
                assert ours.tags == theirs.tags and ours.words == theirs.words
                assert np.abs(np.array(ours.scores) - theirs.scores).max() < 1e-4


def test_an_adapters_graph_is_the_merged_model(chat, plain, tmp_path):
    torch.manual_seed(2)
    base = LlamaForCausalLM.from_pretrained(chat[0], dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with ONNXEngine.open(ModelSpec(tmp_path / "adapter")) as engine, torch.no_grad():
        ids = torch.tensor([[7, 8, 9, 10]])
        want = adapted.eval()(ids).logits[0, 2].double().log_softmax(-1)[10]
        (got,) = engine.score([[7, 8, 9]], [[10]])
        assert abs(float(want) - got[0]) < 1e-3
        assert abs(float(plain(ids).logits[0, 2].double().log_softmax(-1)[10]) - got[0]) > 1e-2
        assert engine.graph.folder.parent == tmp_path / "adapter.graphs"


def test_a_graph_is_made_once_for_each_content(small, tmp_path, monkeypatch):
    folder, model, tokenizer = small
    first = graph_of(ModelSpec(folder), tmp_path / "model.graphs")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.classifier.weight += 1
    again = graph_of(ModelSpec(save(tmp_path / "other", changed, tokenizer)), tmp_path / "model.graphs")
    assert again.folder != first.folder and again.folder.parent == first.folder.parent
    monkeypatch.setattr(graph_cache, "write_graph", lambda *arguments: pytest.fail("made twice"))
    monkeypatch.setattr(graph_cache, "torch_model", lambda *arguments: pytest.fail("loaded for nothing"))
    assert graph_of(ModelSpec(folder)).folder == first.folder


def test_a_damaged_graph_is_found_and_one_cut_short_is_not_there(small, tmp_path, monkeypatch):
    folder = small[0]
    graph = graph_of(ModelSpec(folder))
    with ONNXEngine.open(ModelSpec(folder)) as engine:
        kept = [json.loads(file.read_text()) for file in graph.folder.glob("check-*.json")]
        assert kept and kept[0]["passed"] and engine.check.measured == kept[0]["measured"]
    weights = graph.folder / "model.onnx.data"
    values = np.frombuffer(weights.read_bytes(), np.float32).copy()
    values[len(values) // 4 :] *= 1.5
    weights.write_bytes(values.tobytes())
    for engine_class in ENGINES:
        with pytest.raises(CheckFailed, match="gives the model's own logits"):
            engine_class.open(ModelSpec(folder))

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_cache, "write_graph", broken)
    with pytest.raises(KeyboardInterrupt):
        graph_of(ModelSpec(folder), tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(("spec", "options", "said"), [
    ({"dtype": "bfloat16"}, {}, "a graph is kept in float32"),
    ({"adapters": {"a": "somewhere"}}, {}, "cannot switch adapters"),
    ({"device": "cuda"}, {}, "CUDAExecutionProvider"),
    ({"device": "tpu"}, {}, "allowed: cpu, cuda"),
])
def test_what_cannot_be_done_is_refused(small, spec, options, said):
    with pytest.raises(UserError, match=said):
        ONNXEngine.open(ModelSpec(small[0], **spec), **options)


def test_the_precision_of_openvino_is_the_one_asked_for(small):
    with pytest.raises(UserError, match="Did you mean 'bf16'"):
        OpenVINOEngine.open(ModelSpec(small[0]), precision="b16")
    with pytest.raises(UserError, match="OpenVINO sees no NPU9"):
        OpenVINOEngine.open(ModelSpec(small[0], device="npu9"))
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UserError, match="not in engine.precision=bf16"):
            OpenVINOEngine.open(ModelSpec(small[0]), precision="bf16")
        return
    with OpenVINOEngine.open(ModelSpec(small[0]), precision="bf16") as rough, OpenVINOEngine.open(ModelSpec(small[0])) as exact:
        assert "bfloat16" in rough.check.name and rough.check.measured > exact.check.measured
        assert rough.log_probability_limit == openvino_engine.LIMITS["bf16"]["llm"] > exact.log_probability_limit


def test_a_missing_package_is_one_sentence(monkeypatch, small):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for engine_class in (*ENGINES, tensorrt.TensorRTEngine):
        assert "pip install" in engine_class.missing() and "\n" not in engine_class.missing()
        with pytest.raises(UserError, match="pip install"):
            engine_class.open(ModelSpec(small[0]))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_tensorrt_never_runs_on_the_cpu_instead(small, monkeypatch):
    with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
        tensorrt.TensorRTEngine.open(ModelSpec(small[0]))
    available = [tensorrt.TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(UserError, match=r"could not start it and would go on with CPUExecutionProvider"):
        tensorrt.TensorRTEngine.open(ModelSpec(small[0]))  # ONNX Runtime itself falls back here, with a warning


def test_tensorrt_runs_encoders_where_the_provider_is_there(small, monkeypatch):
    folder, model, tokenizer = small
    seen, plain_session = {}, onnxruntime.InferenceSession

    def session(file, options, providers):
        seen["providers"] = providers
        real = plain_session(file, options, providers=["CPUExecutionProvider"])
        real.get_providers = lambda: [tensorrt.TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]
        return real

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [tensorrt.TENSORRT, "CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with tensorrt.TensorRTEngine.open(ModelSpec(folder), batch_size=4, fp16=True) as engine, torch.no_grad():
        found = engine.classify(TEXTS)
        for text, answer in zip(TEXTS, found, strict=True):
            want = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            assert np.abs(np.array(list(answer.probabilities.values())) - want.numpy()).max() < 1e-4
        name, options = seen["providers"][0]
        assert name == tensorrt.TENSORRT and options["trt_fp16_enable"] and "float16" in engine.check.name
        assert options["trt_profile_max_shapes"].startswith("input_ids:4x66") and options["trt_profile_min_shapes"].count("1x1") == 2


class StandIn:
    """TensorRT-LLM's `LLM` as far as it is used, computed by transformers."""

    def __init__(self, model, **options):
        self.model, self.options = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), options

    def generate(self, rows, params, use_tqdm):
        return [self._one(row["prompt_token_ids"], params) for row in rows]

    @torch.no_grad()
    def _one(self, ids, params):
        tokens = alone(self.model, ids, params.max_tokens)[0]
        end = next((place for place, token in enumerate(tokens) if token == params.end_id), None)
        output = types.SimpleNamespace(token_ids=tokens[:end], finish_reason="length" if end is None else "stop", stop_reason=None)
        logits = self.model(torch.tensor([ids])).logits[0] if getattr(params, "return_context_logits", False) else None
        return types.SimpleNamespace(outputs=[output], context_logits=logits)

    def generate_async(self, row, params, streaming):
        whole = self._one(row["prompt_token_ids"], params).outputs[0].token_ids
        for end in range(1, len(whole) + 1):
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=whole[:end])])

    def shutdown(self):
        self.model = None


@pytest.fixture
def trt_llm(monkeypatch):
    kinds = types.SimpleNamespace(KvCacheConfig=types.SimpleNamespace, GuidedDecodingParams=types.SimpleNamespace)
    library = types.SimpleNamespace(LLM=StandIn, SamplingParams=types.SimpleNamespace, llmapi=kinds)
    monkeypatch.setattr(tensorrt_llm.TensorRTLLMEngine, "missing", classmethod(lambda cls: ""))
    monkeypatch.setattr(tensorrt_llm, "require", lambda module, extra: library)


def test_language_models_on_tensorrt_llm(trt_llm, chat, plain):
    with tensorrt.TensorRTEngine.open(ModelSpec(chat[0])) as engine, HFEngine.open(ModelSpec(chat[0], device="cpu")) as hf:
        assert not engine.llm.options["kv_cache_config"].enable_block_reuse
        assert [engine.prompt_ids(turns) for turns in ask(*QUESTIONS)] == [hf.prompt_ids(turns) for turns in ask(*QUESTIONS)]
        options = Sampling(max_new_tokens=8, log_probabilities=True)
        for ours, theirs in zip(engine.generate(ask(*QUESTIONS), options), hf.generate(ask(*QUESTIONS), options), strict=True):
            assert ours.token_ids == theirs.token_ids and ours.text == theirs.text and ours.finish_reason == theirs.finish_reason
            assert np.allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
        choices = Sampling(choices=("yes", "no"), max_new_tokens=30)
        (ours,), (theirs,) = (each.generate(ask("Why?"), choices) for each in (engine, hf))
        assert ours.text == theirs.text and abs(ours.probabilities["yes"] - theirs.probabilities["yes"]) < 1e-4
        pieces = list(engine.stream(ask("Why?")[0], Sampling(max_new_tokens=8)))
        assert "".join(pieces) == hf.generate(ask("Why?"), Sampling(max_new_tokens=8))[0].text
        with pytest.raises(UserError, match="cannot honour sampling.grammar"):
            engine.generate(ask("Why?"), Sampling(grammar='start: "a"'))
        with pytest.raises(UserError, match="exceed the 256 tokens"):
            engine.generate(ask("Why?"), Sampling(max_new_tokens=300))
    with pytest.raises(UserError, match="closed"):
        engine.generate(ask("Why?"))


def test_tensorrt_refuses_what_it_cannot_do(trt_llm, chat):
    with pytest.raises(UserError, match="engine.fp16"):
        tensorrt.TensorRTEngine.open(ModelSpec(chat[0]), fp16=True)
    with pytest.raises(UserError, match="not mllm"):
        tensorrt.TensorRTEngine.open(ModelSpec(chat[0], family="mllm"))
    with pytest.raises(UserError, match="'timeout'"):
        tensorrt_llm.completion_from(types.SimpleNamespace(token_ids=[], finish_reason="timeout"), None, [], 0.0)


def test_an_option_that_an_engine_lacks_is_told_before_a_graph_is_made(tmp_path, monkeypatch, made):
    monkeypatch.setattr("supertrainer.inference.graph_engine.graph_of", lambda *arguments: pytest.fail("a graph was made"))
    with pytest.raises(TypeError, match="precision"):
        ONNXEngine.open(ModelSpec(made[0] / "model"), precision="f32")
