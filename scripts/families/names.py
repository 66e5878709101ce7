"""The families of the matrix: transformers' model types, and what their tiny configs need besides.

`DIMENSIONS` shrinks every config by the names of its keys. `EXTRA` holds what a family needs
beyond that: lists that must agree with each other, and products that must match.
"""

from __future__ import annotations

from typing import Any


def _split(names: str) -> list[str]:
    return names.split()


CAUSAL_LM = _split("""
    afmoe apertus arcee bamba bart bert bert-generation big_bird biogpt bitnet blenderbot bloom
    codegen cohere cohere2 ctrl cwm data2vec-text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
    diffllama doge dots1 electra ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba
    flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text glm glm4
    glm4_moe glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe lfm2
    lfm2_moe llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart minicpm3 minimax
    minimax_m2 ministral mistral mixtral mllama modernbert-decoder mpt nemotron nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_5 qwen3_5_moe qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta roc_bert
    roformer rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma whisper xglm xlm-roberta xlnet
    xlstm zamba zamba2
""")

SEQUENCE_CLASSIFICATION = _split("""
    albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert
    electra ernie eurobert funnel gemma3 gemma3_text gpt2 gpt_neox layoutlm llama longformer mbart
    megatron-bert mistral mobilebert modernbert mpnet nomic_bert nystromformer opt qwen2 qwen3
    qwen3_5 rembert roberta roformer squeezebert t5 umt5 xlm-roberta xlnet xmod yoso
""")

IMAGE_CLASSIFICATION = _split("""
    beit bit clip convnext convnextv2 cvt data2vec-vision deit dinov2
    dinov2_with_registers donut-swin efficientnet focalnet hgnet_v2 hiera ijepa imagegpt levit
    metaclip_2 mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pp_lcnet pvt pvt_v2
    regnet resnet segformer siglip siglip2 swiftformer swin swinv2 vit vit_msn
""")

FAMILIES = {
    "causal_lm": CAUSAL_LM,
    "sequence_classification": SEQUENCE_CLASSIFICATION,
    "image_classification": IMAGE_CLASSIFICATION,
}

WHOLE_MODEL = ("clip", "metaclip_2", "siglip", "siglip2")
"""Image families that are published as a whole model, with a text tower and without a head."""

WITH_IMAGES = ("llama4", "mllama")
"""Language families that are published with an image tower that text alone does not run."""

VOCABULARY = 384
EDGE = 32

DIMENSIONS: dict[str, Any] = {
    **dict.fromkeys(
        _split("""
        hidden_size d_model n_embd dim embed_dim encoder_hidden_dim projection_dim
        pooler_hidden_size hidden_dim cross_attention_hidden_size attention_hidden_size
        model_dim embedding_size pooler_output_size vision_output_dim image_size
        """),
        32,
    ),
    **dict.fromkeys(
        _split("""
        intermediate_size n_inner d_ff dff ffn_dim encoder_ffn_dim decoder_ffn_dim
        ffn_hidden_size dim_ff d_inner shared_intermediate_size moe_intermediate_size
        moe_shared_expert_intermediate_size shared_expert_intermediate_size
        intermediate_size_mlp expert_ffn_hidden_size moe_shared_intermediate_size
        block_ff_dim hidden_dim_ff
        """),
        48,
    ),
    **dict.fromkeys(
        _split("""
        num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers depth num_blocks num_key_value_heads
        num_kv_heads kv_n_heads multi_query_group_num num_experts_per_tok
        num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
        """),
        2,
    ),
    **dict.fromkeys(
        _split("""
        num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads attention_heads linear_num_key_heads
        linear_num_value_heads index_n_heads kv_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_moe_experts
        """),
        4,
    ),
    **dict.fromkeys(
        _split("""
        head_dim d_kv d_head global_head_dim kv_channels linear_key_head_dim
        linear_value_head_dim qk_nope_head_dim v_head_dim index_head_dim
        qk_rope_head_dim rotary_dim attention_head_dim mamba_head_dim mamba_d_head
        hidden_size_per_layer_input laurel_rank mamba_d_state state_size ssm_state_size
        time_step_rank mamba_dt_rank patch_size
        """),
        8,
    ),
    **dict.fromkeys(
        _split("""
        kv_lora_rank q_lora_rank o_lora_rank qk_lora_rank sliding_window
        attention_window sliding_window_size local_attention
        """),
        16,
    ),
    **dict.fromkeys(
        _split("""
        n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts
        """),
        1,
    ),
    **dict.fromkeys(
        _split("""
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
        max_source_positions context_length max_sequence_length seq_length
        model_max_length
        """),
        256,
    ),
    **dict.fromkeys(
        _split("""
        vocab_size_per_layer_input vocab_size
        """),
        VOCABULARY,
    ),
    "initializer_range": 0.2,
    **dict.fromkeys(
        _split("""
        router_jitter_noise input_jitter_noise router_aux_loss_coef
        """),
        0.0,
    ),
    "num_nextn_predict_layers": 0,
}

_FOUR = [16, 16, 32, 32]
_ONES = [1, 1, 1, 1]
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_STAGES = {"depths": _ONES, "hidden_sizes": _FOUR}
_PVT = {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}

EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron": {"num_key_value_heads": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "mobilebert": {"normalization_type": "layer_norm"},  # random layers without one saturate
    "t5": {"decoder_start_token_id": 3},
    "umt5": {"decoder_start_token_id": 3},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2},
    "bit": {**_STAGES, "embedding_size": 16, "num_groups": 8},
    "convnext": {**_STAGES, "patch_size": 2},
    "convnextv2": {**_STAGES, "patch_size": 2},
    "cvt": {
        "embed_dim": [16, 16, 32],
        "num_heads": [1, 2, 2],
        "depth": [1, 2, 3],
        "drop_path_rate": [0.0] * 3,
    },
    "donut-swin": _SWIN,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 64},
    "focalnet": {**_STAGES, "patch_size": 2, "embed_dim": 16},
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "hidden_sizes": _FOUR,
        "depths": _ONES,
        "stage_in_channels": [16, 16, 16, 32],
        "stage_mid_channels": [8, 8, 8, 16],
        "stage_out_channels": _FOUR,
        "stage_num_blocks": _ONES,
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {
        "image_size": [EDGE, EDGE],
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "query_stride": [2, 2],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
    },
    "levit": {
        "patch_size": 16,
        "hidden_sizes": [16, 16, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": _ONES[:3],
        "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
        "image_size": 64,
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": 4 * EDGE,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
        "patch_size": 2,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 2, "n_attn_blocks": _ONES[:3]},
    "poolformer": {**_STAGES, "patch_size": 16},
    "pp_lcnet": {
        "block_configs": [
            [[3, 8, 16, 1, False]],
            [[3, 16, 16, 2, False]],
            [[3, 16, 32, 2, False]],
            [[3, 32, 32, 2, False]],
            [[5, 32, 32, 2, True]],
        ],
        "stem_channels": 8,
        "hidden_dim": 32,
    },
    "pvt": {**_PVT, "image_size": 2 * EDGE},
    "pvt_v2": {**_PVT, "image_size": [2 * EDGE, 2 * EDGE]},
    "segformer": _PVT,
    "regnet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "resnet": {**_STAGES, "embedding_size": 16},
    "swiftformer": {"depths": _ONES, "embed_dims": _FOUR},
}
"""Model type -> keys of its config, over those of `DIMENSIONS`."""
