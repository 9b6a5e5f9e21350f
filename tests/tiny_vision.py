"""Tiny models and processors of the vision families, made on the spot from configurations: no download, PIL only."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizerFast,
    BlipImageProcessorPil,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
)

TEXTS = ["Which colour is it?", "red and blue", "User: Assistant: system\n", "a square, the answer; What is this: 1 2 3"] * 20

# As the checkpoints ship them, in the parts that matter: SmolVLM/Idefics3, Qwen2.5-VL, LLaVA 1.6 (Vicuna) and Gemma 3.
IDEFICS3 = ("<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}"
            "{% else %}{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
            "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
QWEN = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAVA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['role'] | upper }}: "
         "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
         "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
         "{% else %}ASSISTANT: {% generation %}{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}"
         "{% endfor %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
         "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
         "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
         "<start_of_turn>{{ role }}\n{{ first if loop.first else '' }}{% if m['content'] is string %}{{ m['content'] | trim }}"
         "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}"
         "{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


def byte_bpe(*special, add_bos=False, add_eos=False, **named):
    """A byte-level BPE tokenizer; `named` special tokens become attributes, e.g. `image_token="<image>"`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = list(dict.fromkeys(["<pad>", *special, *named.values()]))
    core.train_from_iterator([*TEXTS, "\n\n\n user\n\n\n"] * 3, trainers.BpeTrainer(
        vocab_size=420, special_tokens=tokens, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    basic = {key: named.pop(key) for key in ("bos_token", "eos_token", "sep_token") if key in named}
    if add_bos or add_eos:
        single = " ".join([*([basic["bos_token"]] if add_bos else []), "$A", *([basic["eos_token"]] if add_eos else [])])
        used = [basic[key] for key, wanted in (("bos_token", add_bos), ("eos_token", add_eos)) if wanted]
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, core.token_to_id(token)) for token in dict.fromkeys(used)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", clean_up_tokenization_spaces=False,
                                   **basic, **({"extra_special_tokens": named} if named else {}))


def text_config(tokenizer, model_type="llama", **more):
    return {"model_type": model_type, "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, **more}


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8}
SIZE = {"height": 16, "width": 16}


def without_video(processor_class):
    """Return a processor class that takes no video processor: those need torchvision, images do not."""
    def check(self, argument_name, argument):
        return None if argument_name == "video_processor" else super(made, self).check_argument_for_proper_class(argument_name, argument)

    made = type(f"{processor_class.__name__}Images", (processor_class,), {"check_argument_for_proper_class": check})
    return made


def idefics3(**pictures):
    tokenizer = byte_bpe("<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>",
                         *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)), eos_token="<end_of_utterance>")
    edge = {"longest_edge": 16}
    images = Idefics3ImageProcessorPil(**{"size": edge, "max_image_size": edge, "do_image_splitting": False, **pictures})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=IDEFICS3)
    config = Idefics3Config(vision_config=VISION, text_config=text_config(tokenizer), scale_factor=2,
                            image_token_id=processor.image_token_id, pad_token_id=tokenizer.pad_token_id)
    return Idefics3ForConditionalGeneration, config, processor


def _qwen(processor_class, config_class, model_class, text_type, vision):
    tokenizer = byte_bpe("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
                         eos_token="<|im_end|>")
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2,
                                      size={"shortest_edge": 64, "longest_edge": 1024})
    processor = without_video(processor_class)(images, tokenizer, None, chat_template=QWEN)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"))}
    config = config_class(text_config=text_config(tokenizer, text_type, rope_parameters=rope), vision_config=vision, **ids)
    return model_class, config, processor


def qwen2_vl():
    return _qwen(Qwen2VLProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration, "qwen2_vl_text",
                 {"embed_dim": 32, "mlp_ratio": 1})


def qwen2_5_vl():
    return _qwen(Qwen2_5_VLProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "qwen2_5_vl_text",
                 {"window_size": 16, "fullatt_block_indexes": [0]})


def qwen3_vl():
    return _qwen(Qwen3VLProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, "qwen3_vl_text",
                 {"deepstack_visual_indexes": [0], "num_position_embeddings": 16})


def _llava_parts():
    tokenizer = byte_bpe("<image>", bos_token="<s>", eos_token="</s>")
    vision = {"model_type": "clip_vision_model", **VISION}
    common = {"text_config": text_config(tokenizer), "vision_config": vision, "vision_feature_layer": -1,
              "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_select_strategy": "default"}
    asked = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "chat_template": LLAVA}
    return tokenizer, common, asked


def llava():
    tokenizer, common, asked = _llava_parts()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    return LlavaForConditionalGeneration, LlavaConfig(**common), LlavaProcessor(images, tokenizer, **asked)


def llava_next():
    tokenizer, common, asked = _llava_parts()
    grid = [[16, 32], [32, 16]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE, image_grid_pinpoints=grid)
    return (LlavaNextForConditionalGeneration, LlavaNextConfig(**common, image_grid_pinpoints=grid),
            LlavaNextProcessor(images, tokenizer, **asked))


