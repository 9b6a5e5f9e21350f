"""Named templates, token by token, against texts written by hand; against TRL's copies of the published ones; by name."""

import logging
import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from supertrainer.chat import (
    assistant_spans,
    check_masks,
    check_terminator,
    encode_chat,
    end_of_turn,
    get_chat_template,
    has_markers,
    locate_turns,
    named_template,
    render,
    suggest_template,
    template_names,
)
from supertrainer.runtime import UserError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"]
TRL = Path(trl.__file__).parent / "chat_templates"


def make_tokenizer(template=None, eos="</s>", special=SPECIAL, vocab_size=None):
    """A byte-level BPE tokenizer; without room for merges every byte is a token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["What does dedent do? user assistant\n\n"] * 3, trainers.BpeTrainer(
        vocab_size=vocab_size or 256 + len(special), special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if "<s>" in special else None, eos_token=eos,
                                   chat_template=template)


def bare(template: str) -> str:
    """The template without its markers: spans must then be derived."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def by_hand(tokenizer, marked: str):
    """Ids and mask of a text in which «…» carries loss: special tokens and bytes looked up one by one, none of our code."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's stand-ins for bytes (Radford et al. 2019)
    others = iter(range(256, 512))
    stand_in = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    ids, mask, inside = [], [], False
    while marked:
        if marked[0] in "«»":
            inside, marked = marked[0] == "«", marked[1:]
            continue
        special = next((token for token in sorted(SPECIAL, key=len, reverse=True) if marked.startswith(token)), None)
        units = [special] if special else [stand_in[byte] for byte in marked[0].encode()]
        marked = marked[len(special) if special else 1 :]
        ids += [tokenizer.convert_tokens_to_ids(unit) for unit in units]
        mask += [inside] * len(units)
    return ids, mask


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TOOLS = [{"type": "function", "function": {"name": "rain", "description": "Is it raining?", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "rain", "arguments": {"city": "Bern"}}}]}
TURNS = [user("Hi"), assistant("Yo"), user("And é?"), assistant(" 🙂\n")]
CASES = {"turns": TURNS, "system": [{"role": "system", "content": "Be brief."}, *TURNS[:2]],
         "empty system": [{"role": "system", "content": ""}, *TURNS[:2]],
         "tool call": [user("Rain?"), CALL, {"role": "tool", "content": "wet"}, assistant("Yes.")]}
NO_CALLS = "leaves out the tool calls of turn 2"
IM = "<|im_start|>"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_TOOLS = (
    '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures '
    'within <tools></tools> XML tags:\n<tools>\n{"type": "function", "function": {"name": "rain", "description": "Is it raining?", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}\n</tools>\n\nFor each '
    'function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n'
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
CALLED = '<tool_call>\n{"name": "rain", "arguments": {"city": "Bern"}}\n</tool_call>'
LLAMA_SYSTEM = HEAD.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_TOOLS = """Given the following functions, please respond with a JSON for a function call with its proper arguments that \
best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.

{
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Is it raining?",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            },
            "required": [
                "city"
            ]
        }
    }
}

"""
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
          "polite answers to the user's questions. ")


def chatml(*turns, sep="\n", after="\n"):
    """`chatml("user: Hi", "assistant: Yo")` with the assistant's turns marked."""
    pieces = []
    for role, text in (turn.split(": ", 1) for turn in turns):
        text += "<|im_end|>"
        pieces.append(f"{IM}{role}{sep}" + (f"«{text}»" if role == "assistant" else text) + after)
    return "".join(pieces)


