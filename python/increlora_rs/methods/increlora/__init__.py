"""IncreLoRA (arXiv 2308.12043): ranks that grow where an importance says it pays."""

from ...contract.method import Method
from ..components import Components
from .config import IncreLoraConfig
from .growth import Growth

METHOD = Method(
    name="increlora",
    title="IncreLoRA",
    config=IncreLoraConfig,
    structure=Components(),
    policy=Growth,
    summary="A LoRA whose ranks grew during training, by the importance of each module",
    paper="https://arxiv.org/abs/2308.12043",
)
