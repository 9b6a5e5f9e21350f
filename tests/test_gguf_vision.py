"""Projector files of tiny vision-language models, opened by llama.cpp beside the text model and held against transformers."""

import base64
import io
import json

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from supertrainer.export.gguf.convert import convert
from supertrainer.export.gguf.vision import convert_projector, has_projector, plan_projector
from supertrainer.inference.llama import Llama
from supertrainer.models.builtin import make_config, make_model, make_processor, recipe, train_byte_bpe
from supertrainer.runtime import UserError, no_bars, quiet

pytest.importorskip("xllamacpp", reason="needs the extra gguf")

TEXTS = ["Which digit is this?", "It is a 1, a 2 or a 3.", "What do you see on the picture?"]
BEFORE, AFTER = "<|im_start|>user\n", "Which digit is this?<|im_end|>\n<|im_start|>assistant\n"
ROWS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
Q = gguf.GGMLQuantizationType


def lively(model):
    """Random weights large enough for attention to choose, so that every patch and position matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * 0.1) if weight.dim() == 1 else weight.copy_(noise * 0.12)
    return model.eval()


def save(model, processor, folder):
    with quiet(), no_bars():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def idefics3(folder, *, split=False, **vision):
    values = recipe("tiny_idefics3", {"vision_config": {"num_hidden_layers": 2, **vision}})
    processor = make_processor(values, TEXTS)
    tokenizer = processor.tokenizer
    if "\n\n" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["\n\n"])
    if split:
        tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.additional_special_tokens, *ROWS]}
                                     if hasattr(tokenizer, "additional_special_tokens") else {"extra_special_tokens": ROWS})
        processor.image_processor.do_image_splitting = True
        processor.image_processor.size = {"longest_edge": 64}
    model = lively(make_model("mllm", make_config(values, tokenizer)))
    save(model, processor, folder)
    return model, processor


def llava(folder, *, layer=-2, inner=128):
    tokenizer = train_byte_bpe(TEXTS, 300, extra_tokens=["<image>"])
    tower = SiglipVisionConfig(hidden_size=64, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                               patch_size=8)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
                       pad_token_id=0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_select_strategy="full", vision_feature_layer=layer, image_seq_length=16)
    model = lively(LlavaForConditionalGeneration(config))
    processor = LlavaProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, patch_size=8,
                               vision_feature_select_strategy="full", num_additional_image_tokens=0)
    save(model, processor, folder)
    return model, processor


def picture(size=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def next_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits[0, -1].double().log_softmax(-1).numpy()


def files(folder, text="f32", projector="f32"):
    return (convert(folder, folder.parent / "text.gguf", text, progress=False),
            convert_projector(folder, folder.parent / "mmproj.gguf", projector))


def by_llama(made, image, prompt=BEFORE + "<image>" + AFTER):
    """Log-probabilities of the next token [vocabulary]; the token said is a letter, since half a character is not told."""
    with Llama(made[0], projector=str(made[1]), context=256, threads=1) as llama:
        data = {"prompt_string": prompt.replace("<image>", llama.ask("/props")["media_marker"]),
                "multimodal_data": [base64.b64encode(png(image)).decode()]}
        said = llama.ask("/completion", {"prompt": data, "n_predict": 1, "n_probs": llama.vocabulary, "temperature": 0,
                                         "logit_bias": [[llama.tokenize("W")[0], 1e9]]})["completion_probabilities"]
    found = np.zeros(llama.vocabulary)
    for entry in said[0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def as_llama_shows(model, processor, image):
    """transformers on the sequence that llama.cpp makes of an image of one tile: the tile, two line feeds, the whole."""
    tokenizer, seen = processor.tokenizer, "<image>" * processor.image_seq_len
    text = (f"{BEFORE}<fake_token_around_image><row_1_col_1>{seen}\n\n<fake_token_around_image><global-img>{seen}"
            f"<fake_token_around_image>{AFTER}")
    pixels = processor.image_processor(images=[[image, image]], return_tensors="pt")["pixel_values"]
    return next_of(model, input_ids=tokenizer(text, return_tensors="pt").input_ids, pixel_values=pixels)


@pytest.mark.parametrize("projector, limit", [("f32", 0.02), ("f16", 0.03), ("bf16", 0.25), ("q8_0", 0.25)])
def test_idefics3_sees_in_llama_cpp_what_it_sees_in_transformers(projector, limit, tmp_path):
    model, processor = idefics3(tmp_path / "model")
    found = by_llama(files(tmp_path / "model", projector=projector), picture())
    wanted, other = as_llama_shows(model, processor, picture()), as_llama_shows(model, processor, picture(seed=1))
    assert np.abs(found[:len(wanted)] - wanted).max() < limit < np.abs(wanted - other).max() / 2


def test_a_tower_whose_mlp_is_as_wide_as_itself_is_not_turned_round(tmp_path):
    model, processor = idefics3(tmp_path / "model", intermediate_size=96)
    found = by_llama(files(tmp_path / "model"), picture())
    wanted = as_llama_shows(model, processor, picture())
    assert np.abs(found[:len(wanted)] - wanted).max() < 0.02


def test_tiles_come_in_the_processors_order_with_its_tokens(tmp_path):
    model, processor = idefics3(tmp_path / "model", split=True)
    image = Image.new("RGB", (64, 64))  # four tiles of one colour each: filters differ at their edges alone
    for place, colour in (((0, 0), "red"), ((32, 0), "lime"), ((0, 32), "blue"), ((32, 32), "white")):
        image.paste(colour, (*place, place[0] + 32, place[1] + 32))
    inputs = processor(text=BEFORE + "<image>" + AFTER, images=[image], return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 5
    wanted = next_of(model, **inputs)
    found = by_llama(files(tmp_path / "model"), image)
    turned = next_of(model, **{**inputs, "pixel_values": inputs["pixel_values"][:, [1, 0, 2, 3, 4]]})
    assert np.abs(found[:len(wanted)] - wanted).max() < 0.1 < np.abs(wanted - turned).max()


@pytest.mark.parametrize("layer, inner", [(-1, 128), (-2, 128), (1, 128), (-2, 64)])
def test_llava_with_a_siglip_tower(layer, inner, tmp_path):
    model, processor = llava(tmp_path / "model", layer=layer, inner=inner)
    found = by_llama(files(tmp_path / "model"), picture())
    inputs = [processor(text=BEFORE + "<image>" + AFTER, images=[picture(seed=seed)], return_tensors="pt") for seed in (0, 1)]
    wanted, other = (next_of(model, **given) for given in inputs)
    assert np.abs(found[:len(wanted)] - wanted).max() < 0.03 < np.abs(wanted - other).max() / 2


def test_types_are_what_llama_cpp_can_compute_with(tmp_path):
    idefics3(tmp_path / "model")
    for method, conv, matrix in (("f32", Q.F32, Q.F32), ("f16", Q.F16, Q.F16), ("bf16", Q.F32, Q.BF16), ("q8_0", Q.F16, Q.Q8_0)):
        path = convert_projector(tmp_path / "model", tmp_path, method)
        held = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
        assert path.name == f"mmproj-{(tmp_path / 'model').parent.name}-{method.upper()}.gguf"
        assert held.pop("v.patch_embd.weight") == conv and held.pop("v.position_embd.weight") == Q.F32
        assert {kind for name, kind in held.items() if name.endswith(".bias") or ".ln" in name} == {Q.F32}
        assert {kind for name, kind in held.items() if ".attn" in name and name.endswith(".weight")} == {matrix}
    assert not list(tmp_path.glob("*.part"))


def changed(folder, name, **values):
    path = folder / name
    held = json.loads(path.read_text())
    for key, value in values.items():
        place, *parts = held, *key.split("__")
        for part in parts[:-1]:
            place = place[part]
        place[parts[-1]] = value
    path.write_text(json.dumps(held))


@pytest.mark.parametrize("said, name, values", [
    ("rescale_factor=1.0", "processor_config.json", {"image_processor__rescale_factor": 1.0}),
    ("do_normalize=False", "processor_config.json", {"image_processor__do_normalize": False}),
    ("image_std should be three", "processor_config.json", {"image_processor__image_std": None}),
    ("does not stretch the table", "processor_config.json", {"image_processor__max_image_size": {"longest_edge": 64}}),
    ("says nothing about images", "processor_config.json", {"image_processor": {}}),
    ("hidden_act='relu'", "config.json", {"vision_config__hidden_act": "relu"}),
    ("scale_factor=3 does not divide", "config.json", {"scale_factor": 3}),
    ("config.json promises", "config.json", {"vision_config__hidden_size": 48}),
    ("'paligemma' cannot be written", "config.json", {"model_type": "paligemma"}),
])
def test_what_llama_cpp_would_do_otherwise_is_refused_by_name(said, name, values, tmp_path):
    idefics3(tmp_path / "model")
    changed(tmp_path / "model", name, **values)
    with pytest.raises(UserError, match=said.replace("(", "\\(")):
        plan_projector(tmp_path / "model")
    assert has_projector(tmp_path / "model")


def test_a_tower_with_a_class_token_is_refused_with_the_reason(tmp_path):
    llava(tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    stem = next(name for name in held if name.endswith("embeddings.patch_embedding.weight")).removesuffix("patch_embedding.weight")
    save_file(held | {f"{stem}class_embedding": torch.zeros(64)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="drops the first patch"):
        plan_projector(tmp_path / "model")


def test_a_vocabulary_without_the_tokens_around_an_image_is_refused(tmp_path):
    model, processor = idefics3(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace("<global-img>", "<other-img>"))
    assert "<global-img>" not in AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    with pytest.raises(UserError, match="lacks <global-img>"):
        plan_projector(tmp_path / "model")


def test_what_a_user_should_know_is_said(tmp_path):
    idefics3(tmp_path / "whole")
    idefics3(tmp_path / "tiles", split=True)
    whole, tiles = plan_projector(tmp_path / "whole").notes, plan_projector(tmp_path / "tiles").notes
    assert len(whole) == 2 and "twice" in whole[1] and len(tiles) == 1 and "filters of its own" in tiles[0]
