"""The scan for secrets: every kind is found in every kind of file, masked, on its line; real tokenizers and models raise none."""

import gzip
import io
import json
import lzma
import pickle
import re
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from supertrainer.export import secrets
from supertrainer.export.secret_rules import (
    NAMED,
    PERSONAL,
    RULES,
    TOKENS,
    clean_values,
    cleaned,
    entropy,
    find,
    looks_random,
    masked,
)
from supertrainer.export.secrets import Hit, require_clean, scan
from supertrainer.runtime import UserError

LETTERS = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def text_of(alphabet, low, high=None):
    return st.text(alphabet, min_size=low, max_size=high or low)


def random_text(low, high=None):
    """Letters and digits as a service draws them; words are not drawn."""
    return text_of(LETTERS, low, high).filter(lambda text: looks_random(text.encode(), min(low, 12), 3.5 if low >= 24 else 3.0))


AFTER = {  # what a service puts behind the beginning of its tokens
    "hf_": random_text(34, 40), "api_org_": random_text(34), "sk-proj-": random_text(40, 60), "sk-": random_text(48),
    "sk-ant-api03-": random_text(90), "AKIA": text_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16), "ghp_": random_text(36),
    "github_pat_": random_text(82), "glpat-": random_text(20), "AIza": random_text(35), "GOCSPX-": random_text(28),
    "xoxb-": text_of("0123456789", 12), "hooks.slack.com/services/": random_text(40), "sk_live_": random_text(24),
    "npm_": random_text(36), "pypi-AgEIcHlwaS5vcmc": random_text(60), "r8_": random_text(37), "gsk_": random_text(52),
    "wandb_v1_": random_text(40), "SG.": st.tuples(random_text(22), random_text(43)).map(".".join),
    "eyJ": st.tuples(random_text(20), random_text(20), random_text(20)).map(lambda t: f"{t[0]}.eyJ{t[1]}.{t[2]}"),
    "-----BEGIN ": st.sampled_from(["RSA ", "EC ", "OPENSSH ", ""]).map(lambda kind: f"{kind}PRIVATE KEY-----"),
}
TOKEN = st.sampled_from(sorted(AFTER)).flatmap(lambda start: AFTER[start].map(lambda rest: start + rest))
NAMES = ["hub_token", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "api_key", "wandb-api-key", "client_secret", "OPENAI_API_KEY", "password"]
NAMED_SECRET = st.tuples(st.sampled_from(NAMES), st.sampled_from(['{}="{}"', "{}: {}", '"{}": "{}"', "{} = '{}'", 'export {}={}',
                                                                  '\\"{}\\": \\"{}\\"']),
                         random_text(16, 48)).map(lambda drawn: (drawn[1].format(drawn[0], drawn[2]), drawn[2]))
USER = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=9).filter(lambda name: name not in ("shared", "public", "default",
                                                                                                      "username", "yourname"))
HOME = st.tuples(st.sampled_from(["/home/{}/x", "/Users/{}/Library", "C:\\Users\\{}\\x", "file:///home/{}/m", "C:\\\\Users\\\\{}"]),
                 USER).map(lambda pair: (pair[0].format(pair[1]), pair[1]))
MAIL = st.tuples(text_of("abcdefgh.", 6, 12).filter(lambda name: name.strip(".") == name), text_of("klmnop", 6, 9),
                 st.sampled_from(["com", "org", "co.uk", "de"])).map(lambda parts: f"{parts[0]}@{parts[1]}.{parts[2]}")
PLANTED = st.one_of(TOKEN.map(lambda token: (token, token)), NAMED_SECRET, HOME, MAIL.map(lambda mail: (mail, mail)))


def kinds(data):
    return [one.kind for one in find(data)]


# ---- in every kind of file


def into_text(folder, text):
    (folder / "notes.md").write_text(f"# A model\n\nnothing\nhere {text} there\n")
    return "notes.md", 4


def into_python(folder, text):
    (folder / "train.py").write_bytes(b"import os\r\n" + text.encode() + b"\r\n")
    return "train.py", 2


def into_utf16(folder, text):
    (folder / "notes.txt").write_text(f"one\ntwo\n{text}\n", "utf-16")
    return "notes.txt", 3


