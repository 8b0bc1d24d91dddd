"""What is expected of LoRTA: one set of parameters for all modules, which have to be of one size."""

from __future__ import annotations

from .shared import CLASS_NAMES, NO_SUM, NOT_GATHERED, ONE_KIND, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        ONE_KIND,
        NO_SUM,
        (
            r"^(heads)=None: the base model's configuration",
            "a model that does not tell its `{}` raises by name",
        ),
        (r"(orientation)='natural': ", "modules of different sizes raise by name, with the `{}`"),
        (r"^(rank_pattern)=", "`{}` raises by name"),
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_(linear|conv1d)$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        ("", r"test_training(_\w+)?_layer_indexing", "asks for fewer parameters; all layers share one set"),
        (
            "",
            r"test_inject_from_state_dict_(missing|extra)_keys_warning",
            "takes a module's A out of what is saved, or puts one in; all modules share it",
        ),
    ),
)
