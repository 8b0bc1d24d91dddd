"""IncreLoRA (arXiv 2308.12043): ranks that grow where an importance says it pays."""

from collections.abc import Sequence

from ...contract.method import Method
from ...contract.policy import AdaptedModule, Plan, Policy
from ..components import Components
from .config import IncreLoraConfig
from .growth import Growth
from .moves import Moves


def _policy(modules: Sequence[AdaptedModule], config: IncreLoraConfig, plan: Plan) -> Policy:
    """What decides, by ``importance``."""
    made = Moves if config.importance == "fluctuation" else Growth
    return made(modules, config, plan)


METHOD = Method(
    name="increlora",
    title="IncreLoRA",
    config=IncreLoraConfig,
    structure=Components(),
    policy=_policy,
    summary="A LoRA whose ranks changed during training, by what each module does for the loss",
    paper="https://arxiv.org/abs/2308.12043",
)