EXPECTED = {
    "chatml": {
        "turns": chatml("user: Hi", "assistant: Yo", "user: And é?", "assistant:  🙂\n"),
        "system": chatml("system: Be brief.", "user: Hi", "assistant: Yo"),
        "empty system": chatml("system: ", "user: Hi", "assistant: Yo"),
        "tool call": NO_CALLS},
    "smollm2": {
        "turns": chatml(f"system: {SMOL}", "user: Hi", "assistant: Yo", "user: And é?", "assistant:  🙂\n"),
        "system": chatml("system: Be brief.", "user: Hi", "assistant: Yo"),
        "empty system": chatml("system: ", "user: Hi", "assistant: Yo"),
        "tool call": NO_CALLS},
    "phi-4": {
        "turns": chatml("user: Hi", "assistant: Yo", "user: And é?", "assistant:  🙂\n", sep="<|im_sep|>", after=""),
        "system": chatml("system: Be brief.", "user: Hi", "assistant: Yo", sep="<|im_sep|>", after=""),
        "empty system": chatml("system: ", "user: Hi", "assistant: Yo", sep="<|im_sep|>", after=""),
        "tool call": NO_CALLS},
    "qwen-2.5": {
        "turns": chatml(f"system: {QWEN}", "user: Hi", "assistant: Yo", "user: And é?", "assistant:  🙂\n"),
        "system": chatml("system: Be brief.", "user: Hi", "assistant: Yo"),
        "empty system": chatml("system: ", "user: Hi", "assistant: Yo"),
        "tool call": chatml(f"system: {QWEN}\n\n{QWEN_TOOLS}", "user: Rain?", f"assistant: {CALLED}",
                            "user: <tool_response>\nwet\n</tool_response>", "assistant: Yes.")},
    "qwen-3": {
        "turns": chatml("user: Hi", "assistant: Yo", "user: And é?", "assistant: <think>\n\n</think>\n\n 🙂\n"),
        "system": chatml("system: Be brief.", "user: Hi", "assistant: <think>\n\n</think>\n\nYo"),
        "empty system": chatml("system: ", "user: Hi", "assistant: <think>\n\n</think>\n\nYo"),
        "tool call": chatml(f"system: {QWEN_TOOLS}", "user: Rain?", f"assistant: {CALLED}",
                            "user: <tool_response>\nwet\n</tool_response>", "assistant: <think>\n\n</think>\n\nYes.")},
    "llama-3": {
        "turns": f"<s>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»"
                 f"{HEAD.format('user')}And é?<|eot_id|>{HEAD.format('assistant')}«🙂<|eot_id|>»",
        "system": f"<s>{HEAD.format('system')}Be brief.<|eot_id|>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»",
        "empty system": f"<s>{HEAD.format('system')}<|eot_id|>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»",
        "tool call": NO_CALLS},
    "llama-3.1": {
        "turns": f"<s>{LLAMA_SYSTEM}<|eot_id|>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»"
                 f"{HEAD.format('user')}And é?<|eot_id|>{HEAD.format('assistant')}«🙂<|eot_id|>»",
        "system": f"<s>{LLAMA_SYSTEM}Be brief.<|eot_id|>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»",
        "empty system": f"<s>{LLAMA_SYSTEM}<|eot_id|>{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}«Yo<|eot_id|>»",
        "tool call": f"<s>{LLAMA_SYSTEM}<|eot_id|>".replace("Cutting", "Environment: ipython\nCutting") + HEAD.format("user")
                     + LLAMA_TOOLS + f"Rain?<|eot_id|>{HEAD.format('assistant')}"
                     '«{"name": "rain", "parameters": {"city": "Bern"}}<|eot_id|>»'
                     f"{HEAD.format('ipython')}\"wet\"<|eot_id|>{HEAD.format('assistant')}«Yes.<|eot_id|>»"},
    "llama-2": {
        "turns": "<s>[INST] Hi [/INST]« Yo </s>»<s>[INST] And é? [/INST]« 🙂 </s>»",
        "system": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]« Yo </s>»",
        "empty system": "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nHi [/INST]« Yo </s>»",
        "tool call": "refuses a conversation.*Llama 2 has no tool turns|leaves out the tool calls"},
    "mistral": {
        "turns": "<s>[INST] Hi [/INST]« Yo</s>»[INST] And é? [/INST]«  🙂\n</s>»",
        "system": "<s>[INST] Be brief.\n\nHi [/INST]« Yo</s>»",
        "empty system": "<s>[INST] Hi [/INST]« Yo</s>»",
        "tool call": "refuses a conversation with the turns user, assistant, tool, assistant"},
    "gemma": {
        "turns": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
                 "<start_of_turn>user\nAnd é?<end_of_turn>\n<start_of_turn>model\n«🙂<end_of_turn>»\n",
        "system": "Gemma has no system turns", "empty system": "Gemma has no system turns",
        "tool call": "refuses a conversation with the turns user, assistant, tool, assistant"},
    "gemma-3": {
        "turns": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
                 "<start_of_turn>user\nAnd é?<end_of_turn>\n<start_of_turn>model\n«🙂<end_of_turn>»\n",
        "system": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n",
        "empty system": "<s><start_of_turn>user\n\n\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n",
        "tool call": "refuses a conversation with the turns user, assistant, tool, assistant"},
    "phi-3": {
        "turns": "<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n<|user|>\nAnd é?<|end|>\n<|assistant|>\n« 🙂\n<|end|>»\n",
        "system": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n",
        "empty system": "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n",
        "tool call": "Phi-3 has no tool turns|refuses a conversation"},
    "zephyr": {
        "turns": "<|user|>\nHi</s>\n<|assistant|>\n«Yo</s>»\n<|user|>\nAnd é?</s>\n<|assistant|>\n« 🙂\n</s>»\n",
        "system": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Yo</s>»\n",
        "empty system": "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Yo</s>»\n",
        "tool call": NO_CALLS},
    "alpaca": {
        "turns": f"<s>{ALPACA}### Instruction:\nHi\n\n### Response:\n«Yo</s>»\n\n### Instruction:\nAnd é?\n\n### Response:\n« 🙂\n</s>»\n\n",
        "system": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n«Yo</s>»\n\n",
        "empty system": "<s>### Instruction:\nHi\n\n### Response:\n«Yo</s>»\n\n",
        "tool call": "refuses a conversation with the turns user, assistant, tool, assistant"},
    "vicuna": {
        "turns": f"<s>{VICUNA}USER: Hi ASSISTANT:« Yo</s>»USER: And é? ASSISTANT:«  🙂\n</s>»",
        "system": "<s>Be brief. USER: Hi ASSISTANT:« Yo</s>»",
        "empty system": "<s>USER: Hi ASSISTANT:« Yo</s>»",
        "tool call": "refuses a conversation with the turns user, assistant, tool, assistant"},
}