def into_json(folder, text):
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3, "note": text, "more": [1, 2]}, indent=2))
    return "config.json", 3


def into_one_line(folder, text):
    (folder / "tokenizer.json").write_text('{"vocab":{"a":1},"note":' + json.dumps(text) + "}")
    return "tokenizer.json", 1


def into_safetensors(folder, text):
    save_file({"w": torch.zeros(100)}, folder / "model.safetensors", {"format": "pt", "note": text})
    return "model.safetensors", None


def into_gguf(folder, text):
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("llama.odd", [1, 2, 3])
    writer.add_description(text)
    writer.add_tensor("w", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "model.gguf", 0


def into_zip(folder, text):
    with zipfile.ZipFile(folder / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/a.txt", f"one\n{text}\n")
    return "more.zip/inner/a.txt", 2


def into_tar(folder, text):
    with tarfile.open(folder / "more.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(text.encode())
        archive.addfile(entry, io.BytesIO(text.encode()))
    return "more.tar.gz/a.txt", 1


def into_gzip(folder, text):
    (folder / "log.jsonl.gz").write_bytes(gzip.compress(f"\n{text}\n".encode()))
    return "log.jsonl.gz/log.jsonl", 2


def into_png(folder, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", text, zip=len(text) % 2 == 0)
    Image.new("RGB", (8, 8)).save(folder / "plot.png", pnginfo=info)
    return "plot.png", 0


def into_jpeg(folder, text):
    exif = Image.Exif()
    exif[0x010E] = text  # ImageDescription
    Image.new("RGB", (8, 8)).save(folder / "photo.jpg", exif=exif)
    return "photo.jpg", 0


def into_torch(folder, text):
    torch.save({"hub_note": text, "w": torch.zeros(5)}, folder / "weights.dat")
    return "weights.dat/weights/data.pkl", None


INTO = [into_text, into_python, into_utf16, into_json, into_one_line, into_safetensors, into_gguf, into_zip, into_tar, into_gzip,
        into_png, into_jpeg, into_torch]


@pytest.mark.parametrize("put", INTO, ids=lambda put: put.__name__)
@given(planted=PLANTED)
def test_planted_secret_is_found_on_its_line_and_masked(put, planted, tmp_path_factory):
    text, secret = planted
    folder = tmp_path_factory.mktemp("planted")
    path, line = put(folder, text)
    hits = [hit for hit in scan(folder) if hit.kind != "pickle"]
    assert hits, f"{text!r} was not found in {path}"
    assert {hit.path for hit in hits} == {path}
    if line is not None:
        assert {hit.line for hit in hits} == {line}
    if "PRIVATE KEY" not in secret:
        assert secret not in str(hits)


@given(planted=PLANTED, position=st.integers(0, 3 * (1 << 20)))
def test_no_secret_hides_on_the_border_of_a_chunk(planted, position):
    border = (1 << 20) - secrets._CONTEXT - position % 300
    data = b" " * border + f"\n{planted[0]}\n".encode() + b"x \n" * 400_000
    found = list(secrets.search_stream(io.BytesIO(data)))
    assert [(line, one.secret) for line, one in found] == [(2, one.secret) for one in find(planted[0].encode())]


def test_a_secret_of_each_rule_is_drawn_above():
    """No rule goes untested: each is the one that some drawn text falls to."""
    drawn = {kinds(f"x {start}{'aB3dE5gH7jK9mN2p' * 6}".encode())[0] for start in AFTER if not start.startswith(("eyJ", "---", "SG", "AK"))}
    by_hand = [b"AKIA" + b"ABCD234567ABCDEF", b"eyJ" + b"hbGciOiJIUzI1NiJ9" + b".eyJ" + b"zdWIiOiIxMjM0NTY3ODkw" + b".dozjgNryP4J3",
               b"SG." + b"a1B2c3D4e5" * 3 + b"." + b"a1B2c3D4e5" * 3, b"-----BEGIN " + b"PRIVATE KEY-----"]
    drawn |= {kinds(text)[0] for text in by_hand}
    assert drawn == {rule.kind for rule in TOKENS}
    assert len(RULES) == len(TOKENS) + len(NAMED) + len(PERSONAL)


def test_password_in_an_address():
    assert kinds(b"postgres://me:" + b"tr0ub4dor@db.internal/x") == ["password in an address"]
    assert not find(b"http://localhost:8000/v1 git+ssh://git@github.com/a/b https://a.test/@me see http://x:80/@y")


HF = b"hf_" + b"abcdefghijklmnopqrstuvwxyzABCDEFGH"
USER = b"al" + b"ice"


@pytest.mark.parametrize("text", [
    b'{"a": "see\\n' + HF + b'"}', b'{"a": "warn:\\n/home/' + USER + b'/x.py:12"}', b"[write](mailto:" + USER + b"@acme.com)",
    USER + b"@acme.com: boss", b"/mnt/home/" + USER + b"/runs", b"/gpfs/users/" + USER + b"/x",
    b"hf_oauth_eyJhbGci" + b"OiJFZERTQSJ9.eyJzdWIiOiIx" + b".c2lnbmF0dXJl", b"hf_jwt_eyJhbGci" + b"OiJFZERTQSJ9.eyJzdWIiOiIx" + b".c2lnbmF0dXJl"])
def test_what_stands_before_a_secret_does_not_hide_it(text):
    assert find(text)


def test_a_private_key_is_taken_out_with_its_mark():
    body = "MIIEow" + "IBAAKCAQEA7" * 20
    text = "x\n-----BEGIN RSA " + f"PRIVATE KEY-----\n{body}\n-----END RSA " + "PRIVATE KEY-----\ny"
    assert cleaned(text) == "x\n(private key removed)\ny"


@pytest.mark.parametrize("name", ["x.gz", "x.zip", "x.tar.xz"])
def test_a_damaged_archive_is_searched_as_far_as_it_goes(tmp_path, name):
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", bytes(range(256)) * 50)
    else:
        (tmp_path / name).write_bytes((gzip if name.endswith("gz") else lzma).compress(bytes(range(256)) * 50))
    content = bytearray((tmp_path / name).read_bytes())
    content[60:90] = b"\xff" * 30
    (tmp_path / name).write_bytes(content)
    assert scan(tmp_path) == []


def test_what_no_upload_takes_is_not_searched_and_a_name_with_brackets_can_be_allowed(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(HF)
    (tmp_path / "x.part").write_bytes(HF)
    assert scan(tmp_path) == []
    (tmp_path / "notes [draft].md").write_bytes(HF)
    hit, = scan(tmp_path)
    assert scan(tmp_path, allow=[hit.name]) == []


# ---- what is none


INNOCENT = [
    '"eos_token": "<|im_end|>"', '"pad_token": "<|finetune_right_pad_id|>"', '"unk_token": "reserved_special_token_12"', '"password": 13544',
    '"Ġtoken": 11241, "secret": 3421', "token_type_ids = inputs['token_type_ids']", "token = next(tokens)",
    "password = getpass.getpass()", 'token=os.environ["HF_TOKEN"]', "hub_token: null", "hub_token: <HUB_TOKEN>", '"hub_token": ""',
    "api_key: your-api-key-here-1234", "api_key=xxxxxxxxxxxxxxxx", "Bearer <token>", "tokens_per_second: 8184.4", "task-oriented-dialogue-2024",
    "risk-averse-decision-making-2024", "https://example.com/home/index.html", "https://site.org/Users/list", "/Users/Shared/x", "~/models",
    "path/home/x", "trainer/common/model_kwargs@trainer.model_kwargs=sdpa", "someone@example.com", "git@github.com:a/b.git", "icon@2x.png",
    "x @ y", "@property", "@torch.no_grad()", "sha256: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "sk-learn",
    "num_items_in_batch", "secretary: Jane", "tokenizer_class: PreTrainedTokenizerFast", "author: alice", "hf_hub_download(repo_id)",
    "AKIA is how they begin", "noreply@github.com", "<pad>@@</pad>", "auth: null", "--dataset.path=/data/x.jsonl", "D:\\data\\x",
]


@pytest.mark.parametrize("text", INNOCENT, ids=[str(i) for i in range(len(INNOCENT))])
def test_innocent_text_is_left_alone(text):
    assert not find(text.encode()), find(text.encode())


@given(st.binary(max_size=20_000))
def test_random_bytes_neither_crash_nor_match(data):
    assert not [one for one in find(data) if one.kind not in ("e-mail address", "home path")]


@given(rest=st.binary(max_size=400), head=st.sampled_from([b"GGUF\3\0\0\0", b"", b"PK\3\4", b"\x1f\x8b", b"\x80\x04",
                                                          b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1"]),
       name=st.sampled_from(["a.gguf", "a.safetensors", "a.zip", "a.tar.gz", "a.bin"]))
def test_broken_files_are_searched_as_far_as_they_go(rest, head, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / name).write_bytes(head + rest)
    scan(folder)


def test_broken_header_of_weights_still_shows_its_secret(tmp_path):
    token = "hf_" + "a1B2c3D4" * 5
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b'{"__metadata__":{"x":"' + token.encode())
    (tmp_path / "m.zip").write_bytes(b"PK\3\4" + b"\0" * 50 + token.encode())
    assert {hit.path for hit in scan(tmp_path)} == {"m.safetensors", "m.zip"}


def real_folders():
    from supertrainer.models.catalogue import get_entry, locate

    try:
        return locate(get_entry("smollm2")), locate(get_entry("minilm"))
    except UserError as error:
        pytest.skip(str(error))


def test_real_tokenizers_raise_no_alarm(tmp_path):
    from transformers import AutoTokenizer

    smol, mini = real_folders()
    AutoTokenizer.from_pretrained(smol.parent, gguf_file=smol.name).save_pretrained(tmp_path / "smollm2")
    assert (tmp_path / "smollm2" / "tokenizer.json").stat().st_size > 3_000_000
    for folder in (tmp_path / "smollm2", mini, smol.parent):
        assert scan(folder) == []


def test_thirty_megabytes_are_searched_in_seconds_and_little_memory(tmp_path):
    from transformers import AutoTokenizer

    smol, _ = real_folders()
    AutoTokenizer.from_pretrained(smol.parent, gguf_file=smol.name).save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    for number in range(8):  # one line each, as some tokenizers are saved
        (tmp_path / f"tokenizer{number}.json").write_text(json.dumps(json.loads(text), ensure_ascii=False, indent=None) + " " * 1_500_000)
    size, times = sum(path.stat().st_size for path in tmp_path.iterdir()), []
    for _ in range(3):
        start = time.process_time()
        assert not scan(tmp_path)
        times.append(time.process_time() - start)
    tracemalloc.start()
    scan(tmp_path, files=["tokenizer0.json"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{size / 1e6:.0f} MB in {min(times):.2f} s, {peak / 1e6:.1f} MB")
    assert size > 25e6 and min(times) < 4 and peak < 12e6  # 2 s on a quiet core


def test_weights_of_any_size_cost_their_header_only(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 30))
    with (tmp_path / "model.onnx").open("wb") as file:
        file.write(b"\0" + b"hf_" + b"a1B2c3D4" * 5 + b"\0")
        file.truncate(1 << 30)
    start = time.process_time()
    assert [hit.path for hit in scan(tmp_path)] == ["model.onnx"]
    assert time.process_time() - start < 2


# ---- files that are refused


@pytest.mark.parametrize(("name", "kind"), [
    ("training_args.bin", "training state"), ("checkpoint-5/optimizer.pt", "training state"), ("rng_state_0.pth", "training state"),
    ("scheduler.pt", "training state"), (".env", "file of credentials"), (".env.local", "file of credentials"), (".netrc", "file of credentials"),
    ("keys/id_ed25519", "file of credentials"), ("kaggle.json", "file of credentials"), ("x.pkl", "pickle"), ("pytorch_model.bin", "pickle"),
    ("pytorch_model-00001-of-00002.bin", "pickle"), ("runs/events.out.tfevents.17.host.1", "file named after this machine")])
def test_file_is_refused_by_its_name(tmp_path, name, kind):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert [(hit.path, hit.kind, hit.line) for hit in scan(tmp_path)] == [(name, kind, 0)]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [{"a": 1}, [1, "x"], "text", 7, (1, 2), np.zeros(2), None], ids=["dict", "list", "str", "int", "tuple",
                                                                                                   "array", "None"])
def test_pickle_is_known_under_any_name(tmp_path, protocol, value):
    (tmp_path / "innocent.bin").write_bytes(pickle.dumps(value, protocol))
    assert [hit.kind for hit in scan(tmp_path)] == ["pickle"]


def test_openvino_weights_are_no_pickle(tmp_path, seed):
    (tmp_path / "openvino_model.bin").write_bytes(torch.randn(1000).numpy().tobytes())
    assert not scan(tmp_path), f"seed {seed}"


def test_what_the_hub_ignores_is_not_looked_at(tmp_path):
    for name in (".git/config", ".cache/huggingface/download/x.metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("/home/" + "erika/x")
    assert not scan(tmp_path)


# ---- allowing and refusing


def test_a_named_hit_or_a_named_text_is_allowed(tmp_path):
    mail = "lab@uni" + "-x.org"
    (tmp_path / "README.md").write_text(f"Write to {mail} or /home/{'erika'}/x\n")
    assert scan(tmp_path, allow=[mail, "README.md:home path"]) == []
    assert [hit.kind for hit in scan(tmp_path, allow=["*:home path"])] == ["e-mail address"]
    with pytest.raises(UserError, match="list"):
        scan(tmp_path, allow=mail)


def test_error_names_each_hit_and_no_secret(tmp_path):
    token = "hf_" + "Q7w8E9r0" * 5
    (tmp_path / "a.yaml").write_text(f"x: 1\nhub_token: {token}\n")
    (tmp_path / "b.py").write_text(f"open('/home/{'erika'}/x')\n")
    with pytest.raises(UserError) as caught:
        require_clean(tmp_path)
    said = str(caught.value)
    assert "a.yaml, line 2: Hugging Face token: hf_Q… (43 characters)" in said and "b.py, line 1: home path: /home/e…" in said
    assert token not in said and "erika" not in said and "allow=['a.yaml:Hugging Face token']" in said
    require_clean(tmp_path, allow=["*"])


def test_only_the_named_files_are_searched(tmp_path):
    (tmp_path / "a.txt").write_text("/home/" + "erika")
    (tmp_path / "b.txt").write_text("/home/" + "erika")
    assert [hit.path for hit in scan(tmp_path, files=["b.txt"])] == ["b.txt"]
    with pytest.raises(UserError, match="c.txt"):
        scan(tmp_path, files=["c.txt"])
    with pytest.raises(UserError, match="not a folder"):
        scan(tmp_path / "gone")


def test_a_flood_of_hits_is_cut(tmp_path):
    (tmp_path / "a.csv").write_text("".join(f"person{i}@uni" + "-x.org\n" for i in range(100_000)))
    hits = scan(tmp_path)
    assert len(hits) == secrets.MOST_HITS and hits[0] == Hit("a.csv", 1, "e-mail address", "p…@uni-x.org")


# ---- cleaning


@given(planted=PLANTED, around=st.text("abc :/\n", max_size=8))
def test_cleaned_text_has_no_hit_left(planted, around):
    text = f"{around} {planted[0]} {around}"
    assert not find(cleaned(text).encode()), cleaned(text)
    assert not find(json.dumps(clean_values({"note": text, "inner": [text]})).encode())


@given(st.text(max_size=200))
def test_text_without_hits_is_not_changed(text):
    assume(not find(text.encode("utf-8", "replace")))
    assert cleaned(text) == text.encode("utf-8", "replace").decode()


@given(PLANTED)
def test_mask_shows_less_than_half(planted):
    for one in find(planted[0].encode()):
        if one.kind not in ("private key", "home path", "e-mail address"):
            assert one.secret[:len(one.secret) // 2] not in masked(one) and one.secret[-4:] not in masked(one)


def test_entropy_of_known_texts():
    assert entropy(b"") == 0 and entropy("abcd") == 2.0 and entropy(b"aabb") == 1.0


@pytest.mark.parametrize("family", ["bert", "llm"])
def test_saved_models_of_ours_raise_no_alarm(family, tmp_path):
    import transformers

    from supertrainer.models.builtin import train_byte_bpe, train_wordpiece

    texts = [re.sub(r"\S+@\S+", "", Path(module.__file__).read_text()) for module in (json, re, tarfile)]
    tokenizer = train_wordpiece(texts, 2000) if family == "bert" else train_byte_bpe(texts, 2000)
    tokenizer.save_pretrained(tmp_path)
    config = (transformers.BertConfig if family == "bert" else transformers.LlamaConfig)(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    assert scan(tmp_path) == []
