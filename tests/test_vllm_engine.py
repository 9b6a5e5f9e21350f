"""The vllm engine against a stand-in for vLLM's server that is plain transformers; the real one: benchmarks/engine_vllm.py."""

import sys
import types

import numpy as np
import pytest
import torch
from openai_server import FakeServer
from transformers import AutoModelForCausalLM

from supertrainer import FastLLM
from supertrainer.inference import clients
from supertrainer.inference.base import ModelSpec, Sampling
from supertrainer.inference.clients import Unanswered
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.engines.vllm import VLLMEngine, for_vllm
from supertrainer.runtime import UserError

QUESTIONS = [[{"role": "user", "content": text}] for text in ("What is two plus two?", "Say it.", "Name a colour, please: red or blue?")]


@torch.no_grad()
def greedy(model, ids, new, stops):
    """Token ids and log-probabilities of a greedy answer, a full forward pass for each token."""
    ids, told = list(ids), []
    for _ in range(new):
        row = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        ids.append(int(row.argmax()))
        told.append(float(row.max()))
        if ids[-1] in stops:
            break
    return ids[-len(told):], told


@torch.no_grad()
def prompt_log_probabilities(model, ids):
    rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [None, *({str(token): {"logprob": float(rows[place, token])}} for place, token in enumerate(ids[1:]))]


class FakeVLLM(FakeServer):
    """vLLM's `/v1/models`, `/v1/completions` and streams of them, for a model folder."""

    def __init__(self, folder, tokenizer, adapters=()):
        super().__init__()
        self.model, self.tokenizer, self.adapters = AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, list(adapters)
        self.fault = None

    def other(self, method, path, raw, headers, query):
        if path == "/v1/models":
            found = [{"id": "served", "parent": None, "max_model_len": 128},
                     *({"id": name, "parent": "served", "max_model_len": 128} for name in self.adapters)]
            return 200, {"object": "list", "data": found}
        return super().other(method, path, raw, headers, query)

    def completion(self, body):
        ids, told = greedy(self.model, body["prompt"], body["max_tokens"], body.get("stop_token_ids", ()))
        choice = {"index": 0, "text": self.tokenizer.decode(ids, skip_special_tokens=True), "token_ids": ids, "finish_reason": "stop",
                  "logprobs": {"token_logprobs": told} if body.get("logprobs") is not None else None}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = prompt_log_probabilities(self.model, body["prompt"])
        return {"choices": [choice], "usage": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    texts = ["What is two plus two? Four.", "Name a colour, please: red or blue? yes no"] * 5
    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=texts, device="cpu", dtype="float32")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def hf(folder):
    return HFEngine.open(ModelSpec(folder, dtype="float32", device="cpu"))


