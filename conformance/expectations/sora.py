"""What is expected of SoRA: LoRA's factors with gates between them."""

from __future__ import annotations

from .shared import CLASS_NAMES, LAST_BITS, MIXED_DORA, NO_SUM, NOT_GATHERED, TRAINED_E, Expectations

EXPECTATIONS = Expectations(
    refusals=(NO_SUM,),
    excluded=(
        (
            r"test_parameters_after_loading_model\[Vanilla MLP 4 LoRA-",
            "trains at a learning rate of 0.5, at which gates drawn from N(0, 1) may overflow",
        ),
        (
            r"test_lora_embed_scale_is_applied(\[False\]|_mixed_batch)$",
            "asks for random updates below a bound that those with gates drawn from N(0, 1) pass by chance",
        ),
        (r"fsdp_wrapped_learnable_bias\[\w+-Vanilla MLP (4 LoRA|8 LoRA with DoRA)-", LAST_BITS),
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; the gates are trained beside them"),
        (
            "",
            r"test_inject_from_state_dict_missing_keys_warning",
            "takes A and B of a module out of what is saved, and the gates still name it",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        MIXED_DORA,
    ),
)
