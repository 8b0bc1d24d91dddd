"""Members of PEFT's enumeration of methods, which is closed."""

from __future__ import annotations

from peft.utils.peft_types import PeftType


def member(name: str) -> PeftType:
    """The member ``name`` of PeftType, in capitals; made where it is missing."""
    name = name.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    made = str.__new__(PeftType, name)
    made._name_ = made._value_ = name
    made.__objclass__ = PeftType
    made._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = made
    PeftType._value2member_map_[name] = made
    type.__setattr__(PeftType, name, made)
    return made
