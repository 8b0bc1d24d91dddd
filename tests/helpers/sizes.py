"""Another rank for a layer's adapter, values undefined, as loading gives it one."""


def resize(layer, rank, rows=None):
    rows = rank if rows is None else rows
    shapes = {"lora_A": (rows, layer.in_features), "lora_B": (layer.out_features, rows), "lora_E": (rank, 1)}
    layer.take_sizes("default", shapes)