def test_every_named_template_has_its_expectations():
    assert set(EXPECTED) == set(template_names()) and all(set(cases) == set(CASES) for cases in EXPECTED.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("marked", [True, False], ids=["markers", "derived"])
def test_tokens_and_mask_are_those_written_by_hand(name, case, marked):
    text = named_template(name).text
    tokenizer, expected = make_tokenizer(text if marked else bare(text)), EXPECTED[name][case]
    assert has_markers(tokenizer) == marked
    tools = TOOLS if case == "tool call" else None
    if "«" not in expected:
        with pytest.raises(UserError, match=expected):
            encode_chat(tokenizer, CASES[case], tools=tools)
        return
    ids, mask = by_hand(tokenizer, expected)
    encoded = encode_chat(tokenizer, CASES[case], tools=tools)
    assert tokenizer.decode(encoded.input_ids) == expected.replace("«", "").replace("»", "")
    assert encoded.input_ids == ids
    assert encoded.loss_mask == mask
    assert all(check.passed for check in check_masks(tokenizer, [CASES[case]], tools=tools))
    assert encoded.input_ids[:2].count(tokenizer.bos_token_id) <= 1
    stop = named_template(name).stop.replace("eos_token", "</s>")
    assert end_of_turn(tokenizer) == stop
    assert [tokenizer.decode(encoded.input_ids[end - 1]) for end in encoded.ends] == \
        [stop] * sum(message["role"] == "assistant" for message in CASES[case])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_untrained_prefix_is_the_inference_prompt(name):
    tokenizer = make_tokenizer(named_template(name).text)
    text, spans = assistant_spans(tokenizer, TURNS[:2])
    assert text[: spans[0][0]] == render(tokenizer, TURNS[:1], add_generation_prompt=True)


REFERENCES = {"llama-3": "llama3", "llama-3.1": "llama3_1", "gemma": "gemma", "gemma-3": "gemma3", "phi-3": "phi3",
              "qwen-2.5": "qwen2_5", "qwen-3": "qwen3"}
LONGER = [*CASES["tool call"], user("ok"), {**CALL, "content": "Let me see."}, {"role": "tool", "content": "a"},
          {"role": "tool", "content": "b"}, assistant("done")]
MORE = {**CASES, "edges": [user("  Hi\n"), assistant("\n yo \n")], "longer": LONGER,
        "reasoning": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("<think>\nso\n</think>\n\nd")],
        "reasoning key": [user("a"), {**assistant("b"), "reasoning_content": "hm\n"}],
        "two systems": [{"role": "system", "content": "a"}, user("b"), assistant("c")]}


@pytest.mark.parametrize(("name", "reference"), REFERENCES.items())
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("prompt", [False, True], ids=["text", "prompt"])
def test_text_is_that_of_the_published_template(name, reference, case, prompt):
    """TRL keeps copies of the templates that models ship (Apache-2.0); they are rendered here, not shipped."""
    ours, theirs = make_tokenizer(named_template(name).text), make_tokenizer((TRL / f"{reference}.jinja").read_text("utf-8"))
    tools = TOOLS if "tool" in case or case == "longer" else None
    try:
        expected = render(theirs, MORE[case], tools=tools, add_generation_prompt=prompt)
    except UserError:
        with pytest.raises(UserError):
            render(ours, MORE[case], tools=tools, add_generation_prompt=prompt)
        return
    if name == "phi-3" and any(message["role"] == "tool" for message in MORE[case]):
        pytest.skip("the published template drops these turns without a word; ours refuses them")
    if name == "phi-3" and not prompt:
        expected = expected.removesuffix("</s>")  # belongs to no turn, and would be a second end once eos is <|end|>
    assert render(ours, MORE[case], tools=tools, add_generation_prompt=prompt) == expected


