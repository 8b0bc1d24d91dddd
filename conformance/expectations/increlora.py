"""What is expected of IncreLoRA: components that come and go, each with a number of E."""

from __future__ import annotations

from .shared import (
    CLASS_NAMES,
    LAST_BITS,
    MIXED_DORA,
    NOT_GATHERED,
    OLD_PEFT,
    SUM_OF_FACTORS,
    SUM_OF_MODULES,
    TRAINED_E,
    Expectations,
)

EXPECTATIONS = Expectations(
    states=("fresh", "grown"),
    refusals=(
        SUM_OF_FACTORS,
        SUM_OF_MODULES,
        (
            r"(rank) \d+ is more than \d+, the smaller of in_features",
            "a {} above min(in, out) raises by name",
        ),
    ),
    excluded=(
        (r"test_inject_from_state_dict_transformers_target_parameters_(raises|fails)$", OLD_PEFT),
        (
            r"test_mixed_adapter_batches_mlp\[LoRA mixed adapter-",
            "asks for equal bits where a product of another size rounds otherwise",
        ),
        (
            r"test_add_weighted_adapter_with_different_scaling\[dare_\w+_svd",
            "asks for a correlation that adapters thinned out at random reach by chance",
        ),
        (r"test_save_load_roundtrip_fsdp_wrapped\[Vanilla MLP 7 LoRA with DoRA-", LAST_BITS),
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; E is trained beside them"),
        (
            "",
            r"test_inject_from_state_dict_missing_keys_warning",
            "takes A and B of a module out of what is saved, and E still names it",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        MIXED_DORA,
        (
            "",
            r"test_get_base_model_state_dict\[MLP .*using nn\.Parameter ",
            "takes `base_layer` for a part of a name where what holds a parameter is no layer of its own",
        ),
        (
            "",
            r"test_only_params_are_updated\[Embedding \+ transformers Conv1D [23] LoRA-",
            "three steps move few components by less than the test asks for",
        ),
    ),
)
