"""`fast_generate`, `SamplingParams`, `save_lora` and `load_lora` as notebooks that expect vLLM call them."""

import sys
import types
from pathlib import Path

import pytest
import torch

from supertrainer.runtime import UserError
from supertrainer.unsloth import FastLanguageModel, FastVisionModel, LoRARequest, SamplingParams
from supertrainer.unsloth.generation import answering_with, as_params

sys.path.insert(0, str(Path(__file__).parent))
import tiny_unsloth  # noqa: E402
from tiny_unsloth import change, disturb, snapshot  # noqa: E402

GREEDY = {"temperature": 0.0, "max_tokens": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_unsloth.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def adapted(llama):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64, dtype="float32", fast_inference=True,
                                                         max_lora_rank=32, gpu_memory_utilization=0.6)
    return disturb(FastLanguageModel.get_peft_model(model, r=8)), tokenizer


def prompt_of(tokenizer, text="What is two and two?"):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def by_hand(model, tokenizer, text, new=8):
    """Greedy tokens by the model's own forward, one at a time, until the end of a turn."""
    ids, ends = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"], model.generation_config.eos_token_id
    ends, start = ends if isinstance(ends, list) else [ends], ids.shape[1]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) in ends:
                break
    return ids[0, start:].tolist()


def test_saved_adapter_answers_and_nothing_else_changes(adapted, in_tmp):
    model, tokenizer = adapted
    text, grads = prompt_of(tokenizer), {name: value.requires_grad for name, value in model.named_parameters()}
    trained = by_hand(model, tokenizer, text)
    with model.disable_adapter():
        base = by_hand(model, tokenizer, text)
    assert trained != base
    model.save_lora("grpo_saved_lora")
    disturb(model, seed=1)  # trained on since
    before, names = snapshot(model), [name for name, _ in model.named_modules()]

    output = model.fast_generate(text, sampling_params=SamplingParams(**GREEDY), lora_request=model.load_lora("grpo_saved_lora"))
    assert list(output[0].outputs[0].token_ids) == trained
    assert output[0].outputs[0].text == tokenizer.decode(trained, skip_special_tokens=True)
    assert output[0].prompt == text and output[0].finished
    assert output[0].prompt_token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    output = model.fast_generate([text], sampling_params=SamplingParams(**GREEDY), lora_request=None)
    assert list(output[0].outputs[0].token_ids) == base

    assert not change(before, model) and [name for name, _ in model.named_modules()] == names
    assert {name: value.requires_grad for name, value in model.named_parameters()} == grads
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]


def test_a_request_keeps_what_it_read(adapted, in_tmp):
    model, tokenizer = adapted
    text = prompt_of(tokenizer)
    model.save_lora("weights")
    request, first = model.load_lora("weights"), by_hand(model, tokenizer, text)
    disturb(model, seed=5)
    model.save_lora("weights")
    again = model.load_lora("weights")
    assert again.lora_int_id != request.lora_int_id and isinstance(request, LoRARequest)
    assert list(model.fast_generate(text, GREEDY, lora_request=request)[0].outputs[0].token_ids) == first
    # vLLM's own request holds a path only
    named = types.SimpleNamespace(lora_name="x", lora_int_id=1, lora_path="weights")
    answers = [model.fast_generate(text, GREEDY, lora_request=given)[0].outputs[0].token_ids for given in (again, named)]
    assert answers[0] == answers[1] == tuple(by_hand(model, tokenizer, text))


def test_requests_of_other_ranks_and_on_a_model_without_adapter(adapted, llama, in_tmp):
    model, tokenizer = adapted
    text = prompt_of(tokenizer)
    model.save_lora("eight")
    trained = tuple(by_hand(model, tokenizer, text))
    other = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(llama, dtype="float32")[0], r=2,
                                             target_modules=["q_proj"])
    assert other.fast_generate(text, GREEDY, lora_request=other.load_lora("eight"))[0].outputs[0].token_ids == trained
    plain, _ = FastLanguageModel.from_pretrained(llama, dtype="float32")
    base, before, kept = tuple(by_hand(plain, tokenizer, text)), snapshot(plain), set(plain.__dict__)
    assert plain.fast_generate(text, GREEDY, lora_request=plain.load_lora("eight"))[0].outputs[0].token_ids == trained
    assert plain.fast_generate(text, GREEDY)[0].outputs[0].token_ids == base
    assert list(snapshot(plain)) == list(before) and not change(before, plain)
    assert not (set(plain.__dict__) - kept) - {"_hf_peft_config_loaded"}
    assert all(value.requires_grad for value in plain.parameters())