def test_tools_stand_in_the_system_turn_beside_its_text():
    ours, theirs = (make_tokenizer(text) for text in (named_template("qwen-3").text, (TRL / "qwen3.jinja").read_text("utf-8")))
    for case in ("system", "empty system"):
        assert render(ours, CASES[case], tools=TOOLS) == render(theirs, CASES[case], tools=TOOLS)


# ---- get_chat_template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("special", [SPECIAL, ["<s>", "</s>"]], ids=["its tokens", "eos only"])
def test_the_model_can_always_stop(name, special):
    tokenizer = get_chat_template(make_tokenizer(special=special), name)
    stop = named_template(name).stop.replace("eos_token", "</s>")
    assert tokenizer.eos_token == end_of_turn(tokenizer) == (stop if stop in special else "</s>")
    assert check_terminator(tokenizer, [tokenizer.eos_token_id]).passed
    encoded = encode_chat(tokenizer, TURNS)
    assert [encoded.input_ids[end - 1] for end in encoded.ends] == [tokenizer.eos_token_id] * 2
    assert all(check.passed for check in check_masks(tokenizer, [TURNS]))


def test_without_a_stop_token_the_choice_is_refused_and_the_old_template_kept():
    tokenizer = make_tokenizer("{{ 'old' }}", eos=None, special=["<s>"])
    for name in ("chatml", "zephyr"):
        with pytest.raises(UserError, match="eos token"):
            get_chat_template(tokenizer, name)
    assert tokenizer.chat_template == "{{ 'old' }}"


def test_a_missing_stop_token_is_said(caplog):
    logger = logging.getLogger("supertrainer.chat")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", logger="supertrainer.chat"):
            get_chat_template(make_tokenizer(special=["<s>", "</s>"]), "chatml")
            get_chat_template(make_tokenizer(special=["<s>", "</s>"]), "chatml", map_eos_token=False)
    finally:
        logger.removeHandler(caplog.handler)
    said = "\n".join(caplog.messages)
    assert "'<|im_end|>' is not in the vocabulary: the template ends turns with the eos token '</s>' in its place" in said
    assert "'<|im_end|>', which ends turns, is not one token of the vocabulary" in said


def test_sharegpt_names_are_read_and_the_usual_ones_too():
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    for name in ("llama-3", "chatml", "gemma-3"):
        tokenizer = get_chat_template(make_tokenizer(), name, mapping=mapping)
        plain = get_chat_template(make_tokenizer(), name)
        theirs = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TURNS]
        assert tokenizer.apply_chat_template(theirs, tokenize=False) == render(tokenizer, TURNS) == render(plain, TURNS)
        assert encode_chat(tokenizer, TURNS) == encode_chat(plain, TURNS)
    with pytest.raises(UserError, match="unknown keys colour"):
        get_chat_template(make_tokenizer(), "chatml", mapping={"colour": "x"})


def test_names_files_texts_and_pairs(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(named_template("zephyr").text, "utf-8")
    for choice in ("Zephyr", str(path), path.read_text("utf-8"), (path.read_text("utf-8"), "</s>"), ("zephyr", "</s>")):
        assert get_chat_template(make_tokenizer(), choice).chat_template == named_template("zephyr").text
    with pytest.raises(UserError, match="known: chatml, .* Did you mean 'mistral'"):
        get_chat_template(make_tokenizer(), "mistrel")
    with pytest.raises(UserError, match="no chat template file"):
        get_chat_template(make_tokenizer(), str(tmp_path / "absent.jinja"))


@pytest.mark.parametrize(("special", "name"), [
    (["<|im_start|>", "<|im_end|>"], "chatml"), (["<|im_start|>", "<|im_end|>", "<tool_call>", "<think>"], "qwen-3"),
    (["<|im_start|>", "<|im_end|>", "<|im_sep|>"], "phi-4"), (["<start_of_turn>", "<end_of_turn>"], "gemma"),
    (["<|user|>", "<|assistant|>", "<|end|>"], "phi-3"), (["[INST]", "[/INST]"], "mistral"), ([], None),
    (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"], "llama-3.1")])
def test_a_missing_template_is_suggested_by_the_tokens(special, name):
    tokenizer = make_tokenizer(special=["<s>", "</s>", *special])
    assert suggest_template(tokenizer) == name
    with pytest.raises(UserError, match=f"has no chat template.*dataset.template={name or 'chatml'}"):
        encode_chat(tokenizer, TURNS)


def test_turns_of_other_roles_are_located_too():
    tokenizer = make_tokenizer(named_template("qwen-2.5").text)
    text, turns = locate_turns(tokenizer, CASES["tool call"], tools=TOOLS)
    assert [(turn.role, text[turn.content : turn.end]) for turn in turns] == [
        ("user", "Rain?<|im_end|>"), ("assistant", CALLED + "<|im_end|>"), ("tool", "wet"), ("assistant", "Yes.<|im_end|>")]
