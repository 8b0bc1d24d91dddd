"""What is expected of PRILoRA: LoRA's factors, on linear layers alone."""

from __future__ import annotations

from .shared import CLASS_NAMES, MIXED_DORA, NOT_GATHERED, ONE_KIND, Expectations

EXPECTATIONS = Expectations(
    refusals=(ONE_KIND,),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_(linear|conv1d)$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        MIXED_DORA,
    ),
)