def test_an_error_while_answering_leaves_the_model_as_it_was(adapted, in_tmp):
    model, _ = adapted
    model.save_lora("weights")
    request, before = model.load_lora("weights"), snapshot(model)
    with pytest.raises(RuntimeError, match="in between"), answering_with(model, request):
        raise RuntimeError("in between")
    assert not change(before, model) and model.active_adapters == ["default"] and list(model.peft_config) == ["default"]


def test_adapters_that_do_not_fit(adapted, in_tmp):
    model, _ = adapted
    with pytest.raises(UserError, match="holds no adapter"):
        model.load_lora("nothing")
    wide, _ = FastLanguageModel.from_pretrained("tiny_llama", texts=tiny_unsloth.WORDS, config={"hidden_size": 64})
    wide = FastLanguageModel.get_peft_model(wide, r=2)
    wide.save_lora("wide")
    with pytest.raises(UserError, match="not of this model's shape: it has base_model"):
        model.load_lora("wide")
    with pytest.raises(UserError, match="r=64 is more than max_lora_rank=32"):
        FastLanguageModel.get_peft_model(model.get_base_model(), r=64)


def test_sampling_is_seeded_and_shaped(adapted):
    model, tokenizer = adapted
    texts = [prompt_of(tokenizer), prompt_of(tokenizer, "Be brief."), "Once upon a time"]
    params = SamplingParams(temperature=1.5, top_p=0.95, top_k=-1, min_p=0.01, seed=3407, max_tokens=6, n=3)
    state = torch.get_rng_state()
    first, second = model.fast_generate(texts, sampling_params=params), model.fast_generate(texts, params, use_tqdm=False)
    assert [output.outputs for output in first] == [output.outputs for output in second]
    assert torch.equal(state, torch.get_rng_state())
    assert [output.prompt for output in first] == texts and [len(output.outputs) for output in first] == [3, 3, 3]
    assert [answer.index for answer in first[0].outputs] == [0, 1, 2]
    assert len({answer.token_ids for output in first for answer in output.outputs}) > 3
    params.seed = 1
    assert [output.outputs for output in model.fast_generate(texts, params)] != [output.outputs for output in first]
    for answer in (answer for output in first for answer in output.outputs):
        assert len(answer.token_ids) <= 6 and (answer.finish_reason == "stop" or len(answer.token_ids) == 6)


@pytest.mark.parametrize(("options", "kept"), [
    ({"top_k": 1}, 1), ({"min_p": 1.0}, 1), ({"top_p": 1e-6}, 1), ({"top_k": 2}, 2)])
def test_what_narrows_the_draw(adapted, options, kept):
    """Many draws of one token come from no more than the likeliest `kept`."""
    model, tokenizer = adapted
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        likeliest = model.eval()(ids).logits[0, -1].topk(kept).indices.tolist()
    params = SamplingParams(n=40, max_tokens=1, seed=0, temperature=2.0, **options)
    drawn = {answer.token_ids[0] for answer in model.fast_generate("Once upon a time", params)[0].outputs}
    assert drawn == set(likeliest)


