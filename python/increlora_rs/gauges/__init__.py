"""What the backward passes add up for each module."""

from .energy import Energy
from .gauge import Gauge
from .sensitivity import Sensitivity
from .sketch import Sketches

__all__ = ["GAUGES", "Energy", "Gauge", "Sensitivity", "Sketches"]

# A gauge is one class, named here; an operation in a graph, which holds no objects, finds it by its name.
GAUGES: dict[str, type[Gauge]] = {gauge.name: gauge for gauge in (Energy, Sensitivity, Sketches)}
