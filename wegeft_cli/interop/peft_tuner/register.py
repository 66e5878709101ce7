"""Making WeGeFT known to PEFT, which has no door for methods from outside."""

from __future__ import annotations

from typing import Any

from wegeft_cli.artifacts.manifest import PEFT_TYPE


def register() -> None:
    """Register WeGeFT with PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` know it.

    A second call does nothing. A PEFT that has a WEGEFT of its own keeps it.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    if PEFT_TYPE in PeftType.__members__ and PeftType[PEFT_TYPE] in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    if PEFT_TYPE not in PeftType.__members__:
        _add_member(PeftType, PEFT_TYPE)
    # After the member: the config's class looks it up.
    from wegeft_cli.interop.peft_tuner.config import WegeftConfig
    from wegeft_cli.interop.peft_tuner.model import WegeftModel

    register_peft_method(name=PEFT_TYPE.lower(), config_cls=WegeftConfig, model_cls=WegeftModel)


def _add_member(enum: Any, name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which refuses any name that is not in it.

    Python's enumerations are closed; these are the attributes by which one finds its members, in
    3.11 to 3.13 alike.
    """
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
