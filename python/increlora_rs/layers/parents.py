"""Modules that read the weight of a module in them without calling it, and pass an update of it by."""

from __future__ import annotations

from torch import nn

from ..support.warning import warn

# What an encoder layer hands over to one operation in evaluation, and where the way to it is barred.
_HANDED_OVER = ("linear1", "linear2")
_FAST_PATH = "activation_relu_or_gelu"
_NESTED = "use_nested_tensor"
_KEPT = "_increlora_kept"

# By the name of the class, for an import of each would cost more than the look. In every forward pass:
_READ = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "TDNNLayer": ("kernel",),
    # In training, by the kernels that they are meant to run with; LoRA refuses these too.
    "MambaMixer": ("out_proj",),
    "Mamba2Mixer": ("out_proj",),
    "FalconMambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
}
# In training, where kernels of their own are installed.
_READ_BY_KERNELS = {
    "MambaMixer": ("x_proj", "dt_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj"),
    "BambaMixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}


def check_parent(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Warns where ``parent`` may read the weight of ``child``, its module ``name``, instead of calling it.

    Raises:
        ValueError: it always does.
    """
    if isinstance(parent, nn.MultiheadAttention):
        own = type(parent).forward is nn.MultiheadAttention.forward
        refused = own and name == "out_proj"
    else:
        refused = name in _of_transformers(parent, _READ)
    kind = type(parent).__name__
    if refused:
        raise ValueError(
            f"a {kind} reads the weight of its {name} ({type(child).__name__}) without calling it, and would "
            "pass an update by; leave it out of target_modules, by exclude_modules if need be."
        )
    if name in _of_transformers(parent, _READ_BY_KERNELS):
        warn(
            f"a {kind} with kernels of its own reads the weight of its {name} in training without calling "
            "it, and passes the update by; train without those kernels, or leave it out of target_modules"
        )


def _of_transformers(parent: nn.Module, table: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    for kind in type(parent).__mro__:
        if kind.__module__.startswith("transformers.models.") and kind.__name__ in table:
            return table[kind.__name__]
    return ()


def bar_fast_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Has ``nn.TransformerEncoderLayer`` call adapted layers in evaluation too; tells it by one warning."""
    barred = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _hands_over(module, adapted):
            # In any other layout torch goes the way of the calls by itself.
            barred += _set(module, _FAST_PATH, 0) and module.self_attn.batch_first
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, nn.TransformerEncoderLayer) and _hands_over(layer, adapted)
            for layer in module.layers
        ):
            # Its layers take nested tensors by that operation alone.
            _set(module, _NESTED, False)
    if barred:
        warn(
            f"{barred} torch.nn.TransformerEncoderLayer read the weights of adapted layers in evaluation "
            "without calling them; their fast path is off while they are adapted, and rows of padding are no "
            "longer set to 0"
        )


def open_fast_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Takes :func:`bar_fast_paths` back wherever nothing is adapted any more."""
    for module in model.modules():
        kept = module.__dict__.get(_KEPT)
        if kept is not None and not any(isinstance(inner, adapted) for inner in module.modules()):
            name, value = kept
            setattr(module, name, value)
            delattr(module, _KEPT)


def _hands_over(layer: nn.TransformerEncoderLayer, adapted: type[nn.Module]) -> bool:
    return any(isinstance(getattr(layer, name, None), adapted) for name in _HANDED_OVER)


def _set(module: nn.Module, name: str, value: int | bool) -> bool:
    """Sets an attribute, and keeps what it was; was there anything to do?"""
    old = getattr(module, name, value)
    if not old:
        return False
    setattr(module, _KEPT, (name, old))
    setattr(module, name, value)
    return True
