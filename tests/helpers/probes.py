"""What a test asks a model's backward passes for, by what its layers share."""

from increlora_rs.ops.probe import Probe
from increlora_rs.training.modules import adapted_modules


def armed_probe(model, adapter: str = "default") -> Probe:
    """The probe of an adapter to which a scheduler is attached, armed: backward passes add to its gauge."""
    probe = adapted_modules(model, adapter)[0].layer.probes[adapter]
    probe.arm(True)
    return probe