def test_stops(adapted):
    model, tokenizer = adapted
    free = model.fast_generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    text, tokens = free.text, free.token_ids
    assert free.finish_reason == "length" and len(tokens) == 12
    piece = text[len(text) // 2:][:3]
    cut = text.index(piece)
    asked = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    out = model.fast_generate("Once upon a time", SamplingParams(stop=[piece, "never there"], **asked))[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == (text[:cut], "stop", piece)
    out = model.fast_generate("Once upon a time", SamplingParams(stop=piece, include_stop_str_in_output=True, **asked))[0]
    assert out.outputs[0].text == text[:cut] + piece
    end = tokens[4]
    out = model.fast_generate("Once upon a time", SamplingParams(stop_token_ids=[end], **asked))[0].outputs[0]
    first = tokens.index(end)
    assert out.token_ids == tokens[:first + 1] and (out.finish_reason, out.stop_reason) == ("stop", end)
    with model.disable_adapter():
        late = model.fast_generate("Once upon a time", SamplingParams(stop_token_ids=[end], min_tokens=first + 2, **asked))[0]
    assert len(late.outputs[0].token_ids) >= first + 2


def test_prompts_of_every_kind(adapted):
    model, tokenizer = adapted
    params, ids = SamplingParams(**GREEDY), tokenizer("Be brief.")["input_ids"]
    expected = model.fast_generate("Be brief.", params)[0].outputs
    for prompts in (["Be brief."], {"prompt": "Be brief."}, [{"prompt": "Be brief."}], ids, [ids], {"prompt_token_ids": ids}):
        assert model.fast_generate(prompts, params)[0].outputs == expected
    assert model.fast_generate([], params) == []
    begin = tokenizer.bos_token or ""
    both = model.fast_generate([f"{begin}Be brief.", "What is two and two? It is four. Be brief. Red is one."] * 5, params)
    assert len(both) == 10 and both[0].outputs == both[8].outputs  # rows of a padded batch answer as alone
    assert both[0].outputs[0].token_ids == model.fast_generate(f"{begin}Be brief.", params)[0].outputs[0].token_ids
    for wrong in ({"text": "x"}, [3.5], {"prompt": "x", "multi_modal_data": {"audio": 1}}):
        with pytest.raises(UserError, match="cannot read this prompt"):
            model.fast_generate(wrong if isinstance(wrong, dict) else [wrong], params)
    with pytest.raises(UserError, match="exceed the 64 tokens"):
        model.fast_generate("Be brief. " * 40, params)
    with pytest.raises(UserError, match="priority=1"):
        model.fast_generate("x", params, priority=1)


def test_begins_once(llama):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = FastLanguageModel.from_pretrained(llama)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    ids = [model.fast_generate(text, GREEDY)[0].prompt_token_ids for text in ("Be brief.", f"{bos}Be brief.")]
    assert ids[0] == ids[1] and ids[0].count(tokenizer.bos_token_id) == 1


def test_pictures(in_tmp):
    from PIL import Image

    model, processor = FastVisionModel.from_pretrained("tiny_idefics3", texts=tiny_unsloth.WORDS)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name a colour, please."}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    picture = Image.new("RGB", (32, 32), "red")
    prompts = [{"prompt": text, "multi_modal_data": {"image": picture}}, "Be brief."]
    with_picture, without = model.fast_generate(prompts, SamplingParams(temperature=0, max_tokens=4))
    inputs = processor(images=[picture], text=text, add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    assert list(with_picture.outputs[0].token_ids) == expected[:len(with_picture.outputs[0].token_ids)]
    assert without.prompt == "Be brief." and with_picture.prompt == text


@pytest.mark.parametrize(("options", "message"), [
    ({"presence_penalty": 0.5}, "presence_penalty=0.5"), ({"logprobs": 3}, "logprobs=3"),
    ({"temprature": 0.5}, "temprature=0.5. Did you mean 'temperature'"), ({"top_p": 0.0}, "top_p=0.0 must be"),
    ({"min_p": 1.5}, "min_p=1.5 must be"), ({"n": 0}, "n=0 must be"), ({"max_tokens": 0}, "max_tokens=0 must be"),
    ({"temperature": 0, "n": 2}, "would all be the same"), ({"logit_bias": {3: 1.0}}, "logit_bias"),
])
def test_sampling_that_cannot_be_honoured_is_named(options, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)


def test_parameters_of_vllms_own_class():
    class Struct:  # as msgspec makes them: fields with defaults, and a method beside them
        __struct_fields__ = ("temperature", "top_k", "max_tokens", "presence_penalty", "output_kind", "_all_stop_token_ids")

        def __init__(self, **given):
            values = {"temperature": 1.0, "top_k": 0, "max_tokens": 16, "presence_penalty": 0.0, "output_kind": 1,
                      "_all_stop_token_ids": set()}
            for name, value in {**values, **given}.items():
                setattr(self, name, value)

    read = as_params(Struct(temperature=0.3, max_tokens=5, output_kind=2, _all_stop_token_ids={4}))
    assert (read.temperature, read.max_tokens, read.top_k, read.n) == (0.3, 5, 0, 1)
    with pytest.raises(UserError, match="presence_penalty=0.2"):
        as_params(Struct(presence_penalty=0.2))
    assert as_params(None).max_tokens == 16 and "temperature=1.0" in repr(as_params(None))
