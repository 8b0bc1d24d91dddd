"""What trains under DeepSpeed, by the settings of ZeRO, for the worker that does and the tests of it."""

ALL = ("growing", "moving", "paper", "from nothing", "sensitivity", "in parameters")
# At stage 3 every parameter is cut into pieces, small ones too, or those alone that are not small.
CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}
# The settings, and the scenarios of workers/capacity.py: stages differ in where the numbers are.
ENGINES = {
    "ZeRO 0": ({"stage": 0}, ("growing", "moving")),
    "ZeRO 1": ({"stage": 1}, ("growing", "moving")),
    "ZeRO 2": ({"stage": 2}, ALL),
    "ZeRO 3": (CUT, ALL),
    "ZeRO 3, small parameters whole": ({"stage": 3}, ("growing",)),
    "ZeRO 2, bfloat16": ({"stage": 2}, ("growing",)),
    "ZeRO 3, bfloat16": (CUT, ("growing",)),
}
# Buffers are made of this size, 2 GB by default.
SMALL = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
