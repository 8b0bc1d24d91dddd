"""What is expected of MoRA: one square matrix, on linear layers."""

from __future__ import annotations

from .shared import CLASS_NAMES, NO_SUM, NOT_GATHERED, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        (r"it is of kind '(\w+)'", "an {} as a target module raises by name"),
        NO_SUM,
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_linear$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
