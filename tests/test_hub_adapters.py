"""Adapters through a Hub on loopback: what goes along, which base they name, and which bases they refuse."""

import json
import logging
import shutil

import peft
import pytest
import tiny_hub
import torch
from peft import LoraConfig

from supertrainer import FastBERT, FastLLM
from supertrainer.check import CheckFailed
from supertrainer.export import adapters
from supertrainer.export.adapters import check_base, pull_adapter, push_adapter, wanted_base
from supertrainer.export.fingerprint import BASE_FILE, Fingerprint, fingerprint, record_base
from supertrainer.runtime import UserError

WRITTEN = {".gitattributes", "README.md", BASE_FILE, "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
           "tokenizer_config.json", "supertrainer_checks.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two bases of the same shape and their names as folders."""
    place = tmp_path_factory.mktemp("bases")
    tiny_hub.llama(place / "one", seed=1)
    tiny_hub.llama(place / "two", seed=2)
    return place


@pytest.fixture
def hub_base(hub, bases):
    """The first base as a public repository."""
    hub.make("org/base", {path.name: path.read_bytes() for path in (bases / "one").iterdir()}, private=False)
    return "org/base"


def trained(name, **options):
    """A model with an adapter that does something."""
    model, tokenizer = FastLLM.from_pretrained(str(name), dtype="float32")
    model = FastLLM.get_peft_model(model, **{"r": 4, **options})
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval(), tokenizer


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("the cat sat", return_tensors="pt").to(model.device)).logits.float()


def same(one, reader, other, tokenizer):
    return torch.allclose(logits(one, reader), logits(other, tokenizer), atol=1e-5)


def test_an_adapter_goes_up_alone_and_comes_back_on_its_base(hub, hub_base, caplog, monkeypatch):
    model, tokenizer = trained(hub_base)
    done = push_adapter(model, "me/adapter", tokenizer)
    assert set(hub.files("me/adapter")) <= WRITTEN and hub.repos["me/adapter"].private
    assert all(check.passed for check in done.checks) and len(done.checks) > 2
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    monkeypatch.setattr(logging.getLogger("supertrainer"), "propagate", True)
    with caplog.at_level(logging.INFO):
        again, reader = pull_adapter("me/adapter", dtype="float32")
    assert f"me/adapter wants the base org/base at {hub.repos['org/base'].find('main')}" in caplog.text
    assert same(again, reader, model, tokenizer) and again.peft_config["default"].r == 4


def test_an_adapter_stays_on_its_base_when_the_base_moves_on(hub, hub_base, bases):
    model, tokenizer = trained(hub_base)
    push_adapter(model, "me/adapter", tokenizer)
    hub.write("org/base", {"model.safetensors": (bases / "two" / "model.safetensors").read_bytes()})
    moved, _ = FastLLM.from_pretrained("org/base")
    with pytest.raises(UserError, match=r"trained on org/base at \w{40}, and this model is org/base \(\d+ of \d+ weights differ"):
        pull_adapter("me/adapter", moved)
    again, reader = pull_adapter("me/adapter", dtype="float32")  # the commit it was trained on
    assert same(again, reader, model, tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "4bit"])
def test_the_right_base_is_known_in_any_number_type_and_a_sibling_is_refused(hub, bases, dtype, caplog, monkeypatch):
    model, tokenizer = trained(bases / "one")
    push_adapter(model, "me/adapter", tokenizer, base_model="org/base")
    options = {"load_in_4bit": True} if dtype == "4bit" else {"dtype": dtype}
    right, _ = FastLLM.from_pretrained(str(bases / "one"), **options)
    adapted, processor = pull_adapter("me/adapter", right)
    assert processor is None and isinstance(adapted, peft.PeftModel)
    limit = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.005, "4bit": 0.2}[dtype]
    error = (logits(adapted, tokenizer) - logits(model, tokenizer)).abs().max()
    with adapted.disable_adapter():
        assert error < limit < (logits(adapted, tokenizer) - logits(model, tokenizer)).abs().max()
    wrong, _ = FastLLM.from_pretrained(str(bases / "two"), **options)
    with pytest.raises(UserError, match="its answers mean nothing"):
        pull_adapter("me/adapter", wrong)
    assert not isinstance(wrong, peft.PeftModel) and not any("lora" in name for name, _ in wrong.named_modules())
    monkeypatch.setattr(logging.getLogger("supertrainer"), "propagate", True)
    assert isinstance(pull_adapter("me/adapter", wrong, any_base=True)[0], peft.PeftModel) and "weights differ" in caplog.text


