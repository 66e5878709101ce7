"""A LoRA adapter as llama.cpp reads it (`--lora`): pairs of tensors and a scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from wegeft_cli.exporting.gguf_layers import declare_tensor, import_gguf, read_layers, to_numpy
from wegeft_cli.methods.wegeft.lora_equivalent import Twin


def write_adapter_gguf(
    path: Path,
    base_dir: Path,
    modules: Mapping[str, tuple[int, int]],
    make: Callable[[str], Twin],
    *,
    rank: int,
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
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    for name, (d_out, d_in) in modules.items():
        found = layers.rename(f"{name}.weight")
        declare_tensor(writer, f"{found}.lora_a", (rank, d_in), dtype)
        declare_tensor(writer, f"{found}.lora_b", (d_out, rank), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, name in enumerate(modules, start=1):
        twin = make(name)
        for tensor in (twin.A, layers.order_rows(name, twin.B)):
            writer.write_tensor_data(to_numpy(tensor, dtype)[0])
        on_layer(number)
    writer.close()
    return 2 * len(modules)
