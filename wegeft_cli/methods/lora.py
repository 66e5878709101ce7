"""LoRA and its presets dora, rslora and pissa (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from wegeft_cli.methods.peft.method import PeftMethod


class LoraMethod(PeftMethod):
    """A pair B A beside each layer."""

    names = ("lora", "dora", "rslora", "pissa")
    peft_types = ("LORA",)
    takes_any_name = False
    is_lora = True


METHOD = LoraMethod()
