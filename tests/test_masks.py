"""Loss masks of templates without markers against markers; of random conversations against their turns; at edges."""

import re
from pathlib import Path

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from supertrainer.chat import (
    assistant_spans,
    check_masks,
    encode_chat,
    encode_chats,
    locate_turns,
    named_template,
    render,
    rendered_already,
    template_names,
)
from supertrainer.chat.frames import frame_of
from supertrainer.chat.rendering import renderer_of
from supertrainer.runtime import UserError

TRL = Path(trl.__file__).parent / "chat_templates"
TWINS = sorted(path.stem for path in TRL.glob("*.jinja") if (TRL / f"{path.stem}_training.jinja").exists())
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"]
TEXTS = ["What does `textwrap.dedent` do?\n\n", "user assistant system model USER: ASSISTANT:", "  indented\n\n  lines\n\n\n",
         "### Instruction:\n### Response:\n", "a  b   c"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def byte_level(template):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def sentencepiece_like(template):
    """As Llama 2's: spaces are a letter, one is put before every text, unknown characters fall back to bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    backend.train_from_iterator([text.replace("\n", " ") for text in TEXTS] * 3, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


def bare(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


# ---- templates as models ship them, against TRL's versions of them with markers -----------------------------------

TOOLS = [{"type": "function", "function": {"name": "rain", "description": "Rain?", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]
CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "rain", "arguments": {"city": "Zürich"}}}]
TURNS = [user("Hi there"), assistant("Yo"), user("And then?"), assistant("  Two\n\nlines ")]
CASES = {
    "one": TURNS[:2], "turns": TURNS, "system": [{"role": "system", "content": "Be brief."}, *TURNS],
    "open end": [*TURNS, user("Bye")], "same answers": [user("a"), assistant("a"), user("a"), assistant("a")],
    "reasoning": [user("q"), assistant("<think>\nhm\n</think>\n\nYo"), user("r"), assistant("<think>\nso\n</think>\n\nEnd")],
    "call": [user("Rain?"), {"role": "assistant", "content": None, "tool_calls": CALL},
             {"role": "tool", "name": "rain", "tool_call_id": "abcdefghi", "content": "wet"}, assistant("Yes, rain.")]}


def plain_and_marked(name):
    return tuple(byte_level((TRL / f"{stem}.jinja").read_text("utf-8")) for stem in (name, f"{name}_training"))


@pytest.mark.parametrize("name", TWINS)
def test_derived_spans_are_the_marked_ones(name):
    """Where both versions write the same text, ours agree on both; and against TRL's raw markers, only headers, line
    breaks after the end of turn, and a closing eos token are left out: the boundary is ours (see chat.turns)."""
    plain, marked = plain_and_marked(name)
    frame, compared = frame_of(renderer_of(plain)), 0
    for case, messages in CASES.items():
        tools = TOOLS if case == "call" else None
        try:
            (text,), (blocks,) = renderer_of(marked).run([messages], tools)
            same = renderer_of(plain).run([messages], tools)[0] == [text]
        except UserError:
            continue  # the template has no such turns
        if not same:
            continue  # the version with markers writes another text
        try:
            _, spans = assistant_spans(plain, messages, tools=tools)
        except UserError as error:
            assert "leaves out the tool calls" in str(error) and "Zürich" not in text  # the template drops them silently
            continue
        found = [[text[a:b] for a, b in pieces] for pieces in (assistant_spans(marked, messages, tools=tools)[1], spans)]
        if name == "glm4moe":  # ends no turn; TRL trains the next turn's header in place of an end
            found[0] = [re.sub(r"<\|(user|observation)\|>$", "", piece) for piece in found[0]]
            blocks = [(a, b - len(re.search(r"(<\|(user|observation)\|>)?$", text[a:b]).group())) for a, b in blocks]
        assert "".join(found[0]) == "".join(found[1])  # some write content and end of turn as two blocks
        inside, theirs = ({place for a, b in pieces for place in range(a, b)} for pieces in (spans, blocks))
        if name == "diffusion_gemma":  # Gemma 4 stops a call on the token that opens the result, so we train it
            inside = {place for place in inside if not any(a <= place < a + 16 for a in
                                                           [match.start() for match in re.finditer(r"<\|tool_response>", text)])}
        assert inside <= theirs
        left_out = "".join(text[place] if place in theirs - inside else "\0" for place in range(len(text)))
        for piece in filter(None, left_out.split("\0")):
            assert piece.strip() in frame.header or piece.strip() in ("</s>", "<｜tool▁outputs▁end｜>"), piece
        assert len(spans) >= sum(message["role"] == "assistant" for message in messages)
        compared += 1
    assert compared >= (1 if name in ("glm4moe", "qwen3") else 2), compared  # some twins write another text in most cases


def test_twins_are_there():
    assert {"llama3", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "smolvlm", "deepseekv3", "glm4moe", "cohere", "gptoss"} <= set(TWINS)


ANSWERS = {  # what carries loss, by hand, for templates whose twins write another text or none exists
    "qwen3": ["Yo<|im_end|>", "<think>\n\n</think>\n\n  Two\n\nlines <|im_end|>"],
    "glm4moe": ["\n<think></think>\nYo", "\n<think></think>\nTwo\n\nlines"],
    "gemma4": ["Yo<turn|>", "Two\n\nlines<turn|>"],
    "llama3_1": ["Yo<|eot_id|>", "Two\n\nlines<|eot_id|>"],
    "gptoss": ["<|channel|>final<|message|>Yo<|end|>", "<|channel|>final<|message|>  Two\n\nlines <|return|>"],
    "deepseekv3": ["Yo<｜end▁of▁sentence｜>", "  Two\n\nlines <｜end▁of▁sentence｜>"],
    "deepseek_r1_distill": ["Yo<｜end▁of▁sentence｜>", "  Two\n\nlines <｜end▁of▁sentence｜>"],
    "smolvlm": [" Yo<end_of_utterance>", "   Two\n\nlines <end_of_utterance>"],
    "cohere2": ["Yo<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "  Two\n\nlines <|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
    "qwen3_5_think": ["Yo<|im_end|>", "\n</think>\n\nTwo\n\nlines<|im_end|>"],
    "llava_next": [" Yo</s>", "   Two\n\nlines </s>"],
}
CALLS = {
    "qwen2_5": '<tool_call>\n{"name": "rain", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "rain", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
    "llama3_1": '{"name": "rain", "parameters": {"city": "Zürich"}}<|eot_id|>',
    "gptoss": ' to=functions.rain<|channel|>commentary json<|message|>{"city": "Zürich"}<|call|>',
    "deepseekv3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n```json\n{"city": "Zürich"}\n```'
                  "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    "glm4moe": "\n<think></think>\n<tool_call>rain\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n</tool_call>",
    "lfm2_v2": "<|tool_call_start|>[rain(city='Zürich')]<|tool_call_end|><|im_end|>",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_shipped_templates_by_hand(name):
    text, spans = assistant_spans(byte_level((TRL / f"{name}.jinja").read_text("utf-8")), TURNS)
    assert [text[a:b] for a, b in spans] == ANSWERS[name]


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_of_shipped_templates_by_hand(name):
    tokenizer = byte_level((TRL / f"{name}.jinja").read_text("utf-8"))
    text, spans = assistant_spans(tokenizer, CASES["call"], tools=TOOLS)
    assert text[slice(*spans[0])] == CALLS[name] and "Yes, rain." in text[slice(*spans[1])] and len(spans) == 2
    as_text = [{**turn, "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "rain", "arguments": '{"city": "Zürich"}'}}]}
               if turn.get("tool_calls") else turn for turn in CASES["call"]]
    assert assistant_spans(tokenizer, as_text, tools=TOOLS) == (text, spans)  # OpenAI's files hold arguments as text


def test_a_template_that_ends_no_turn_fails_its_check():
    tokenizer = byte_level((TRL / "glm4moe.jinja").read_text("utf-8"))
    decodes, ends, _ = check_masks(tokenizer, [TURNS])
    assert decodes.passed and not ends.passed and ends.measured == 2 and "never learn to stop" in ends.detail


def test_reasoning_keys_are_rendered_and_trained():
    tokenizer = byte_level((TRL / "qwen3.jinja").read_text("utf-8"))
    messages = [user("q"), assistant("End", reasoning_content="so")]
    text, spans = assistant_spans(tokenizer, messages)
    assert [text[a:b] for a, b in spans] == ["<think>\nso\n</think>\n\nEnd<|im_end|>"]
    assert all(check.passed for check in check_masks(tokenizer, [messages]))


# ---- random conversations -----------------------------------------------------------------------------------------

NASTY = ["### Response:\n", "ASSISTANT:", " USER: ", "assistant\n", "model\n", "\n\n", " ", "<think>", "<|", "</", "[INST", "é🙂", "ﷺ",
         "\u200b", "\ufeff", "​\u202e", "\U00100000", "<b>", "{{ bos_token }}", "{% raw %}", "\\n", "qzxaqzx"]
PIECE = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), include_characters="\n\t <|>"), max_size=12)
TEXT = st.lists(PIECE | st.sampled_from(NASTY), max_size=3).map("".join)
SAID = TEXT.filter(lambda text: text.strip() and "</think>" not in text)
ROUNDS = st.lists(st.tuples(SAID, SAID | st.sampled_from(["", " ", "\n"])), min_size=1, max_size=3)
NAMED = {name: {"marked": byte_level(named_template(name).text), "derived": byte_level(bare(named_template(name).text))}
         for name in template_names()}


def expected_answer(name, text, last):
    """What each named template makes of an answer, in words of its own."""
    if name in ("llama-3", "llama-3.1", "gemma", "gemma-3"):
        return text.strip()
    if name == "llama-2":
        return f" {text.strip()} "
    if name in ("mistral", "vicuna"):
        return f" {text}"
    if name == "qwen-3" and last:
        return "<think>\n\n</think>\n\n" + text.lstrip("\n")
    return text


def trained_runs(tokenizer, encoded):
    runs, inside = [], False
    for token, loss in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if loss and not inside:
            runs.append([])
        if loss:
            runs[-1].append(token)
        inside = loss
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("way", ["marked", "derived"])
@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=ROUNDS, system=st.none() | st.just("") | SAID)
def test_masks_decode_to_the_assistants_turns(name, way, rounds, system):
    tokenizer = NAMED[name][way]
    messages = [] if system is None or name == "gemma" else [{"role": "system", "content": system}]
    for question, answer in rounds:
        messages += [user(question), assistant(answer)]
    if any(rendered_already(tokenizer, message["content"]) for message in messages):
        with pytest.raises(UserError, match="rendered already"):
            encode_chat(tokenizer, messages)
        return
    encoded = encode_chat(tokenizer, messages)
    stop = named_template(name).stop.replace("eos_token", "</s>")
    expected = [expected_answer(name, answer, place == len(rounds) - 1) + stop for place, (_, answer) in enumerate(rounds)]
    assert trained_runs(tokenizer, encoded) == expected
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, messages)
    assert [tokenizer.decode(encoded.input_ids[end - 1]) for end in encoded.ends] == [stop] * len(rounds)
    assert all(check.passed for check in check_masks(tokenizer, [messages]))
    assert sum(total for total, _ in encoded.roles.values()) == len(encoded.input_ids)
    assert encoded.roles["assistant"] == (sum(encoded.loss_mask),) * 2


@pytest.mark.parametrize("name", ["chatml", "llama-2", "mistral", "vicuna", "zephyr", "alpaca"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_masks_hold_for_tokenizers_that_add_spaces(name, rounds):
    tokenizer = SPACED[name]
    messages = [turn for question, answer in rounds for turn in (user(question), assistant(answer))]
    if any(rendered_already(tokenizer, message["content"]) for message in messages):
        return
    encoded = encode_chat(tokenizer, messages)
    text, spans = assistant_spans(tokenizer, messages)
    # such a tokenizer puts a space after every special token, too: spaces are not compared
    assert [squeezed(run) for run in trained_runs(tokenizer, encoded)] == [squeezed(text[a:b]) for a, b in spans]
    assert len(encoded.ends) == len(rounds) and all(encoded.loss_mask[end - 1] for end in encoded.ends)
    assert squeezed(tokenizer.decode(encoded.input_ids)) == squeezed(text)


def squeezed(text):
    return text.replace("▁", "").replace(" ", "")


SPACED = {name: sentencepiece_like(bare(named_template(name).text)) for name in ("chatml", "llama-2", "mistral", "vicuna", "zephyr", "alpaca")}


# ---- boundaries ---------------------------------------------------------------------------------------------------

SMOL = NAMED["smollm2"]["derived"]


@pytest.mark.parametrize("answer", ["\n\nYo", "\nYo", " Yo", "\n", "Yo\n\n\n", "  "])
def test_no_token_lies_across_a_boundary(answer):
    encoded = encode_chat(SMOL, [user("Hi"), assistant(answer)])
    prompt = SMOL(render(SMOL, [user("Hi")], add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt and not any(encoded.loss_mask[: len(prompt)])
    assert trained_runs(SMOL, encoded) == [answer + "<|im_end|>"]


def test_train_on_chooses_turns_and_messages_overrule_it():
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")]

    def trained(messages, **options):
        return trained_runs(SMOL, encode_chat(SMOL, messages, **options))

    end = "<|im_end|>"
    assert trained(messages) == ["b" + end, "d" + end]
    assert trained(messages, train_on="last_assistant") == ["d" + end]
    assert trained(messages, train_on="all") == [text + end for text in "Sabcd"]
    assert trained(messages, train_on=["user", "system"]) == [text + end for text in "Sac"]
    assert trained([*messages[:2], assistant("b", train=False), *messages[3:]]) == ["d" + end]
    assert trained([*messages[:2], assistant("b", weight=0), *messages[3:]]) == ["d" + end]
    assert trained([messages[0], {**messages[1], "train": True}, messages[2]]) == ["a" + end, "b" + end]
    for choice in ("assistant", "last_assistant", "all", ["user"]):
        assert all(check.passed for check in check_masks(SMOL, [messages], train_on=choice))
    with pytest.raises(UserError, match="train_on='assitant' is unknown.*Did you mean 'assistant'"):
        encode_chat(SMOL, messages, train_on="assitant")
    with pytest.raises(UserError, match="Turn 2: train='no'"):
        encode_chat(SMOL, [user("a"), assistant("b", train="no")])


def test_weights_stand_on_the_tokens_of_their_turn():
    encoded = encode_chat(SMOL, [user("a"), assistant("b", weight=0.25), user("c"), assistant("d")])
    assert encode_chat(SMOL, TURNS).weights is None
    by_token = {SMOL.decode([token]): weight for token, weight in zip(encoded.input_ids, encoded.weights, strict=True)}
    assert (by_token["b"], by_token["d"], by_token["a"]) == (0.25, 1.0, 0.0)
    assert [weight > 0 for weight in encoded.weights] == encoded.loss_mask and len(encoded.ends) == 2


def test_train_and_weight_never_reach_the_template():
    nosy = byte_level("{% for m in messages %}{{ m['role'] + '|' + m['content'] + ('!' if m.train is defined or m.weight is defined "
                      "else '') + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}")
    assert "!" not in render(nosy, [user("a"), assistant("b", train=True, weight=2)])


def test_rows_keep_their_places_and_errors():
    rows = [TURNS, [user("a"), assistant("x<|im_end|>")], TURNS[:2], [user("a"), {"role": "assistant"}], []]
    found = encode_chats(SMOL, rows)
    assert found[0] == encode_chat(SMOL, TURNS) and found[2] == encode_chat(SMOL, TURNS[:2])
    assert "Turn 2 (assistant) holds '<|im_end|>'" in str(found[1]) and isinstance(found[3], UserError)
    many = encode_chats(SMOL, [TURNS, TURNS[:2]] * 1100)  # more than one batch
    assert many[0::2] == [found[0]] * 1100 and many[1::2] == [found[2]] * 1100


def test_tools_are_shared_or_given_by_row():
    tokenizer = NAMED["qwen-2.5"]["derived"]
    with_tools, without = encode_chat(tokenizer, TURNS, tools=TOOLS), encode_chat(tokenizer, TURNS)
    assert encode_chats(tokenizer, [TURNS, TURNS], tools=TOOLS) == [with_tools, with_tools]
    assert encode_chats(tokenizer, [TURNS, TURNS], tools=[None, TOOLS]) == [without, with_tools]
    assert len(with_tools.input_ids) > len(without.input_ids) and "rain" in tokenizer.decode(with_tools.input_ids)


# ---- what cannot be known is refused -------------------------------------------------------------------------------

CHATML = bare(named_template("chatml").text)


@pytest.mark.parametrize(("template", "messages", "problem"), [
    (CHATML.replace("message['content'] +", "message['content'] | upper +"), TURNS, "does not print contents as they are"),
    (CHATML.replace("{%- for message in messages -%}", "{%- for message in messages if message['role'] != 'tool' -%}"), CASES["call"],
     "leaves out"),
    (CHATML.replace("{%- for message in messages -%}", "{%- for message in messages if message['role'] != 'tool' -%}"),
     [*TURNS, {"role": "tool", "content": "wet"}], r"leaves out the content of turn 5 \(tool\)"),
    (CHATML.replace("message['content'] +", "message['content'][:20] +"), [user("a"), assistant("b" * 30)], r"leaves out .* of turn 2 \(assistant\)"),
    (named_template("chatml").text.replace("{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
                                           "{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}{{- message['tool_calls'][0]"
                                           "['function']['name'] if message['tool_calls'] else '' -}}{{- '<|im_end|>' -}}"),
     [user("a"), {**CASES["call"][1], "content": "b"}], r"generation %} block in turn 2 stops before 'rain.*would not be trained"),
    (named_template("chatml").text.replace("{%- else -%}\n        {{-", "{%- else -%}{%- generation -%}{{-")
     .replace("+ '<|im_end|>\\n' -}}\n    {%- endif", "+ '<|im_end|>\\n' -}}{%- endgeneration -%}\n    {%- endif"),
     TURNS, "which the assistant does not say"),
], ids=["upper case", "call dropped", "tool dropped", "cut", "markers stop short", "user marked"])
def test_what_cannot_be_located_is_refused(template, messages, problem):
    with pytest.raises(UserError, match=problem):
        locate_turns(byte_level(template), messages)


@pytest.mark.parametrize("replaced", [
    ("+ '<|im_end|>' -}}{%- endgeneration -%}", "-}}{%- endgeneration -%}{{- '<|im_end|>' -}}"),
    ("{{- '<|im_start|>' + message['role'] + '\\n' -}}\n    {%- if message['role'] == 'assistant' -%}\n        {%- generation -%}",
     "{%- if message['role'] != 'assistant' -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}{%- endif -%}"
     "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- '<|im_start|>assistant\\n' -}}"),
    ("{%- endgeneration -%}\n        {{- '\\n' -}}", "{{- '\\n' -}}{%- endgeneration -%}"),
], ids=["end left out", "header marked", "line break marked"])
def test_markers_are_brought_to_the_boundary(replaced):
    template = named_template("chatml").text
    assert replaced[0] in template
    changed = byte_level(template.replace(*replaced))
    assert render(changed, TURNS) == render(NAMED["chatml"]["marked"], TURNS)
    assert encode_chat(changed, TURNS) == encode_chat(NAMED["chatml"]["marked"], TURNS)