def llava_onevision():
    tokenizer, common, asked = _llava_parts()
    grid = [[16, 32], [32, 16]]
    common = {**common, "vision_config": {"model_type": "siglip_vision_model", **VISION}, "vision_feature_select_strategy": "full"}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    common["text_config"]["vocab_size"] = len(tokenizer)
    images = LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=grid)
    processor = without_video(LlavaOnevisionProcessor)(images, tokenizer, None, num_image_tokens=4, vision_feature_select_strategy="full",
                                                       chat_template=LLAVA)
    config = LlavaOnevisionConfig(**common, image_grid_pinpoints=grid, video_token_id=tokenizer.convert_tokens_to_ids("<video>"))
    return LlavaOnevisionForConditionalGeneration, config, processor


def gemma3():
    tokenizer = byte_bpe("<start_of_turn>", "<end_of_turn>", bos_token="<bos>", eos_token="<eos>", boi_token="<start_of_image>",
                         eoi_token="<end_of_image>", image_token="<image_soft_token>")
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=SIZE), tokenizer, chat_template=GEMMA, image_seq_length=4)
    config = Gemma3Config(text_config=text_config(tokenizer, "gemma3_text"), vision_config={"model_type": "siglip_vision_model", **VISION},
                          mm_tokens_per_image=4, image_token_id=tokenizer.image_token_id, boi_token_id=tokenizer.boi_token_id,
                          eoi_token_id=tokenizer.eoi_token_id)
    return Gemma3ForConditionalGeneration, config, processor


def paligemma():
    tokenizer = byte_bpe(bos_token="<bos>", eos_token="<eos>", image_token="<image>")
    images = SiglipImageProcessorPil(size=SIZE)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    text = text_config(tokenizer, "gemma")
    config = PaliGemmaConfig(text_config=text, vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
                             image_token_id=processor.image_token_id, projection_dim=32)
    return PaliGemmaForConditionalGeneration, config, processor


def florence2():
    tokenizer = byte_bpe(bos_token="<s>", eos_token="</s>", image_token="<image>", add_bos=True, add_eos=True)
    images = CLIPImageProcessorPil(size=SIZE, do_center_crop=False)
    images.image_seq_length = 2
    processor = Florence2Processor(images, tokenizer)
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_bos_token_id": tokenizer.bos_token_id}
    vision = {"depths": [1], "patch_size": [7], "patch_stride": [16], "patch_padding": [3], "patch_prenorm": [False],
              "embed_dim": [32], "num_heads": [2], "num_groups": [2], "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0}
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    return Florence2ForConditionalGeneration, config, processor


def instructblip(language="opt"):
    tokenizer = byte_bpe(bos_token="<s>", eos_token="</s>", add_bos=language == "opt", add_eos=language == "t5")
    words = sorted({word.strip("?,;:").lower() for text in TEXTS for word in text.split()})
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    asker = BertTokenizerFast(vocab=vocabulary)
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=SIZE), tokenizer, asker, num_query_tokens=3)
    if language == "opt":
        text = {"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    else:
        text = {"model_type": "t5", "vocab_size": len(tokenizer), "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1,
                "num_heads": 2, "decoder_start_token_id": tokenizer.pad_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = InstructBlipConfig(
        vision_config=VISION, text_config=text, num_query_tokens=3, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        qformer_config={"vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return InstructBlipForConditionalGeneration, config, processor


def chameleon(add_bos=True):
    tokenizer = byte_bpe(bos_token="<s>", eos_token="</s>", sep_token="<sep>", image_token="<image>", boi_token="<boi>",
                         eoi_token="<eoi>", add_bos=add_bos)
    letters = [f"IMGIMG{chr(65 + number)}Z" for number in range(8)]
    tokenizer.add_tokens(letters)
    processor = ChameleonProcessor(ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
                                   tokenizer, image_seq_length=4)
    config = ChameleonConfig(
        **{key: value for key, value in text_config(tokenizer).items() if key not in ("model_type", "head_dim")},
        vocabulary_map=tokenizer.get_vocab(),
        vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32,
                   "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1})
    return ChameleonForConditionalGeneration, config, processor


FAMILIES = {made.__name__: made for made in (idefics3, qwen2_vl, qwen2_5_vl, qwen3_vl, llava, llava_next, llava_onevision, gemma3, paligemma, florence2, instructblip,
                                             chameleon)}
FAMILIES["instructblip_t5"] = functools.partial(instructblip, "t5")


@functools.cache
def processor_of(family):
    return FAMILIES[family]()[2]


@functools.cache
def model_of(family, attn_implementation="eager"):
    model_class, config, _ = FAMILIES[family]()
    torch.manual_seed(0)
    config._attn_implementation = attn_implementation
    model = model_class(config).eval()
    for parameter in model.parameters():  # Gemma's projection starts at 0, and nothing behind it would learn
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model
