"""The llama_cpp engine on files of tiny models, against plain transformers on the folders that they were made from."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from supertrainer.chat import CHATML_TEMPLATE
from supertrainer.export.gguf.convert import convert
from supertrainer.inference.base import ModelSpec, Sampling
from supertrainer.inference.engines import llama_cpp
from supertrainer.inference.engines.llama_cpp import LlamaCppEngine, follower, require_held
from supertrainer.inference.llama_answers import Written, lark_of, told_values
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.runtime import UserError, no_bars, quiet

pytest.importorskip("xllamacpp", reason="needs the extra gguf")

WORDS = ["the quick brown fox jumps over the lazy dog", "yes no maybe cats dogs 0123456789 { \" : , }"]
QUESTIONS = ["Hi", "What does the fox do?", "Why is the dog lazy, and the fox quick?", "12", "over the dog", "brown"]
LIMIT = 2e-3  # nats, F32 weights with a cache of 32 bits


def save(model, tokenizer, folder):
    with quiet(), no_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama whose next token is not a matter of chance, its tokenizer, and its file in float32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_byte_bpe(WORDS * 4, 330)
    tokenizer.chat_template = CHATML_TEMPLATE
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
        max_position_embeddings=512)).eval()
    save(model, tokenizer, folder / "model")
    return model, tokenizer, convert(folder / "model", folder / "model-F32.gguf", "f32", progress=False)


@pytest.fixture(scope="module")
def engine(made):
    with LlamaCppEngine.open(ModelSpec(made[2]), parallel=3, threads=1, max_length=256) as opened:
        yield opened


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def prompt_of(tokenizer, text):
    found = tokenizer.apply_chat_template(ask(text)[0], add_generation_prompt=True)
    return list(found if isinstance(found, list) else found["input_ids"])


@torch.no_grad()
def generated(model, tokenizer, text, **options):
    ids = torch.tensor([prompt_of(tokenizer, text)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.pad_token_id, **options)
    return found[0, ids.shape[1]:].tolist()


@torch.no_grad()
def told(model, prompt, answer):
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
    return logits[torch.arange(len(answer)), torch.tensor(answer)].numpy()


def test_prompts_have_the_tokens_of_the_template(made, engine):
    for text in QUESTIONS:
        assert engine.prompt_ids(ask(text)[0]) == prompt_of(made[1], text)
    assert engine.family == "llm" and engine.log_probability_limit <= LIMIT


def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(made, engine):
    model, tokenizer, _ = made
    answers = engine.generate(ask(*QUESTIONS), Sampling(max_new_tokens=24, log_probabilities=True))
    for text, answer in zip(QUESTIONS, answers, strict=True):
        assert list(answer.token_ids) == generated(model, tokenizer, text, max_new_tokens=24)
        wanted = told(model, prompt_of(tokenizer, text), answer.token_ids)
        assert np.abs(np.array(answer.log_probabilities) - wanted).max() < LIMIT  # half characters among them
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.tokens == len(answer.token_ids) and 0 < answer.first_token_seconds <= answer.seconds
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == tokenizer.eos_token_id else "length")
    assert any("�" in answer.text for answer in answers), "the model is meant to break characters"


def test_a_repetition_penalty_covers_prompt_and_answer(made, engine):
    answers = engine.generate(ask(*QUESTIONS[:3]), Sampling(max_new_tokens=24, repetition_penalty=1.7))
    plain = engine.generate(ask(*QUESTIONS[:3]), Sampling(max_new_tokens=24))
    for text, answer in zip(QUESTIONS, answers, strict=False):
        assert list(answer.token_ids) == generated(made[0], made[1], text, max_new_tokens=24, repetition_penalty=1.7)
    assert [a.token_ids for a in answers] != [p.token_ids for p in plain]


def test_draws_follow_the_distribution_after_temperature_top_k_and_top_p(made, engine):
    sampling = Sampling(max_new_tokens=1, do_sample=True, temperature=2.0, top_k=5, top_p=0.9, seed=7)
    found = [answer.token_ids[0] for answer in engine.generate(ask(*["Hi"] * 600), sampling)]
    with torch.no_grad():
        logits = made[0](torch.tensor([prompt_of(made[1], "Hi")])).logits[0, -1].double() / 2.0
    values, order = logits.topk(5)
    shares = values.softmax(-1)
    kept = shares.cumsum(-1) - shares < 0.9
    wanted = dict(zip(order[kept].tolist(), (shares[kept] / shares[kept].sum()).tolist(), strict=True))
    assert set(found) <= set(wanted)
    for token, share in wanted.items():
        assert abs(found.count(token) / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5 + 0.003, (token, share)
    assert found == [answer.token_ids[0] for answer in engine.generate(ask(*["Hi"] * 600), sampling)]


def test_given_answers_are_scored_as_transformers_does(made, engine):
    prompts = [prompt_of(made[1], text) for text in QUESTIONS[:3]]
    answers = [made[1]("the lazy dog", add_special_tokens=False)["input_ids"], [5], list(range(100, 120))]
    for prompt, answer, found in zip(prompts, answers, engine.score(prompts, answers), strict=True):
        assert found.dtype == np.float64 and np.abs(found - told(made[0], prompt, answer)).max() < LIMIT
    with pytest.raises(UserError, match="without tokens"):
        engine.score([[]], [[1]])
    with pytest.raises(UserError, match="256"):
        engine.score([[1] * 200], [[1] * 100])


def test_choices_have_their_probabilities(made, engine):
    choices = ("yes", "no", "maybe cats")
    rows = [[*made[1](one, add_special_tokens=False)["input_ids"], made[1].eos_token_id] for one in choices]
    answers = engine.generate(ask(*QUESTIONS), Sampling(choices=choices, log_probabilities=True))
    for text, answer in zip(QUESTIONS, answers, strict=True):
        totals = [told(made[0], prompt_of(made[1], text), row).sum() for row in rows]
        wanted = torch.tensor(totals).softmax(-1).tolist()
        assert answer.text == choices[int(np.argmax(totals))] and answer.finish_reason == "stop"
        assert max(abs(answer.probabilities[one] - share) for one, share in zip(choices, wanted, strict=True)) < 1e-4
        assert abs(sum(answer.log_probabilities) - max(totals)) < 0.01
    options = {"choices": choices, "do_sample": True, "temperature": 50.0}
    drawn = [engine.generate(ask("Hi"), {**options, "seed": seed})[0].text for seed in range(12)]
    assert len(set(drawn)) > 1 and drawn[3] == engine.generate(ask("Hi"), {**options, "seed": 3})[0].text


def test_classes_of_a_language_model(made):
    with LlamaCppEngine.open(ModelSpec(made[2]), parallel=1, threads=1, max_length=128, classes=["0", "1", "2"]) as opened:
        found = opened.classify(QUESTIONS[:2])
    tokens = [made[1](name, add_special_tokens=False)["input_ids"][0] for name in "012"]
    for text, one in zip(QUESTIONS, found, strict=False):
        with torch.no_grad():
            wanted = made[0](torch.tensor([prompt_of(made[1], text)])).logits[0, -1, tokens].double().softmax(-1).tolist()
        assert max(abs(one.probabilities[name] - share) for name, share in zip("012", wanted, strict=True)) < 1e-4
        assert one.label == "012"[int(np.argmax(wanted))]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "pet": {"enum": ["cat", "dog"]}}, "required": ["n", "pet"],
          "additionalProperties": False}


def test_structures_hold(made, engine):
    for answer in engine.generate(ask(*QUESTIONS), Sampling(max_new_tokens=24, regex=r"[0-9]{2,4}/(cats|dogs)")):
        assert re.fullmatch(r"[0-9]{2,4}/(cats|dogs)", answer.text) and answer.finish_reason == "stop"
    for answer in engine.generate(ask("Hi", "12"), Sampling(max_new_tokens=150, json_schema=SCHEMA)):
        assert answer.finish_reason == "length" or set(json.loads(answer.text)) == {"n", "pet"}
        assert answer.text.lstrip().startswith("{")
    grammar = 'start: "yes" | "no" WORD\nWORD: /[a-c]+/'
    for answer in engine.generate(ask(*QUESTIONS), Sampling(max_new_tokens=8, grammar=grammar)):
        assert re.match("yes|no[a-c]*", answer.text)


def test_a_structured_answer_tells_the_models_own_log_probabilities(made, engine):
    sampling = Sampling(max_new_tokens=24, regex=r"[0-9]{2,4}/(cats|dogs)", log_probabilities=True)
    answer = engine.generate(ask("Hi"), sampling)[0]
    assert np.abs(np.array(answer.log_probabilities) - told(made[0], prompt_of(made[1], "Hi"), answer.token_ids)).max() < LIMIT


def test_a_faulty_structure_is_an_error_before_anything_runs(engine):
    for options in ({"regex": "[0-9"}, {"grammar": "start: nowhere"}, {"json_schema": {"type": "nothing"}}):
        with pytest.raises(UserError, match=f"sampling.{next(iter(options))} cannot be used"):
            engine.generate(ask("Hi"), options)


def test_an_answer_that_left_its_structure_is_no_answer(made, engine):
    sampling = Sampling(regex="[0-9]+")
    matcher, ids = follower(engine.structures, sampling), made[1]("12", add_special_tokens=False)["input_ids"]
    require_held(matcher, [*ids, made[1].eos_token_id], engine.stop_ids)
    with pytest.raises(UserError, match="did not hold"):
        require_held(matcher, made[1]("cat", add_special_tokens=False)["input_ids"], engine.stop_ids)
    assert lark_of(sampling).startswith("%llguidance")


def test_stop_texts_end_an_answer_and_are_not_in_it(made, engine):
    whole = engine.generate(ask("Hi"), Sampling(max_new_tokens=24))[0]
    letters = next(piece for piece in re.findall(r"[ -~]{2}", whole.text) if whole.text.index(piece) > 0)
    cut = engine.generate(ask("Hi"), Sampling(max_new_tokens=24, stop=(letters,)))[0]
    assert cut.text == whole.text[: whole.text.index(letters)] and cut.finish_reason == "stop" and cut.tokens <= whole.tokens
    assert "".join(engine.stream(ask("Hi")[0], Sampling(max_new_tokens=24, stop=(letters,)))) == cut.text


def test_the_pieces_of_a_stream_are_the_answer(engine):
    for options in ({}, {"do_sample": True, "seed": 5}, {"regex": r"[0-9]{3}/(cats|dogs)"}, {"choices": ("yes", "no")}):
        sampling = Sampling(max_new_tokens=24, **options)
        whole = engine.generate(ask("over the dog"), sampling)[0].text
        pieces = list(engine.stream(ask("over the dog")[0], sampling))
        joined = "".join(pieces)  # without the half character that an answer may break off in
        begins = whole.replace("�", "").startswith(joined.replace("�", ""))
        assert joined == whole or "�" in whole and begins and len(joined) > 10
        assert len(pieces) > 1 or "choices" in options
    given_up = engine.stream(ask("Hi")[0], Sampling(max_new_tokens=200))
    next(given_up)
    given_up.close()
    assert engine.generate(ask("Hi"), Sampling(max_new_tokens=2))
    with pytest.raises(UserError, match="log_probabilities"):
        engine.stream(ask("Hi")[0], Sampling(log_probabilities=True))


def test_many_rows_keep_their_order_beside_each_other(made, engine):
    texts = [f"{number} dogs" for number in range(40)]
    alone = [generated(made[0], made[1], text, max_new_tokens=3) for text in texts]
    assert [list(answer.token_ids) for answer in engine.generate(ask(*texts), Sampling(max_new_tokens=3))] == alone


def test_what_cannot_be_had_is_said(made, engine):
    with pytest.raises(UserError, match="more than the 256"):
        engine.generate(ask("Hi " * 300))
    with pytest.raises(UserError, match="no adapters"):
        engine.generate(ask("Hi"), adapter="mine")
    with pytest.raises(UserError, match="cannot classify"):
        engine.classify(["Hi"])
    for spec, word in ((ModelSpec(made[2], dtype="float16"), "dtype"), (ModelSpec(made[2], load="adapter"), "load"),
                       (ModelSpec(made[2], adapters={"a": "b"}), "adapters"), (ModelSpec(made[2].parent / "model"), "gguf_of")):
        with pytest.raises(UserError, match=word):
            LlamaCppEngine.open(spec)
    with pytest.raises(UserError, match="allowed: xllamacpp"):
        LlamaCppEngine.open(ModelSpec(made[2]), runtime="ollama")
    with LlamaCppEngine.open(ModelSpec(made[2]), parallel=1, threads=1, max_length=64) as opened:
        pass
    opened.close()
    with pytest.raises(UserError, match="closed"):
        opened.generate(ask("Hi"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'supertrainer[gguf]'" in LlamaCppEngine.missing()


def test_log_probabilities_that_are_in_doubt_are_not_guessed():
    entries = [{"id": 1, "logprob": -1.0}, {"id": 1, "logprob": None}]
    assert told_values([1, 2, 1], entries)[:2] == [-1.0, None]
    assert told_values([1, 1, 1], entries) == [None, None, None]
    assert told_values([3], entries) == [None]
    assert told_values([], []) == []


@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_a_classifiers_file_gives_its_probabilities(tmp_path, task):
    torch.manual_seed(0)
    tokenizer = train_wordpiece(WORDS * 4, 100)
    tokenizer.model_max_length = 32
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        id2label={0: "good", 1: "bad", 2: "odd"}, max_position_embeddings=32, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        problem_type="multi_label_classification" if task == "multi_label" else None)).eval()
    save(model, tokenizer, tmp_path / "processor")  # where the cache keeps it
    file = convert(tmp_path / "processor", tmp_path / "x.gguf", "f32", progress=False)
    texts = ["the quick fox", "dog", "jumps over the lazy dog " * 12]
    with LlamaCppEngine.open(ModelSpec(file), threads=1) as opened:
        assert opened.family == "bert"
        found = opened.classify(texts)
        second = lambda *texts, **_: {"input_ids": [1, 2], "token_type_ids": [0, 1]}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="which of two texts"):
            patch.setattr(opened, "tokenizer", second)
            opened.classify([("the fox", "the dog")])
        with pytest.raises(UserError, match="encoder"):
            opened.generate(ask("Hi"))
    for text, one in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0]
        wanted = (logits.sigmoid() if task == "multi_label" else logits.softmax(-1)).tolist()
        ours = [one.probabilities[name] for name in ("good", "bad", "odd")]
        assert np.abs(np.array(ours) - wanted).max() < 5e-4  # llama.cpp's GELU is a table of 16 bits
        assert (one.labels is not None) == (task == "multi_label")


class Recorded:
    """Stands for a loaded file that answers with what it was given."""

    parallel, ends = 1, frozenset()

    def __init__(self, *tokens):
        self.tokens = tokens

    def write(self, row, structure=None):
        return Written(self.tokens, 0.5, 0.25)


def test_an_error_in_one_row_ends_the_others(made, engine):
    class Failing(Recorded):
        def write(self, row, structure=None):
            raise UserError("no")

    broken = LlamaCppEngine(Failing(), engine.file, 256)
    with pytest.raises(UserError, match="no"):
        broken.generate(ask(*QUESTIONS))
    fine = LlamaCppEngine(Recorded(5, made[1].eos_token_id, 7), engine.file, 256).generate(ask("Hi"))[0]
    assert fine.token_ids == (5, made[1].eos_token_id) and fine.finish_reason == "stop" and fine.first_token_seconds == 0.25


def test_a_folder_is_written_once_and_answers_as_it_does(made, tmp_path, caplog):
    from supertrainer.run.gguf_cache import gguf_of, gguf_spec

    model, tokenizer, file = made
    save(model, tokenizer, tmp_path / "model")
    spec = ModelSpec(tmp_path / "model")
    first = gguf_of(spec, "f32")
    assert first == gguf_of(spec, "F32") and first.parent.parent == tmp_path / "model.ggufs" and first.name == "model-F32.gguf"
    proof = json.loads((first.parent / "proof.json").read_text())
    assert all(check["passed"] for check in proof) and any("llama.cpp" in check["name"] for check in proof)
    assert [path.name for path in first.parent.parent.iterdir()] == [first.parent.name]
    with LlamaCppEngine.open(gguf_spec(spec, "f32"), parallel=1, threads=1, max_length=128) as opened:
        answer = opened.generate(ask("Hi"), {"max_new_tokens": 8})[0]
    assert list(answer.token_ids) == generated(model, tokenizer, "Hi", max_new_tokens=8)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    save(model, tokenizer, tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight.div_(1.5)
    assert gguf_of(spec, "f32") != first
    assert gguf_of(ModelSpec(file), "q8_0") == file and gguf_spec(ModelSpec(file)) == ModelSpec(file)
    with pytest.raises(UserError, match="q9"):
        gguf_of(spec, "q9")


def test_a_file_that_fails_its_proof_is_not_kept(made, tmp_path, monkeypatch):
    from supertrainer.check import Check, CheckFailed
    from supertrainer.export import ship
    from supertrainer.run.gguf_cache import gguf_of

    save(*made[:2], tmp_path / "model")
    monkeypatch.setattr(ship, "prove_gguf", lambda *arguments, **more: [Check("answers", False, 9, 1, "")])
    with pytest.raises(CheckFailed, match="answers"):
        gguf_of(ModelSpec(tmp_path / "model"), "f32")
    assert not list((tmp_path / "model.ggufs").iterdir())


def test_images_go_to_the_projector_in_their_places(tmp_path, monkeypatch):
    """What the files of vision models answer is held against transformers in test_gguf_vision; here, what the engine asks."""
    from PIL import Image

    from supertrainer.export.gguf.vision import convert_projector
    from supertrainer.models.builtin import make_config, make_model, make_processor, recipe

    torch.manual_seed(0)
    values = recipe("tiny_idefics3", {"vision_config": {"num_hidden_layers": 2}})
    processor = make_processor(values, WORDS)
    processor.tokenizer.add_tokens(["\n\n"])
    model = make_model("mllm", make_config(values, processor.tokenizer))
    save(model, processor, tmp_path / "processor")
    file = convert(tmp_path / "processor", tmp_path / "x-F32.gguf", "f32", progress=False)
    convert_projector(tmp_path / "processor", tmp_path / "mmproj-x-F16.gguf", "f16")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}]
    light, dark = Image.new("RGB", (32, 32), "white"), Image.effect_noise((32, 32), 90).convert("RGB")
    sampling = Sampling(max_new_tokens=6, log_probabilities=False)
    with LlamaCppEngine.open(ModelSpec(file), parallel=2, threads=1, max_length=512) as opened:
        assert opened.family == "mllm"
        seen = []
        ask_llama = opened.model.llama.ask
        monkeypatch.setattr(opened.model.llama, "ask", lambda path, body=None: seen.append(body) or ask_llama(path, body))
        answers = opened.generate([turns, turns, turns], sampling, images=[light, [dark], light])
        prompts = [body["prompt"] for body in seen if body and isinstance(body.get("prompt"), dict)]
        assert len(prompts) == 3 and all(len(prompt["multimodal_data"]) == 1 for prompt in prompts)
        assert all("Which digit?" in prompt["prompt_string"] and "<image>" not in prompt["prompt_string"] for prompt in prompts)
        assert answers[0].token_ids == answers[2].token_ids and answers[0].tokens == 6
        assert "".join(opened.stream(turns, sampling, images=light)).replace("�", "") in answers[0].text.replace("�", "")
        with pytest.raises(UserError, match="1 places for an image and 0 images"):
            opened.generate([turns], sampling)
        with pytest.raises(UserError, match="after an image"):
            opened.generate([turns], Sampling(choices=("1", "2")), images=[light])


def test_an_adapter_is_merged_into_the_file(made, tmp_path):
    from peft import LoraConfig, get_peft_model

    from supertrainer.run.gguf_cache import gguf_of

    _, tokenizer, _ = made
    save(made[0], tokenizer, tmp_path / "base")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"),
                             LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    save(adapted, tokenizer, tmp_path / "adapter")
    file, base = gguf_of(ModelSpec(tmp_path / "adapter")), gguf_of(ModelSpec(tmp_path / "adapter", load="base"))
    assert file != base
    for path, model in ((file, adapted.merge_and_unload().eval()), (base, made[0])):
        with LlamaCppEngine.open(ModelSpec(path), parallel=1, threads=1, max_length=128) as opened:
            answer = opened.generate(ask("Hi"), {"max_new_tokens": 8})[0]
        assert list(answer.token_ids) == generated(model, tokenizer, "Hi", max_new_tokens=8)
