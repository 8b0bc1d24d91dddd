"""What is expected of AdaLoRA: LoRA's factors with a number of E between them, 0 at the start."""

from __future__ import annotations

from .shared import CLASS_NAMES, NO_SUM, NOT_GATHERED, TRAINED_E, Expectations

EXPECTATIONS = Expectations(
    refusals=(NO_SUM,),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; E is trained beside them"),
        (
            "",
            r"test_inject_from_state_dict_missing_keys_warning",
            "takes A and B of a module out of what is saved, and E still names it",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
