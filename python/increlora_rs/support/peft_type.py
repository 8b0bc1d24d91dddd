"""The member INCRELORA of PEFT's enumeration of methods."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

_NAME = "INCRELORA"


def _member() -> PeftType:
    """The member INCRELORA of the closed enumeration PeftType; made once."""
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    type.__setattr__(PeftType, _NAME, member)
    return member


PEFT_TYPE = _member()
