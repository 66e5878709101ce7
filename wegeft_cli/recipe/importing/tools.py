"""Tools whose recipes are converted, and the keys that only a recipe of theirs has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A tool, by the name of its module in this package."""

    module: str
    title: str
    keys: frozenset[str]


def _tool(module: str, title: str, keys: str) -> Tool:
    return Tool(module, title, frozenset(keys.split()))


TOOLS = (
    _tool(
        "axolotl",
        "axolotl",
        """
        base_model sequence_len micro_batch_size num_epochs datasets val_set_size
        lora_target_linear sample_packing dataset_prepared_path train_on_inputs
        pad_to_sequence_len evals_per_epoch saves_per_epoch flash_attention adapter
        chat_template wandb_project special_tokens lora_model_dir strict base_model_config
        eval_sample_packing
        """,
    ),
    _tool(
        "llama_factory",
        "LLaMA-Factory",
        """
        stage finetuning_type cutoff_len dataset dataset_dir template lora_target lora_rank
        val_size do_train plot_loss overwrite_cache quantization_bit preprocessing_num_workers
        flash_attn neat_packing additional_target max_samples adapter_name_or_path
        """,
    ),
    _tool(
        "trl",
        "TRL",
        """
        use_peft dataset_name dataset_config dataset_train_split dataset_test_split
        dataset_text_field lora_target_modules lora_r max_length max_seq_length
        completion_only_loss assistant_only_loss packing packing_strategy padding_free
        attn_implementation chat_template_path dataset_num_proc eval_strategy torch_dtype
        dataset_mixer dataset_mixture
        """,
    ),
    _tool(
        "torchtune",
        "torchtune",
        """
        checkpointer tokenizer metric_logger max_steps_per_epoch enable_activation_checkpointing
        enable_activation_offloading log_peak_memory_stats lr_scheduler loss profiler
        save_adapter_weights_only clip_grad_norm
        """,
    ),
    _tool(
        "peft_config",
        "PEFT",
        """
        peft_type base_model_name_or_path inference_mode peft_version init_lora_weights
        auto_mapping
        """,
    ),
)


def find_tool(values: Mapping[Any, Any], *, least: int = 2) -> Tool | None:
    """Return the tool with most of a file's keys, at least `least` of them, or None."""
    if isinstance(values.get("model"), dict) and "_component_" not in values["model"]:
        return None  # sections, as in a recipe of this package
    hits = [len(tool.keys & values.keys()) for tool in TOOLS]
    most = max(hits)
    return TOOLS[hits.index(most)] if most >= least else None