@pytest.fixture
def server(folder, hf, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(clients, "BACK_OFF", 0.0)
    with FakeVLLM(folder, hf.tokenizer) as running:
        yield running


@pytest.fixture
def engine(server, folder):
    with VLLMEngine.open(ModelSpec(folder), url=server.url, retries=1) as opened:
        yield opened


def test_prompts_answers_and_scores_are_those_of_hf(engine, hf):
    sampling = Sampling(max_new_tokens=10, log_probabilities=True)
    for turns, got, wanted in zip(QUESTIONS, engine.generate(QUESTIONS, sampling), hf.generate(QUESTIONS, sampling), strict=True):
        assert engine.prompt_ids(turns) == hf.prompt_ids(turns)
        assert (got.text, got.token_ids, got.tokens, got.finish_reason) == (wanted.text, wanted.token_ids, wanted.tokens, wanted.finish_reason)
        np.testing.assert_allclose(got.log_probabilities, wanted.log_probabilities, atol=1e-4)
    prompts, answers = [hf.prompt_ids(turns) for turns in QUESTIONS], [[5, 6, 7], [8], []]
    for got, wanted in zip(engine.score(prompts, answers), hf.score(prompts, answers), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_choices_and_their_probabilities_are_those_of_hf(engine, hf):
    sampling = Sampling(choices=("yes", "no", "red or blue"), log_probabilities=True)
    for got, wanted in zip(engine.generate(QUESTIONS, sampling), hf.generate(QUESTIONS, sampling), strict=True):
        assert (got.text, got.token_ids) == (wanted.text, wanted.token_ids)
        np.testing.assert_allclose(got.log_probabilities, wanted.log_probabilities, atol=1e-4)
        np.testing.assert_allclose(list(got.probabilities.values()), list(wanted.probabilities.values()), atol=1e-4)


def test_adapters_go_by_name(server, folder):
    server.adapters = ["mine"]
    with VLLMEngine.open(ModelSpec(folder, adapters={"mine": "somewhere"}), url=server.url, served_name="served") as engine:
        engine.generate(QUESTIONS[:1], Sampling(max_new_tokens=3), adapter="mine")
        engine.generate(QUESTIONS[:1], Sampling(max_new_tokens=3))
        assert [body["model"] for body in server.bodies] == ["mine", "served"]
        with pytest.raises(UserError, match="Did you mean 'mine'"):
            engine.generate(QUESTIONS, adapter="mien")
        for sampling in (Sampling(choices=("yes", "no")), Sampling(regex="a+", log_probabilities=True)):
            with pytest.raises(UserError, match="while it holds adapters"):
                engine.generate(QUESTIONS, sampling)
    assert not any("prompt_logprobs" in body for body in server.bodies), "this would end a real server"


def test_what_is_sent(engine, server, hf):
    engine.generate(QUESTIONS[:1], Sampling(max_new_tokens=3, regex="a+", stop=("x",)))
    (body,) = server.bodies
    assert body["prompt"] == hf.prompt_ids(QUESTIONS[0]) and body["model"] == "served"
    assert body["structured_outputs"] == {"regex": "a+"} and body["stop"] == ["x"] and body["temperature"] == 0.0
    assert set(body["stop_token_ids"]) >= {hf.tokenizer.eos_token_id}
    assert {key: body[key] for key in ("top_p", "top_k", "min_p", "repetition_penalty")} == {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # the model's own defaults do not come through


def test_log_probabilities_under_a_structure_are_the_model_s_own(engine, server, hf):
    (got,) = engine.generate(QUESTIONS[:1], Sampling(max_new_tokens=3, regex="a+", log_probabilities=True))
    assert "logprobs" not in server.bodies[0] and server.bodies[1]["prompt_logprobs"] == 0
    (wanted,) = hf.score([hf.prompt_ids(QUESTIONS[0])], [list(got.token_ids)])
    np.testing.assert_allclose(got.log_probabilities, wanted, atol=1e-4)


def test_many_come_in_order(engine, server):
    server.die_after = 5
    with pytest.raises(Unanswered) as error:
        engine.generate(QUESTIONS * 4, Sampling(max_new_tokens=2))
    assert len(error.value.answered) == 5 and "of 12 requests were answered" in str(error.value)
    server.die_after = None
    found = engine.generate(QUESTIONS * 90, Sampling(max_new_tokens=1))  # more than one chunk
    assert len(found) == 270 and [one.text for one in found[:3]] * 90 == [one.text for one in found]


def test_what_cannot_be(engine, server, folder):
    with pytest.raises(UserError, match="exceed the 128 tokens"):
        engine.generate(QUESTIONS, Sampling(max_new_tokens=127))
    with pytest.raises(UserError, match="There is no adapter 'mine' on this model; there are: none"):
        engine.generate(QUESTIONS, adapter="mine")
    with pytest.raises(UserError, match="after a prompt of at least one token"):
        engine.score([[]], [[1]])
    with pytest.raises(UserError, match="serves no 'servd'.*Did you mean 'served'"):
        VLLMEngine.open(ModelSpec(folder), url=server.url, served_name="servd")
    with pytest.raises(UserError, match="--enable-lora --lora-modules other=there"):
        VLLMEngine.open(ModelSpec(folder, adapters={"other": "there"}), url=server.url, served_name="served", retries=0)
    with pytest.raises(UserError, match="server's matter"):
        VLLMEngine.open(ModelSpec(folder, dtype="float32"), url=server.url)
    with pytest.raises(UserError, match="there is no such file or folder"):
        VLLMEngine.open(ModelSpec(folder + "/nowhere"), url=server.url)
    server.completion = lambda body: {"choices": [{"text": "hello", "finish_reason": "stop"}]}
    with pytest.raises(UserError, match="Use engine=openai"):
        engine.generate(QUESTIONS)
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.score([[1]], [[1]])


def test_a_run_folder_and_its_adapter(tmp_path):
    run = tmp_path / "run"
    for place, name in ((run / "model", "config.json"), (run / "checkpoints" / "checkpoint-3", "adapter_config.json")):
        place.mkdir(parents=True)
        (place / name).write_text('{"model_type": "llama", "base_model_name_or_path": "org/base", "architectures": ["LlamaForCausalLM"]}')
    (run / "model" / "model.safetensors").touch()
    adapter = str(run / "checkpoints" / "checkpoint-3")
    assert (found := for_vllm(ModelSpec(run))).path == str(run / "model") and not found.adapters
    assert for_vllm(ModelSpec(run, load="merged")).path == str(run / "model")
    found = for_vllm(ModelSpec(run, load="adapter", adapters={"b": adapter}))
    assert found.path == "org/base" and found.adapters == {"own": adapter, "b": adapter}
    found = for_vllm(ModelSpec(adapter))
    assert found.path == "org/base" and found.adapters == {"own": adapter}
    assert (found := for_vllm(ModelSpec(run, load="base"))).path == "org/base" and not found.adapters
    with pytest.raises(UserError, match="vLLM merges no adapters"):
        for_vllm(ModelSpec(adapter, load="merged"))


def test_without_vllm_and_without_a_server(monkeypatch, folder):
    with pytest.raises(UserError, match="vllm is not installed here.*tools/vllm_server.py"):
        VLLMEngine.open(ModelSpec(folder))
    assert VLLMEngine.missing() == ""  # a server can be named
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'supertrainer[api]'" in VLLMEngine.missing()


class FakeLLM:
    """What `vllm.LLM` hands out, from plain transformers."""

    def __init__(self, model, **options):
        self.options, self.model = options, AutoModelForCausalLM.from_pretrained(model).eval()
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=128))

    def generate(self, prompts, params, use_tqdm, lora_request):
        found = []
        for prompt in prompts:
            ids = list(prompt["prompt_token_ids"])
            new, told = greedy(self.model, ids, params.max_tokens, getattr(params, "stop_token_ids", ()))
            rows = [{token: types.SimpleNamespace(logprob=value)} for token, value in zip(new, told, strict=True)]
            scored = [row and {int(key): types.SimpleNamespace(**value) for key, value in row.items()}
                      for row in prompt_log_probabilities(self.model, ids)]
            found.append(types.SimpleNamespace(prompt_logprobs=scored, metrics=types.SimpleNamespace(first_token_latency=0.01),
                                               outputs=[types.SimpleNamespace(token_ids=new, logprobs=rows)]))
        return found


def test_in_this_process(monkeypatch, folder, hf):
    modules = {"vllm": {"LLM": FakeLLM}, "vllm.platforms": {"current_platform": types.SimpleNamespace(device_type="cpu")},
               "vllm.sampling_params": {"SamplingParams": types.SimpleNamespace, "StructuredOutputsParams": types.SimpleNamespace}}
    for name, values in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match="this vLLM is built for cpu"):
        VLLMEngine.open(ModelSpec(folder, device="cuda"))
    with VLLMEngine.open(ModelSpec(folder, dtype="float32"), options={"enforce_eager": True}) as engine:
        assert engine.backend.llm.options["dtype"] == "float32" and engine.backend.llm.options["enforce_eager"]
        sampling = Sampling(max_new_tokens=6, log_probabilities=True)
        for got, wanted in zip(engine.generate(QUESTIONS, sampling), hf.generate(QUESTIONS, sampling), strict=True):
            assert got.token_ids == wanted.token_ids and got.first_token_seconds == 0.01
            np.testing.assert_allclose(got.log_probabilities, wanted.log_probabilities, atol=1e-4)
        assert list(engine.stream(QUESTIONS[0], Sampling(max_new_tokens=6))) == [hf.generate(QUESTIONS[:1], {"max_new_tokens": 6})[0].text]
        shares = Sampling(choices=("yes", "no"))
        got, wanted = engine.generate(QUESTIONS[:1], shares)[0], hf.generate(QUESTIONS[:1], shares)[0]
        assert got.probabilities == pytest.approx(wanted.probabilities, abs=1e-4)
