"""A LoRA adapter as llama.cpp reads it (`--lora`): pairs of tensors and a scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wegeft_cli.exporting.gguf_layers import declare_tensor, import_gguf, read_layers, to_numpy
from wegeft_cli.methods.lora_equivalent.plan import LoraEquivalent


def write_adapter_gguf(
    path: Path,
    plan: LoraEquivalent,
    base_dir: Path,
    *,
    dtype: str,
    base_name: str,
    on_layer: Callable[[int], None],
) -> int:
    """Write the file; one layer is in memory at a time.

    Args:
        dtype: float32, bfloat16 or float16.

    Raises:
        UserError: If the base is of a kind that is not written here.
    """
    gguf = import_gguf()
    layers = read_layers(base_dir)
    writer = gguf.GGUFWriter(path, layers.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plan.rank))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    for name in plan.members:
        d_out, d_in = plan.shape_of(name)
        found = layers.rename(f"{name}.weight")
        declare_tensor(writer, f"{found}.lora_a", (plan.rank, d_in), dtype)
        declare_tensor(writer, f"{found}.lora_b", (d_out, plan.rank), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, name in enumerate(plan.members, start=1):
        pair = plan.make(name)
        for tensor in (pair.A, layers.order_rows(name, pair.B)):
            writer.write_tensor_data(to_numpy(tensor, dtype)[0])
        on_layer(number)
    writer.close()
    return 2 * len(plan.members)
