"""Tiny configurations of any architecture of the installed transformers, made from its defaults by its fields' names.

A configuration class says its own defaults; `shrink` walks them, sub-configurations included, and makes every size small
by the name of its field, so that no architecture needs code of its own. What names cannot tell is data: `FIXES`.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, POSITIONS, EXPERTS = 64, 4, 16, 128, 160, 128, 4
IMAGE, PATCH = 32, 8
FIRST_TOKEN = 60  # ordinary tokens; special ones are below

# (name of the field, largest value), the first that matches the whole name counts; see `_number`
SIZES = tuple((re.compile(pattern), limit) for pattern, limit in (
    (r".*(topk_group|top_k_group)", 1),
    (r"n_groups?|num_expert_group|mamba_n_groups|mamba_ngroups|o_groups", 2),
    (r"num_experts_per_tok(en)?|moe_top_?k|.*experts_top_k|top_k_experts|moe_k", 2),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)", EXPERTS),
    (r".*(n_shared_experts|num_shared_experts)", 1),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers|num_hash_layers|max_window_layers", 1),
    (r"attn_layer_period|expert_layer_period|global_attn_every_n_layers", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"(num_nextn_predict|mtp_num_hidden|num_mtp)_layers", 0),
    (r".*mamba.*heads|ssm_num_heads", 8),
    (r"num_lookup_heads|.*index.*n?_heads", HEADS),
    (r".*image_seq_length|mm_tokens_per_image|vision_soft_tokens_per_image|num_image_tokens|image_seq_len", 16),
    (r".*(num_query_tokens|latent_query_num|num_latents|resampler_n_latents|resampler_num_latents|query_length)", 4),
    (r"(index_topk|index_topk_blocks)", 8),
    (r"dim_model_base", HIDDEN),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r".*(head_dim|headdim|d_kv|d_head|dim_head|kv_channels|head_size|d_state|state_size|qk_rope_head_dim)", HEAD_DIM),
    (r".*(lora_rank|dt_rank|time_step_rank|laurel_rank|_rank|lowrank|embedding_rank|d_rel)", 8),
    (r".*(sliding_window.*|window_len|attention_window.*|local_attention.*|keep_window_size|chunk_length)", 8),
    (r".*(chunk_size|chunksize|block_size)", 8),
    (r".*heads?", HEADS),
    (r".*(num_.*layers|n_layers?|encoder_layers|decoder_layers|layers|depth|num_blocks|num_layers_per_stack)", 2),
    (r"num_self_attends_per_block", 2),
    (r".*(codebook_size|num_embeddings)", 32),
    (r".*vocab(_size)?(_per_layer_input|_base)?|num_hash_buckets|encoder_hash_byte_group_vocab", VOCABULARY),
    (r".*(position_embedding.*|positions|n_ctx|max_seq_len|context_length|seq_len|model_max_length|max_window)", POSITIONS),
    (r"(num_position_embeddings|num_patches|max_num_patches|position_embedding_size)", (IMAGE // PATCH) ** 2),
    (r".*(image_size|img_size|crop_size|resolution|input_size)", IMAGE),
    (r"pos_emb_(height|width)|posemb_grid_size", IMAGE // PATCH),
    (r".*patch_size", PATCH),
    (r"(attention|block|output_attention)_stride", 8),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|d_ff|dff|d_inner|n_inner|mlp_dim|feed_forward_size|hidden_dim|"
     r"dense_size|expert_dim)", INTERMEDIATE),
    (r".*(hidden_size.*|d_model|n_embd|emb_size|emb_dim|embedding_size|embed_dim|embedding_dim|_dim|dim|width|d_latents|"
     r"channels?|projection_dim|proj_dim|output_size|out_channel|d_ssm|mid_dim)", HIDDEN),
))
OFF = re.compile(r".*(dropout|drop|dropout_prob|drop_rate|layerdrop|pdrop|jitter_noise|mask_time_prob|mask_feature_prob)(_rate|_prob)?")
TOKEN = re.compile(r".*(token_id|token_index|token_ids|_id)")
ORDINARY = ("insert_layer_id", "image_split_id", "seed_id")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _number(name: str, value: int, facts: dict[str, Any]) -> int:
    """Return `value` or something smaller, as the field's name tells."""
    if re.fullmatch(r".*(num_key_value_heads|num_kv_heads|num_query_groups|num_value_groups|kv_heads|key_value_heads)", name):
        return HEADS if value >= facts.get("heads", value + 1) else min(value, 2)
    for pattern, limit in SIZES:
        if pattern.fullmatch(name):
            return facts["layers"] if limit == 2 and value == facts.get("depth") and "layer" in name else min(value, limit)
    return value


