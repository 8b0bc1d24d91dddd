"""What is expected of MELoRA: two stacks of factors, on linear layers that its slices divide."""

from __future__ import annotations

from .shared import CLASS_NAMES, NO_SUM, NOT_GATHERED, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        (r"(n_slices)=\d+ does not divide its", "a module that `{}` does not divide raises by name"),
        (r"it is of kind '(\w+)'", "an {} as a target module raises by name"),
        NO_SUM,
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_linear$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
