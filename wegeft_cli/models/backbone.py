"""A base without its head, for looking into it: whatever it was made for, in its own type."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from wegeft_cli.errors import UserError
from wegeft_cli.models.base import quiet_transformers


def load_backbone(base_dir: Path) -> nn.Module:
    """Load a folder's model without a head.

    Args:
        base_dir: A model folder with safetensors.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: If transformers cannot load it.
    """
    from transformers import AutoModel

    try:
        with quiet_transformers():
            model: nn.Module = AutoModel.from_pretrained(
                str(base_dir), use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        message = f"the base cannot be loaded: {lines[0] if lines else type(error).__name__}"
        raise UserError(message, file=str(base_dir)) from error
    return model.eval()