def _covering(values: Iterable[Any], count: int) -> list:
    """Return `count` entries that show every distinct one as far as there is room, in the order of their first use."""
    values = list(values)
    distinct = list({repr(value): value for value in values}.values())
    return (distinct + values)[:count] if len(distinct) < count else distinct[:count]


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    # `vars`, as an attribute that differs between layers refuses to be read
    return next((value for name in names if type(value := vars(config).get(name)) is int), None)


def _layers(config: PreTrainedConfig) -> tuple[int | None, int]:
    """Return the default number of layers, and how many show every kind of layer once (between 2 and 4)."""
    depth = _first(config, "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
    kinds = [len(set(value)) for value in vars(config).values()
             if isinstance(value, (list, tuple)) and depth and len(value) == depth
             and all(isinstance(item, str) for item in value)]
    return depth, min(4, max([2, *kinds]))


def _rope(parameters: dict, head_dim: int) -> dict:
    """Return rotary settings for a head of `head_dim`: sections that add up, factors of the right length."""
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        return {name: _rope(value, head_dim) for name, value in parameters.items()}
    half = max(1, int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2)
    found = dict(parameters)
    for name, value in parameters.items():
        if name.endswith("section") and isinstance(value, (list, tuple)):
            parts = [max(1, half * part // sum(value)) for part in value]
            found[name] = [half - sum(parts[1:]), *parts[1:]]
        elif name in ("short_factor", "long_factor"):
            found[name] = list(value)[:half]
        elif name == "original_max_position_embeddings" and value:
            found[name] = min(value, POSITIONS // 2)
    return found


class _Tokens:
    """Gives every special token of one model, whichever sub-configuration names it, an id inside the vocabulary."""

    def __init__(self) -> None:
        self.ids = dict(SPECIAL)

    def __call__(self, name: str) -> int:
        name = name.replace("token_index", "token_id")
        if name not in self.ids:
            self.ids[name] = 3 + len(self.ids) - len(SPECIAL)
        return self.ids[name]


def _value(name: str, value: Any, facts: dict[str, Any], tokens: _Tokens) -> Any:
    """Return the small value of one field."""
    if isinstance(value, PreTrainedConfig):
        return shrink(value, tokens, facts["fixes"].get(name, {}))
    if isinstance(value, bool) or isinstance(value, str):
        return value
    if TOKEN.fullmatch(name) and name not in ORDINARY:
        if isinstance(value, int):
            return tokens(name) if name in SPECIAL or value >= FIRST_TOKEN else value
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
            return type(value)(tokens(f"{name}{place or ''}") for place in range(len(value)))
        if value is None and name in ("pad_token_id", "image_token_id", "image_token_index", "video_token_index"):
            return tokens(name)
        return value
    if value is None:
        return {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}.get(name)
    if isinstance(value, float):
        return 0.0 if OFF.fullmatch(name) else value
    if isinstance(value, int):
        return _number(name, value, facts)
    if isinstance(value, dict) and name.startswith("rope_"):
        return _rope(value, facts["head_dim"])
    if isinstance(value, (list, tuple)) and value:
        if len(value) == facts["depth"] or (name.endswith("layer_types") and len(value) > facts["layers"]):
            return type(value)(_covering(value, facts["layers"]))
        if all(type(item) is int for item in value):
            if re.fullmatch(r".*(layers?|ind(ex|ic)es|indexes|idxs|indices|layer_ids)", name):
                return _places(value, facts["layers"])
            return type(value)(_number(name, item, {**facts, "depth": None}) for item in value)
    return value


def _differences(config: PreTrainedConfig, kinds: list[str], facts: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Return what the layers of `kinds` have of their own, where each differs from the model's values."""
    overrides = config._heterogeneity_spec.per_layer_overrides
    first = {kind: vars(config)["layer_types"].index(kind) for kind in kinds}
    return {place: {name: 2 * HEAD_DIM if name == "head_dim" else _number(name, value, {
                        **facts, "heads": overrides[first[kind]].get("num_attention_heads", facts["heads"])})
                    for name, value in overrides[first[kind]].items() if type(value) is int}
            for place, kind in enumerate(kinds) if first[kind] in overrides}


def _places(value: list | tuple, layers: int) -> list | tuple:
    """Return places of layers that exist: the last ones, as many as there were at most."""
    if min(value) < 0:
        return type(value)(-1 - place for place in range(min(len(value), layers)))
    return type(value)(range(layers - min(len(value), max(1, layers - 1)), layers))


def shrink(config: PreTrainedConfig, tokens: _Tokens | None = None, fixes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Return a tiny configuration of the class of `config`.

    Args:
        config: an instance with its class's defaults.
        tokens: the special tokens given out so far.
        fixes: values that names cannot tell; a dictionary under the name of a sub-configuration goes to that one.
    """
    tokens, fixes = tokens or _Tokens(), fixes or {}
    depth, layers = _layers(config)
    heads = _first(config, "num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads",
                   "encoder_attention_heads") or 10 ** 9
    facts = {"depth": depth, "layers": fixes.get("num_hidden_layers", layers), "heads": heads, "fixes": fixes,
             "head_dim": fixes.get("head_dim", HEAD_DIM)}
    default, values = vars(type(config)()), {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("id2label", "label2id", "architectures", "transformers_version"):
            continue
        small = _value(name, value, facts, tokens)
        if isinstance(value, PreTrainedConfig) or name not in default or repr(small) != repr(default[name]):
            values[name] = small
    if vars(config).get("_heterogeneity_spec") is not None:
        values["per_layer_config"] = _differences(config, values.get("layer_types", []), facts)
    for name, value in {"initializer_range": 0.1, "use_cache": False}.items():  # 0.1: every layer moves the loss
        if name in vars(config):
            values[name] = value
    values |= {name: value for name, value in fixes.items()
               if not (isinstance(value, dict) and isinstance(vars(config).get(name), PreTrainedConfig))}
    return type(config)(**values)


def tiny_config(model_type: str, model_class: type) -> PreTrainedConfig:
    """Return the configuration that `model_class` takes, tiny: of `model_type`, or of the part of it that the class is of."""
    config = shrink(CONFIG_MAPPING[model_type](), None, FIXES.get(model_type))
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}  # the model's own default is for a head of 128
_VISION_START = {"vision_start_token_id": 50, "vision_end_token_id": 51}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_NO_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_INDEXER = {"indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM}
_HALF = {**_ROPE, "partial_rotary_factor": 0.5}
_NOTE = {"head_dim": 2 * HEAD_DIM, "rope_parameters": {"sliding_attention": _HALF, "indexed_attention": _HALF}}

# What the names of the fields cannot tell: model type -> values (a sub-configuration's under its name).
FIXES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {(IMAGE // PATCH) ** 2: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 40, **{f"IMGIMG{chr(65 + place)}Z": 8 + place for place in range(8)}},
                  "vq_config": {"num_embeddings": 8}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {**_EXPERTS, "layer_types": ["full_attention"] * 2,
                                      "mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {**_EXPERTS, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _NOTE, "audio_config": {"adapter_input_size": HIDDEN}},
    "dots3_note_text": _NOTE,
    "emu3": {"vocabulary_map": {"<image>": 40, "<|extra_200|>": 41,
                                **{f"<|visual token {place:06d}|>": 8 + place for place in range(32)}},
             "vq_config": {"codebook_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": VOCABULARY},
    "gemma3n_text": {"num_hidden_layers": 3, "num_kv_shared_layers": 1},
    "gemma4_assistant": {"text_config": _NO_PER_LAYER},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm46v": {"text_config": _SECTIONS},
    "glm4v": {"text_config": _SECTIONS},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm_ocr": {"text_config": _SECTIONS},
    "glmga": {"text_config": _SECTIONS},
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [[-2, 0]], "spatial_vision_layer": -1, "spatial_target_layers": [1]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}}},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "kosmos-2.5": {"vision_config": {"patch_embed_hidden_size": 192}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llava_next": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "llava_next_video": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "llava_onevision": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "mamba2": {"num_heads": 8},
    "mistral4": {"rope_parameters": {**_HALF, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "mllama": {"vision_config": {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "perceiver": {"max_position_embeddings": 24},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 192}},
    "qwen2_5_omni_thinker": {**_VISION_START, "text_config": _SECTIONS},
    "qwen2_5_vl": {"text_config": _SECTIONS},
    "qwen2_vl": {"text_config": _SECTIONS},
    "qwen3_omni_moe_thinker": _VISION_START,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"hash_seed": 0, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 6]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "t5": {"decoder_start_token_id": 0},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128,
              "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128},
}
