"""LoRA adapters whose ranks grow during training, where an importance score says they pay.

IncreLoRA (arXiv 2308.12043) for PEFT and Transformers, with its arithmetic in Rust on torch tensors.
Importing the package registers the method with PEFT: ``IncreLoraConfig`` takes the place of
``LoraConfig``, ``IncreLoraCallback`` goes into ``Trainer``, ``attach`` serves every other loop.
"""

from importlib.metadata import version

from ._torch_check import require_matching_torch

require_matching_torch()

from ._core import RESERVE_E  # noqa: E402
from .methods.adalora import AdaLoraRsConfig  # noqa: E402
from .methods.increlora.config import IncreLoraConfig  # noqa: E402
from .methods.increlora.convert import convert_lora  # noqa: E402
from .methods.lora_mini import LoraMiniConfig  # noqa: E402
from .methods.lorta import LortaConfig  # noqa: E402
from .methods.melora import MeLoraConfig  # noqa: E402
from .methods.mora import MoraConfig  # noqa: E402
from .methods.prilora import PriLoraConfig  # noqa: E402
from .methods.sora import SoraConfig  # noqa: E402
from .reports.plots import plot_growth, plot_ranks, plot_scores  # noqa: E402
from .reports.tables import module_table, rank_table  # noqa: E402
from .saved.export import Export, export_lora  # noqa: E402
from .saved.gguf_export import GgufExport, export_gguf  # noqa: E402
from .saved.history_file import growth_history  # noqa: E402
from .support.history import GrowthHistory  # noqa: E402
from .training.averages import keep_average  # noqa: E402
from .training.callback import IncreLoraCallback  # noqa: E402
from .training.distributed_checkpoint import load_checkpoint  # noqa: E402
from .training.events import GrowthEvent, Resize  # noqa: E402
from .training.scheduler import RankScheduler, attach  # noqa: E402
from .training.sharding import adapter_parameters  # noqa: E402
from .tuner.registration import IncreLoraModel, register  # noqa: E402

register()

__version__ = version("increlora_rs")
__all__ = [
    "RESERVE_E",
    "AdaLoraRsConfig",
    "Export",
    "GgufExport",
    "GrowthEvent",
    "GrowthHistory",
    "IncreLoraCallback",
    "IncreLoraConfig",
    "IncreLoraModel",
    "LoraMiniConfig",
    "LortaConfig",
    "MeLoraConfig",
    "MoraConfig",
    "PriLoraConfig",
    "RankScheduler",
    "Resize",
    "SoraConfig",
    "adapter_parameters",
    "attach",
    "convert_lora",
    "export_gguf",
    "export_lora",
    "growth_history",
    "keep_average",
    "load_checkpoint",
    "module_table",
    "plot_growth",
    "plot_ranks",
    "plot_scores",
    "rank_table",
]