def test_an_adapter_trained_on_four_bits_knows_its_base_in_full(bases, tmp_path):
    model, _ = FastLLM.from_pretrained(str(bases / "one"), load_in_4bit=True)
    model = FastLLM.get_peft_model(model, r=4)
    model.save_pretrained(tmp_path / "adapter")
    record_base(model, tmp_path / "adapter")
    full, sibling = (FastLLM.from_pretrained(str(bases / name))[0] for name in ("one", "two"))
    assert check_base(full, tmp_path / "adapter").passed and not check_base(sibling, tmp_path / "adapter").passed


def test_a_base_trained_a_little_further_is_another_base(bases, tmp_path):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    record_base(model, tmp_path / "adapter")
    other, reader = FastLLM.from_pretrained(str(bases / "one"))
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    rows = reader("the cat sat", return_tensors="pt")
    other(**rows, labels=rows.input_ids).loss.backward()
    optimizer.step()
    assert not check_base(other, tmp_path / "adapter").passed


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"use_dora": True},
                                     {"target_modules": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [3, 4]}],
                         ids=["modules_to_save", "bias", "dora", "embedding", "token_rows"])
def test_what_the_adapter_trains_is_no_part_of_the_fingerprint(bases, options):
    plain, _ = FastLLM.from_pretrained(str(bases / "one"))
    before = fingerprint(plain)
    model, _ = trained(bases / "one", **options)
    count, different = Fingerprint.from_json(json.loads(json.dumps(fingerprint(model).to_json()))).compare(before)
    assert different == [] and count >= len(before.values) - 1
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"):
        fingerprint(model)


def test_added_tokens_do_not_make_another_base(bases):
    plain, _ = FastLLM.from_pretrained(str(bases / "one"))
    kept = fingerprint(plain)
    plain.resize_token_embeddings(plain.config.vocab_size + 40)
    count, different = kept.compare(fingerprint(plain))
    assert count == len(kept.values) and not different


def test_a_base_that_only_this_machine_has_needs_a_name(hub, bases, tmp_path):
    model, tokenizer = trained(bases / "one")
    model.save_pretrained(tmp_path / "saved")
    for what in (model, tmp_path / "saved"):
        with pytest.raises(UserError, match="base_model="):
            push_adapter(what, "me/adapter")
    with pytest.raises(UserError, match="base_model="):
        push_adapter(model, "me/adapter", base_model=str(bases / "one"))
    assert "me/adapter" not in hub.repos
    push_adapter(model, "me/adapter", tokenizer, base_model="org/base", base_revision="v1")
    assert all(str(bases).encode() not in content for content in hub.files("me/adapter").values())
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


def test_a_checkpoint_goes_up_without_what_training_left_there(hub, bases, tmp_path):
    model, tokenizer = trained(bases / "one")
    folder = tmp_path / "checkpoint-3"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "model.safetensors"):
        (folder / name).write_bytes(b"hf_token")
    before = sorted(path.name for path in folder.iterdir())
    seen = []
    done = push_adapter(folder, "me/adapter", base_model="org/base", prepare=lambda desk: seen.append((desk / "README.md").exists()))
    assert set(hub.files("me/adapter")) <= WRITTEN - {BASE_FILE, "README.md"} and done.commit and seen == [False]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert str(bases) in (folder / "adapter_config.json").read_text()  # nothing in the folder was changed
    (folder / "README.md").write_text("# by hand")
    push_adapter(folder, "me/adapter", base_model="org/base")
    assert hub.files("me/adapter")["README.md"] == b"# by hand"
    with pytest.raises(UserError, match="tokenizer= and base="):
        push_adapter(folder, "me/adapter", tokenizer)


def test_a_refusal_in_prepare_stops_the_push(hub, bases):
    model, _ = trained(bases / "one")

    def refuse(desk):
        raise UserError("a secret")

    with pytest.raises(UserError, match="a secret"):
        push_adapter(model, "me/adapter", base_model="org/base", prepare=refuse)
    assert "me/adapter" not in hub.repos


def test_an_adapter_that_does_not_answer_as_trained_is_not_pushed(hub, bases, monkeypatch):
    model, tokenizer = trained(bases / "one")
    with torch.no_grad():
        plain = model.get_base_model()
        plain.model.norm.weight.mul_(1.5)  # something outside the adapter was trained
    with pytest.raises(CheckFailed):
        push_adapter(model, "me/adapter", tokenizer, base_model="org/base")
    assert "me/adapter" not in hub.repos


def test_rights_are_asked_before_anything_is_saved(hub, bases, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "me-reads")
    monkeypatch.setattr(adapters, "save_lora", None)
    with pytest.raises(UserError, match="may only read"):
        push_adapter(trained(bases / "one")[0], "me/adapter", base_model="org/base")


def test_without_a_fingerprint_the_name_is_compared(bases, tmp_path, hub):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    one, two = (FastLLM.from_pretrained(str(bases / name))[0] for name in ("one", "two"))
    assert check_base(one, tmp_path / "adapter").passed and "name only" in check_base(one, tmp_path / "adapter").detail
    with pytest.raises(UserError, match=r"two \(by name only"):
        pull_adapter(tmp_path / "adapter", two)


