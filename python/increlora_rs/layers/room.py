"""An adapter in the capacity form: its parameters get the largest size that they may come to."""

from __future__ import annotations

from torch import nn

from ..support.warning import warn
from .found import adapted_layers

# Room for more than this many times what the budget trains is told.
_AMPLE = 4


def make_room(model: nn.Module, adapter_name: str) -> None:
    """Puts adapter ``adapter_name`` of ``model`` into the capacity form, if its ranks can change; before its
    parameters are given to an optimizer, or to what shards them. Where it is in it already, nothing is done.

    Raises:
        ValueError: its configuration has what cannot take that form.
    """
    layers = [one for one in adapted_layers(model, adapter_name).values() if not one.has_room(adapter_name)]
    if not layers:
        return
    config = layers[0].configs[adapter_name]
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    rooms = config.room(sizes, [layer.rank(adapter_name) for layer in layers])
    if rooms is None:
        return
    for layer, rows in zip(layers, rooms, strict=True):
        layer.make_room(adapter_name, rows, whole_in_graphs=not config.uses_reserve)
    room = sum(rows * (sum(size) + 1) for rows, size in zip(rooms, sizes, strict=True))
    trained = sum(config.r * (sum(size) + 1) for size in sizes)
    if room > _AMPLE * trained:
        warn(
            f"growth='capacity': the adapter has room for {room:,} numbers, {room / trained:.0f} times what "
            f"r={config.r} trains, and the optimizer's state as much; max_r={config.max_r} lets each module "
            f"take {max(rooms)} components. Set max_r, such as {max(1, round(4 * config.r))}"
        )
