"""What is expected of LoRA-Mini: a rank that stays, factors within frozen ones."""

from __future__ import annotations

from .shared import CLASS_NAMES, LAST_BITS, NO_SUM, NOT_GATHERED, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        (r"r(?:ank_pattern\[.*\])?=\d+ is above lora_a=", "a rank above `lora_a` or `lora_b` raises by name"),
        (r"it is of kind '(embedding)'", "an {} as a target module raises by name"),
        NO_SUM,
    ),
    excluded=((r"fsdp_wrapped_learnable_bias\[bias_peft_method_only-Vanilla MLP 3 LoRA-", LAST_BITS),),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_(linear|conv1d|conv2d)$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
