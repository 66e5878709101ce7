"""WeGeFT as a method of PEFT: importing this module registers it, and here is its config class."""

from wegeft_cli.interop.peft_tuner.register import register

register()

# Only now: the classes look their method up by name while they are being defined.
from wegeft_cli.interop.peft_tuner.config import WegeftConfig  # noqa: E402
from wegeft_cli.interop.peft_tuner.model import WegeftModel  # noqa: E402

__all__ = ["WegeftConfig", "WegeftModel"]
