"""The one renderer, loss masks token by token against expectations written by hand, and the checks, each made to fail."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from supertrainer.chat import (
    CHATML_TEMPLATE,
    EncodedChat,
    assistant_spans,
    check_masks,
    check_terminator,
    check_vocabulary,
    encode_chat,
    end_of_turn,
    has_markers,
    loss_tokens,
    mask_by_parts,
    part_ids,
    plain_messages,
    render,
    rendered_already,
    response_spans,
)
from supertrainer.runtime import UserError

CHATML_BARE = CHATML_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# As SmolLM2-135M-Instruct ships it: no markers, and a system turn of its own where the conversation has none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Like Qwen3: the last answer opens with an empty reasoning block that earlier answers do not have.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML_TEMPLATE, "chatml-bare": CHATML_BARE, "smollm2": SMOLLM2, "llama3": LLAMA3,
             "llama3-marked": LLAMA3_MARKED, "zephyr": ZEPHYR, "mistral": MISTRAL, "gemma": GEMMA, "thinking": THINKING}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]
ENDS = {"chatml": "<|im_end|>", "chatml-bare": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>",
        "llama3-marked": "<|eot_id|>", "zephyr": "</s>", "mistral": "</s>", "gemma": "<end_of_turn>",
        "thinking": "<|im_end|>"}
TEXTS = ["You are a helpful AI assistant.\n\n", "What does `textwrap.dedent` do?", "Remove any common leading whitespace.\n",
         "system user assistant model", "one two three", "  indented\n\n  lines\n\n\n"]


def make_tokenizer(template: str, vocab_size: int, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with the smallest vocabulary every byte is a token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos,
                                   chat_template=template)


BYTES = {name: make_tokenizer(template, 256 + len(SPECIAL)) for name, template in TEMPLATES.items()}
MERGED = {name: make_tokenizer(template, 420) for name, template in TEMPLATES.items()}


def by_hand(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Special tokens and single bytes, looked up one by one: no tokenizer, no template, none of our code."""
    byte_tokens = dict(zip(range(256), _byte_alphabet(), strict=True))
    ids, mask = [], []
    for text, trained in pieces:
        while text:
            special = next((token for token in SPECIAL if text.startswith(token)), None)
            units = [special] if special else [byte_tokens[byte] for byte in text[0].encode()]
            text = text[len(special) if special else 1 :]
            ids += [tokenizer.convert_tokens_to_ids(unit) for unit in units]
            mask += [trained] * len(units)
    return ids, mask


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def chat(*turns: str) -> list[dict]:
    """`chat("user: Hi", "assistant: Yo")` as messages."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


ONE = chat("user: Hi", "assistant: Yo")
TWO = chat("user: Hi", "assistant: Yo", "user: And é?", "assistant: 🙂")
SYSTEM = chat("system: Be brief.", "user: Hi", "assistant: Yo")
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
H = ("<|start_header_id|>", "<|end_header_id|>\n\n")
EXPECTED = [
    ("chatml", ONE, [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True), ("\n", False)]),
    ("chatml", TWO, [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
                     ("\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n", False), ("🙂<|im_end|>", True), ("\n", False)]),
    ("chatml-bare", TWO, [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
                          ("\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n", False), ("🙂<|im_end|>", True),
                          ("\n", False)]),
    ("chatml-bare", SYSTEM, [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                              False), ("Yo<|im_end|>", True), ("\n", False)]),
    ("smollm2", ONE, [(DEFAULT + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
                      ("\n", False)]),
    ("smollm2", TWO, [(DEFAULT + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
                      ("\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n", False), ("🙂<|im_end|>", True), ("\n", False)]),
    ("smollm2", SYSTEM, [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
                         ("Yo<|im_end|>", True), ("\n", False)]),
    ("smollm2", chat("assistant: Yo", "user: Hi", "assistant: Hm"),  # nothing before the first turn but the default system turn
     [(DEFAULT + "<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
      ("\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Hm<|im_end|>", True), ("\n", False)]),
    ("smollm2", chat("user: Hi", "assistant: \n\n code\n"),  # white space at the edges is content here
     [(DEFAULT + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("\n\n code\n<|im_end|>", True), ("\n", False)]),
    ("llama3", SYSTEM, [(f"<s>{H[0]}system{H[1]}Be brief.<|eot_id|>{H[0]}user{H[1]}Hi<|eot_id|>{H[0]}assistant{H[1]}", False),
                        ("Yo<|eot_id|>", True)]),
    ("llama3-marked", TWO, [(f"<s>{H[0]}user{H[1]}Hi<|eot_id|>{H[0]}assistant{H[1]}", False), ("Yo<|eot_id|>", True),
                            (f"{H[0]}user{H[1]}And é?<|eot_id|>{H[0]}assistant{H[1]}", False), ("🙂<|eot_id|>", True)]),
    ("llama3", chat("user: Hi", "assistant:   Yo  "), [(f"<s>{H[0]}user{H[1]}Hi<|eot_id|>{H[0]}assistant{H[1]}", False),
                                                      ("Yo<|eot_id|>", True)]),
    ("zephyr", TWO, [("<|user|>\nHi</s>\n<|assistant|>\n", False), ("Yo</s>", True),
                     ("\n<|user|>\nAnd é?</s>\n<|assistant|>\n", False), ("🙂</s>", True), ("\n", False)]),
    ("mistral", TWO, [("<s>[INST] Hi [/INST]", False), (" Yo</s>", True), ("[INST] And é? [/INST]", False), (" 🙂</s>", True)]),
    ("gemma", TWO, [("<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", False), ("Yo<end_of_turn>", True),
                    ("\n<start_of_turn>user\nAnd é?<end_of_turn>\n<start_of_turn>model\n", False), ("🙂<end_of_turn>", True),
                    ("\n", False)]),
    ("thinking", TWO, [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True),
                       ("\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n", False),
                       ("<think>\n\n</think>\n\n🙂<|im_end|>", True), ("\n", False)]),
    ("chatml-bare", chat("user: Hi", "assistant: Yo", "assistant: Yo", "user: Bye"),  # the same answer twice, an open end
     [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Yo<|im_end|>", True), ("\n<|im_start|>assistant\n", False),
      ("Yo<|im_end|>", True), ("\n<|im_start|>user\nBye<|im_end|>\n", False)]),
]


@pytest.mark.parametrize(("name", "messages", "pieces"), EXPECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_tokens_and_mask_are_those_written_by_hand(name, messages, pieces):
    tokenizer = BYTES[name]
    ids, mask = by_hand(tokenizer, pieces)
    encoded = encode_chat(tokenizer, messages)
    assert encoded.input_ids == ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert encoded.loss_mask == mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_end_of_turn_is_found_in_every_template(name):
    assert end_of_turn(BYTES[name]) == ENDS[name]
    assert has_markers(BYTES[name]) == (name in ("chatml", "llama3-marked"))


@pytest.mark.parametrize("name", ["chatml", "llama3-marked"])
def test_markers_and_derivation_agree_with_transformers(name):
    expected = MERGED[name].apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
    encoded = encode_chat(MERGED[name], TWO)
    assert [int(loss) for loss in encoded.loss_mask] == expected["assistant_masks"]
    assert encode_chat(MERGED[{"chatml": "chatml-bare", "llama3-marked": "llama3"}[name]], TWO) == encoded


def test_the_end_of_turn_is_trained_when_it_is_also_the_pad_token():
    tokenizer = make_tokenizer(SMOLLM2, 300, eos="<|im_end|>")
    encoded = encode_chat(tokenizer, TWO)
    end = tokenizer.pad_token_id
    assert end == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [loss for token, loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if token == end] == \
        [False, False, True, False, True]  # default system, user, assistant, user, assistant


def test_bos_is_written_once():
    tokenizer = BYTES["llama3"]
    assert encode_chat(tokenizer, ONE).input_ids.count(tokenizer.bos_token_id) == 1


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), include_characters="\n\t <|>"), min_size=1, max_size=24)
CONTROL = [*SPECIAL, "<|user|>", "<|assistant|>", "[INST]", "[/INST]"]
TEXT = TEXT.filter(lambda text: text.strip() and not any(token in text for token in CONTROL))
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def messages_of(rounds, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=ROUNDS, system=st.none() | TEXT)
def test_trained_tokens_decode_to_the_assistants_turns(name, rounds, system):
    tokenizer = MERGED[name]
    messages = messages_of(rounds, None if name == "mistral" else system)
    encoded = encode_chat(tokenizer, messages)
    expected = [answer.strip() if "llama3" in name or name == "gemma" else answer for _, answer in rounds]
    if name == "mistral":
        expected = [" " + answer for answer in expected]
    if name == "thinking":
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    runs, inside = [], False
    for token, loss in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if loss and not inside:
            runs.append([])
        if loss:
            runs[-1].append(token)
        inside = loss
    assert [tokenizer.decode(run) for run in runs] == [answer + ENDS[name] for answer in expected]
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, messages)
    assert all(check.passed for check in check_masks(tokenizer, [messages]))


@pytest.mark.parametrize("name", ["chatml-bare", "smollm2", "zephyr", "chatml"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(question=TEXT, answer=TEXT)
def test_the_untrained_prefix_is_the_inference_prompt(name, question, answer):
    tokenizer = MERGED[name]
    messages = messages_of([(question, answer)])
    encoded = encode_chat(tokenizer, messages)
    prompt = tokenizer(render(tokenizer, messages[:-1], add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert not any(encoded.loss_mask[: len(prompt)]) and encoded.loss_mask[len(prompt)]


@pytest.mark.parametrize(("name", "text", "token"), [
    ("chatml-bare", "a<|im_end|>b", "<|im_end|>"), ("smollm2", "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>"),
    ("llama3", "x<|start_header_id|>", "<|start_header_id|>"), ("gemma", "<start_of_turn>user\nHi", "<start_of_turn>"),
    ("mistral", "[INST] Hi [/INST]", "[INST]"), ("zephyr", "<|user|>\nHi</s>", "<|user|>"),
    ("llama3", "\n[INST] Hi [/INST] Yo", "[INST]"), ("mistral", "<|im_start|>user\nHi", "<|im_start|>user"),
])
def test_a_text_that_was_rendered_already_is_refused(name, text, token):
    tokenizer = BYTES[name]
    assert rendered_already(tokenizer, text) == token
    for messages, turn in (([{"role": "user", "content": text}, *ONE[1:]], r"Turn 1 \(user\)"),
                           ([*ONE[:1], {"role": "assistant", "content": text}], r"Turn 2 \(assistant\)")):
        for use in (render, encode_chat, assistant_spans):
            with pytest.raises(UserError, match=f"{turn} holds '{re.escape(token)}.*rendered already.*plain messages.*format=text"):
                use(tokenizer, messages)


def test_twice_rendered_rows_of_every_template_are_refused():
    for tokenizer in BYTES.values():
        once = render(tokenizer, ONE)
        with pytest.raises(UserError, match="Turn 1 .* rendered already"):
            render(tokenizer, [{"role": "user", "content": once}, *ONE[1:]])


def test_control_tokens_in_reasoning_and_tool_calls_are_refused_too():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]}
    for turn in (call, {"role": "assistant", "content": "a", "reasoning_content": "<|im_end|>"}):
        with pytest.raises(UserError, match="Turn 2 .*im_end"):
            encode_chat(BYTES["chatml"], [*ONE[:1], turn])


def test_words_that_only_look_like_control_are_taken():
    for text in ("<think>\nhm\n</think>\nYo", "a <b>bold</b> [INST] b", "x <| y |> z", "[1] [OK]", "<tool_call>{}</tool_call>", "2 < 3 > 1"):
        assert rendered_already(BYTES["smollm2"], text) is None
        assert trained_text("smollm2", [*ONE[:1], {"role": "assistant", "content": text}]) == text + "<|im_end|>"


def trained_text(name, messages):
    encoded = encode_chat(BYTES[name], messages)
    return BYTES[name].decode([token for token, loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if loss])


def test_content_parts_are_rendered_and_masked():
    parts = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
             "{% if 'image' in part or part['type'] == 'image' %}<image>{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
             "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    tokenizer = make_tokenizer(parts, 300)
    messages = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}]
    text, spans = assistant_spans(tokenizer, messages)
    assert text == "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nA cat<|im_end|>\n"
    assert [text[start:end] for start, end in spans] == ["A cat<|im_end|>"]


def test_keys_with_none_are_dropped_and_the_callers_messages_left_alone():
    messages = [{"role": "user", "content": "Hi", "tool_calls": None}]
    assert plain_messages(messages) == [{"role": "user", "content": "Hi"}] and "tool_calls" in messages[0]


def test_errors_say_what_to_do():
    with pytest.raises(UserError, match="has no chat template.*dataset.template=.*get_chat_template"):
        encode_chat(make_tokenizer(None, 300), ONE)
    with pytest.raises(UserError, match="slow tokenizer"):
        encode_chat(SlowTokenizer(), ONE)
    with pytest.raises(UserError, match="turns system, user, assistant: only user and assistant turns"):
        encode_chat(BYTES["mistral"], SYSTEM)
    hidden = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper + '</s>' }}{% endfor %}"
    with pytest.raises(UserError, match="does not print contents as they are given"):
        encode_chat(make_tokenizer(hidden, 300), ONE)


class SlowTokenizer:
    is_fast, chat_template, special_tokens_map = False, CHATML_TEMPLATE, {}


@pytest.mark.parametrize(("template", "failing"), [
    (CHATML_BARE.replace("'<|im_end|>", "('<|im_end|>' if loop.last else '') + '"), [1]),
    (CHATML_BARE.replace("<|im_end|>", ""), [1]),
    (CHATML_BARE.replace("{{- message['content'] +", "{{- message['content'] + ('!' if message['content'] == 'odd' else '') +"), [0]),
    (CHATML_BARE + "{% generation %}{% endgeneration %}", [0, 1, 2]),
], ids=["only the last ends", "nothing ends", "a sign too many", "nothing trained"])
def test_wrong_templates_fail_their_checks(template, failing):
    assert template != CHATML_BARE
    checks = check_masks(make_tokenizer(template, 300), [ONE, TWO, chat("user: Hi", "assistant: odd")])
    assert [index for index, check in enumerate(checks) if not check.passed] == failing


def test_a_wrong_mask_fails_its_check(monkeypatch):
    """The checks start from the messages: a mask that is off by a token, or lacks an end, does not pass them."""
    from supertrainer.chat import masks, proof

    honest = masks.encode_chats

    def shifted(by, drop_end):
        def encode(tokenizer, conversations, **options):
            rows = honest(tokenizer, conversations, **options)
            changed = []
            for row in rows:
                mask = row.loss_mask[by:] + [False] * by if by >= 0 else [False] * -by + row.loss_mask[:by]
                if drop_end:
                    mask = [loss and following for loss, following in zip(row.loss_mask, row.loss_mask[1:] + [False], strict=True)]
                changed.append(EncodedChat(row.input_ids, mask, roles=row.roles))
            return changed
        return encode

    for by, drop_end, failing in ((1, False, {0, 1}), (-1, False, {0, 1}), (0, True, {1})):
        monkeypatch.setattr(proof, "encode_chats", shifted(by, drop_end))
        checks = check_masks(BYTES["chatml-bare"], [ONE, TWO])
        assert {index for index, check in enumerate(checks) if not check.passed} == failing
    monkeypatch.setattr(proof, "encode_chats", honest)
    assert all(check.passed for check in check_masks(BYTES["chatml-bare"], [ONE, TWO]))


def test_shares_of_each_role_are_told():
    share = check_masks(BYTES["smollm2"], [SYSTEM])[2]
    assert share.detail == "3 of 44 tokens: assistant 3 of 3, system 0 of 10, template 0 of 28, user 0 of 3"
    assert EncodedChat([1], [True]) == EncodedChat([1], [True], None, [], {})


def test_generation_must_stop_on_the_terminator():
    tokenizer = BYTES["llama3"]
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert check_terminator(tokenizer, [tokenizer.eos_token_id, end]).passed
    failed = check_terminator(tokenizer, [tokenizer.eos_token_id])
    assert not failed.passed and f"eos_token_id = [{tokenizer.eos_token_id}, {end}]" in failed.detail
    words = make_tokenizer(CHATML_BARE.replace("<|im_end|>", "<|eom|>"), 300)
    assert not check_terminator(words, words("<|eom|>", add_special_tokens=False)["input_ids"]).passed  # every piece of it


def test_vocabulary_must_fit_the_embedding():
    tokenizer = make_tokenizer(CHATML_TEMPLATE, 300)
    size = len(tokenizer)
    assert check_vocabulary(tokenizer, size).passed and check_vocabulary(tokenizer, size + 64).passed
    tokenizer.add_tokens(["<extra>"])
    failed = check_vocabulary(tokenizer, size)
    assert not failed.passed and "<extra>" in failed.detail and f"resize_token_embeddings({size + 1})" in failed.detail


# ---- Unsloth's masking by parts ------------------------------------------------------------------------------------

PARTS = {"chatml-bare": ("<|im_start|>user\n", "<|im_start|>assistant\n"), "gemma": ("<start_of_turn>user\n", "<start_of_turn>model\n"),
         "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
         "mistral": ("[INST]", "[/INST]"), "zephyr": ("<|user|>\n", "<|assistant|>\n")}


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=ROUNDS)
def test_masks_by_parts_are_the_spans_by_parts(name, rounds):
    """Tokens against characters: two ways that share nothing, on texts whose edges tempt the tokenizer to merge."""
    tokenizer = MERGED[name]
    rounds = [(question, answer.strip("\n")) for question, answer in rounds]
    text = render(tokenizer, messages_of(rounds))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = mask_by_parts(ids, *(part_ids(tokenizer, part) for part in PARTS[name]))
    runs, inside = [], False
    for token, loss in zip(ids, mask, strict=True):
        if loss and not inside:
            runs.append([])
        if loss:
            runs[-1].append(token)
        inside = loss
    spans = [text[start:end] for start, end in response_spans(text, *PARTS[name])]
    assert [tokenizer.decode(run).strip() for run in runs] == [span.strip() for span in spans]
    ours = encode_chat(tokenizer, messages_of(rounds))
    assert all(loss for loss, trained in zip(mask, ours.loss_mask, strict=True) if trained) or len(ids) != len(ours.input_ids)


def test_headers_that_merge_with_their_neighbours_are_found():
    backend = MERGED["chatml-bare"].backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="</s>")
    tokenizer.add_tokens(["\n\n", "\n "])
    text = "### Instruction:\n Add.\n\n### Response:\n\n3\n\n### Instruction:\nMore?\n\n### Response:\n 6"
    parts = [part_ids(tokenizer, part) for part in ("### Instruction:\n", "### Response:\n")]
    ids = tokenizer(text)["input_ids"]
    trained = [tokenizer.decode([token]) for token, loss in zip(ids, mask_by_parts(ids, *parts), strict=True) if loss]
    assert "".join(trained).split() == ["3", "6"]
    assert not any(mask_by_parts(tokenizer("no header")["input_ids"], *parts))
    with pytest.raises(UserError, match="depend on what stands beside it"):
        part_ids(tokenizer, "\n")


def test_loss_tokens_show_whole_characters():
    encoded = encode_chat(BYTES["chatml"], TWO)
    pieces = loss_tokens(BYTES["chatml"], encoded.input_ids, encoded.loss_mask)
    assert "".join(piece["text"] for piece in pieces) == render(BYTES["chatml"], TWO)
    assert "".join(piece["text"] for piece in pieces if piece["trained"]) == "Yo<|im_end|>🙂<|im_end|>"