def test_a_second_adapter_gets_a_name_of_its_own(bases, tmp_path):
    model, tokenizer = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    record_base(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter_name="):
        pull_adapter(tmp_path / "adapter", model)
    with torch.no_grad():
        wanted = logits(model, tokenizer)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    changed = logits(model, tokenizer)
    both, _ = pull_adapter(tmp_path / "adapter", model, adapter_name="pulled")
    assert sorted(both.peft_config) == ["default", "pulled"] and both.active_adapter == "pulled"
    assert (logits(both.eval(), tokenizer) - wanted).abs().max() < 1e-5 < (changed - wanted).abs().max()


def test_a_classifier_brings_its_labels(hub, tmp_path):
    texts = ["the cat sat", "the dog lay"] * 4
    model, tokenizer = FastBERT.from_pretrained("tiny_bert", texts=texts, labels=["cat", "dog", "cow"])
    model.base_model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    model, tokenizer = FastBERT.from_pretrained(str(tmp_path / "body"), labels=["cat", "dog", "cow"])
    model = FastBERT.get_peft_model(model, r=2).eval()
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.05)
    push_adapter(model, "me/adapter", tokenizer, base_model="org/base")
    hub.make("org/base", {path.name: path.read_bytes() for path in (tmp_path / "body").iterdir()})
    hub.users["me-writes"] = type(hub.users["me-writes"])("me", "write", {"org": "read"})
    again, reader = pull_adapter("me/adapter")
    assert list(again.config.id2label.values()) == ["cat", "dog", "cow"]
    assert same(again, reader, model, tokenizer)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "no valid JSON"),
    (lambda folder: (folder / BASE_FILE).write_text('{"fingerprint": {"architecture": "X"}}'), "damaged"),
    (lambda folder: (folder / BASE_FILE).write_text('{"fingerprint": {"architecture": "X", "values": {"w": ["float32", "!"]}}}'), "damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "pickle"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "damaged"),
], ids=["no_config", "bad_config", "no_values", "bad_values", "pickle", "bad_weights"])
def test_damaged_adapters_are_refused_in_plain_words(bases, tmp_path, damage, said):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    record_base(model, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        pull_adapter(tmp_path / "adapter", FastLLM.from_pretrained(str(bases / "one"))[0])


def test_an_adapter_of_another_shape_is_refused(bases, tmp_path):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    tiny = peft.get_peft_model(FastBERT.from_pretrained("tiny_bert", texts=["a b c"] * 4, num_labels=2)[0], LoraConfig(r=2, target_modules=["query"]))
    record_base(model, tmp_path / "adapter")
    assert "LlamaForCausalLM" in check_base(tiny, tmp_path / "adapter").detail


@pytest.mark.parametrize(("source", "said"), [("me/none", "no repository this token can see"), ("./nowhere", "no name of a repository"),
                                              ("you/private", "no repository this token can see"), ("org/gated", "gated")])
def test_sources_that_cannot_be_fetched(hub, source, said):
    hub.make("you/private")
    hub.make("org/gated", {"adapter_config.json": b"{}"}, private=False, gated="manual")
    with pytest.raises(UserError, match=said):
        pull_adapter(source)


def test_revisions_of_an_adapter(hub, bases):
    model, tokenizer = trained(bases / "one")
    push_adapter(model, "me/adapter", tokenizer, base_model="org/base", revision="v1")
    base, _ = FastLLM.from_pretrained(str(bases / "one"), dtype="float32")
    with pytest.raises(UserError, match="has no revision 'v2'"):
        pull_adapter("me/adapter", base, revision="v2")
    with pytest.raises(UserError, match="adapter_config.json"):
        pull_adapter("me/adapter", base)  # main has none
    adapted, _ = pull_adapter("me/adapter", base, revision="v1")
    assert same(adapted, tokenizer, model, tokenizer)


def test_arguments_that_mean_nothing_are_refused(bases, tmp_path):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    plain, _ = FastLLM.from_pretrained(str(bases / "one"))
    for arguments, said in (({"revision": "v1"}, "no revisions"), ({"adapter_name": "x"}, "adapter_name="),
                            ({"model": plain, "load_in_4bit": True}, "load_in_4bit")):
        with pytest.raises(UserError, match=said):
            pull_adapter(tmp_path / "copy", **arguments)


def test_what_an_adapter_wants_is_a_sentence(bases, tmp_path):
    model, _ = trained(bases / "one")
    model.save_pretrained(tmp_path)
    record_base(model, tmp_path)
    assert str(wanted_base(tmp_path)) == str(bases / "one") and wanted_base(tmp_path).labels is None
