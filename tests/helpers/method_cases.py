"""What the tests of every method know of each: a small configuration, its dense update, what it trains.

The formulas are the papers', with dW built, and never call the code under test.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import peft
import pytest
import torch
from increlora_rs.methods import METHODS
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

TARGETS = ["query", "value", "intermediate.dense"]
ALPHA = 6
ALL = frozenset({"linear", "embedding", "convolution"})


def _components(p: Mapping[str, Tensor]) -> Tensor:
    """B diag(E) A."""
    return p["lora_B"] @ torch.diag(p["lora_E"].view(-1)) @ p["lora_A"]


def _split(p: Mapping[str, Tensor]) -> Tensor:
    """B_aux B A A_aux."""
    return p["lora_B_aux"] @ p["lora_B"] @ p["lora_A"] @ p["lora_A_aux"]


def _heads(p: Mapping[str, Tensor]) -> Tensor:
    """The blocks A diag(C_h[h] C_m C_l) B of the heads side by side, (d, d), as dW or its transpose."""
    of_module = p["lora_C_l"] * p["lora_C_m"]
    blocks = [p["lora_A"].t() @ torch.diag(c * of_module) @ p["lora_B"] for c in p["lora_C_h"].t()]
    return torch.cat(blocks, 1) if p["after heads"] else torch.cat(blocks, 1).t()


def _of_module(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    """LoRTA's tensors, of those of layers and kinds the module's columns."""
    kinds, layer = ("query", "value", "attention.output.dense"), re.search(r"layer\.(\d)", name)
    kind = next((k for k, kind in enumerate(kinds) if name.endswith(kind)), 0)
    return tensors | {
        "lora_C_l": tensors["lora_C_l"][:, int(layer.group(1)) if layer else 0],
        "lora_C_m": tensors["lora_C_m"][:, kind],
        "after heads": kind == 2,
    }


def _blocks(p: Mapping[str, Tensor]) -> Tensor:
    """blockdiag(B_i A_i)."""
    return torch.block_diag(*(b @ a for a, b in zip(p["lora_A"], p["lora_B"], strict=True)))


def _side(rank: int, out: int, features: int) -> int:
    """The nearest square to the numbers of a LoRA."""
    return math.floor(math.sqrt((out + features) * rank) + 0.5)


def _square(p: Mapping[str, Tensor], out: int, features: int) -> Tensor:
    """D M C: sums of the inputs i mod q, the first ones once more until a round is full; outputs o mod q."""
    m = p["lora_A"]
    side, c = len(m), m.new_zeros(len(m), features)
    for i in range(-(-features // side) * side):
        c[i % side, i % features] += 1
    return torch.stack([(m @ c)[o % side] for o in range(out)])


@dataclass(frozen=True)
class Case:
    """One method.

    Args:
        settings: Of its configuration. Every module starts at rank 2, modules called "value" at 3.
        tensors: What the update is made of, as the layers have them.
        dense: Of those tensors, the update (out, in) without its scale; where ``sized``, of out and in, too.
        scale: Of lora_alpha and the module's rank at the start, what it is multiplied by.
        count: Of rank, out and in of a linear layer, the numbers that it trains.
        kinds: What it adapts.
        asked: Of a module's name, the rank that is asked for.
        targets: What is adapted of the tiny BERT.
        of_all: The numbers that are trained of it, where modules have no share of their own.
        part: Of the tensors and a module's name, what ``dense`` takes of them.
        size: Of a number, one that is as large or larger and that it takes for in and for out of a module.
        start: Of the rank that is asked for, out and in, the rank that a module has at the start.
        training: Settings under which a training of 12 steps does all that the method does.
        acts: Does something besides the optimizer change what is trained?
        ranks: What the ranks do in it: "stay", "grow" to 3 a module on the average, or "fall".
        told: Are their changes in the history?
        early: What is said of a training that ends before its last step, if anything.
        graphs: How many torch.compile makes of that training.
        rank: Of those tensors, the number of components that act.
        other_modules: What is said of an adapter of a base of more layers.
        bad: Arguments of its own that are wrong, each with what the message says of it.
    """

    settings: Mapping[str, Any]
    tensors: tuple[str, ...]
    dense: Callable[..., Tensor]
    scale: Callable[[float, int], float]
    count: Callable[[int, int, int], int]
    kinds: frozenset[str]
    asked: Callable[[str], int] = lambda name: 3 if name.endswith("value") else 2
    targets: Sequence[str] = tuple(TARGETS)
    of_all: int | None = None
    part: Callable[[dict[str, Any], str], dict[str, Any]] = lambda tensors, name: tensors
    sized: bool = False
    size: Callable[[int], int] = lambda number: number
    start: Callable[[int, int, int], int] = lambda asked, out, features: asked
    training: Mapping[str, Any] = field(default_factory=dict)
    acts: bool = True
    ranks: Literal["stay", "grow", "fall"] = "stay"
    told: bool = False
    early: str = ""
    graphs: int = 1
    rank: Callable[[Mapping[str, Tensor]], int] = lambda tensors: tensors["lora_A"].shape[0]
    other_modules: str = r"tensors, '.*layer\.1.*' the first, that belong to no adapted module"
    bad: tuple[tuple[dict[str, Any], str], ...] = ()


_RANKS = {"rank_pattern": {"value": 3}, "lora_alpha": ALPHA}

CASES = {
    "increlora": Case(
        # Of the scale, r is the budget's, whatever a module's rank.
        settings={"r": 3, "init_r": 2, **_RANKS},
        tensors=("lora_A", "lora_B", "lora_E"),
        dense=_components,
        scale=lambda alpha, rank: alpha / 3,
        count=lambda rank, out, features: rank * (out + features + 1),
        kinds=ALL,
        training={
            "importance": "gradient",
            "budget_unit": "rank",
            "init_r": 1,
            "rank_pattern": {},
            "tinit": 2,
            "deltaT": 2,
            "top_h": 4,
        },
        ranks="grow",
        told=True,
        # Rows of A and B beyond those of E are in reserve.
        rank=lambda tensors: tensors["lora_E"].shape[0],
        bad=(
            ({"init_r": -1}, "init_r=-1"),
            ({"init_r": 4, "importance": "gradient"}, "init_r=4"),
            ({"top_h": -1}, "top_h=-1"),
            ({"beta1": 1.5}, "beta1=1.5"),
            ({"growth_end": 0.0}, "growth_end=0.0"),
            ({"importance": "size"}, "importance='size'"),
            ({"budget_unit": "bytes"}, "budget_unit='bytes'"),
        ),
    ),
    "lora_mini": Case(
        settings={"r": 2, "lora_a": 5, "lora_b": 4, **_RANKS},
        tensors=("lora_A", "lora_B", "lora_A_aux", "lora_B_aux"),
        dense=_split,
        scale=lambda alpha, rank: alpha / rank,
        count=lambda rank, out, features: rank * (5 + 4),
        kinds=frozenset({"linear", "convolution"}),
        acts=False,
        bad=(
            ({"lora_a": 0}, "lora_a=0"),
            ({"lora_b": 2.5}, "lora_b=2.5"),
            ({"r": 6, "rank_pattern": {}}, "r=6"),
            ({"rank_pattern": {"value": 5}}, r"rank_pattern['value']=5"),
            ({"aux_seed": -1}, "aux_seed=-1"),
            ({"aux_seed": "lucky"}, "aux_seed='lucky'"),
            ({"aux_init": "zeros"}, "aux_init='zeros'"),
            ({"init_lora_weights": "svd"}, "init_lora_weights='svd'"),
            ({"module_sizes": 3}, "module_sizes=3"),
            ({"module_sizes": {"query": [4]}}, "module_sizes['query']=[4]"),
        ),
    ),
    "lorta": Case(
        settings={"r": 2, "lora_alpha": ALPHA, "heads": 4},
        tensors=("lora_A", "lora_B", "lora_C_h", "lora_C_l", "lora_C_m"),
        dense=_heads,
        scale=lambda alpha, rank: alpha / rank,
        count=lambda rank, out, features: 0,
        kinds=frozenset({"linear"}),
        asked=lambda name: 2,
        targets=("query", "value", "attention.output.dense"),
        # r (d + d / H + H + L + M)
        of_all=2 * (32 + 8 + 4 + 2 + 3),
        part=_of_module,
        # All sides alike, and in 4 heads.
        size=lambda number: 16,
        acts=False,
        other_modules=r"module_names: .* over 6 modules, .* 3 are adapted, and '.*layer\.1.*'",
        bad=(
            ({"rank_pattern": {"value": 3}}, "rank_pattern={'value': 3}"),
            ({"orientation": "upright"}, "orientation='upright'"),
            ({"heads": 0}, "heads=0"),
            ({"heads": 2.0}, "heads=2.0"),
            ({"after_heads": "out"}, "after_heads='out'"),
            ({"after_heads": ["out"], "orientation": "peft"}, "after_heads=['out']"),
            ({"init_scale": -1.0}, "init_scale=-1.0"),
            ({"init_lora_weights": "svd"}, "init_lora_weights='svd'"),
            ({"module_names": [3]}, "module_names=[3]"),
        ),
    ),
    "prilora": Case(
        settings={"r": 2, **_RANKS},
        tensors=("lora_A", "lora_B"),
        dense=lambda p: p["lora_B"] @ p["lora_A"],
        scale=lambda alpha, rank: alpha / rank,
        count=lambda rank, out, features: rank * (out + features),
        kinds=frozenset({"linear"}),
        # From 1 in the first of two layers to 3 in the second.
        asked=lambda name: 3 if name.endswith("value") or "layer.1." in name else 2 - ("layer.0." in name),
        training={"prune_every": 3},
        bad=(
            ({"r_s": 0}, "r_s=0"),
            ({"r_s": 3}, "r_s=3"),
            ({"r_s": 1, "r_f": 4}, "r_s=1 and r_f=4"),
            ({"r_f": 2.5}, "r_f=2.5"),
            ({"r_f": 4}, "r_f=4"),
            ({"beta": 1.0}, "beta=1.0"),
            ({"prune_every": 0}, "prune_every=0"),
            ({"prune_share": 1.0}, "prune_share=1.0"),
            ({"prune_group": "column"}, "prune_group='column'"),
            ({"prune_last": 1}, "prune_last=1"),
            ({"prune_moments": "drop"}, "prune_moments='drop'"),
            ({"scaling": "budget"}, "scaling='budget'"),
            ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ),
    ),
    "sora": Case(
        settings={"r": 2, **_RANKS},
        tensors=("lora_A", "lora_B", "lora_E"),
        dense=_components,
        scale=lambda alpha, rank: alpha / rank,
        count=lambda rank, out, features: rank * (out + features + 1),
        kinds=ALL,
        # N(0, 1) gates lose 0.6 in 12 steps, which closes some of them.
        training={"sparse_lambda_2": 0.05},
        ranks="fall",
        rank=lambda tensors: int(tensors["lora_E"].count_nonzero()),
        bad=(
            ({"sparse_lambda": -1.0}, "sparse_lambda=-1.0"),
            ({"sparse_lambda_2": -0.1}, "sparse_lambda_2=-0.1"),
            ({"sparse_lr": "high"}, "sparse_lr='high'"),
            ({"prox": "hard"}, "prox='hard'"),
            ({"threshold_times_lr": 1}, "threshold_times_lr=1"),
            ({"lambda_schedule": "cubic"}, "lambda_schedule='cubic'"),
            ({"lambda_schedule": "linear", "lambda_num": 1}, "lambda_num=1"),
            ({"lambda_schedule": "linear", "max_lambda": 0.0}, "max_lambda=0.0"),
            ({"lambda_schedule": "exp_linear", "sparse_lambda_2": 0.0}, "sparse_lambda_2=0.0"),
            ({"init_lora_weights": "svd"}, "init_lora_weights='svd'"),
        ),
    ),
    "adalora_rs": Case(
        settings={"r": 1, "init_r": 2, **_RANKS},
        tensors=("lora_A", "lora_B", "lora_E"),
        dense=_components,
        scale=lambda alpha, rank: alpha / (rank + 1e-5),
        count=lambda rank, out, features: rank * (out + features + 1),
        kinds=ALL,
        training={"tinit": 2, "tfinal": 3, "deltaT": 1},
        ranks="fall",
        told=True,
        early="above the budget of 6, .* the training ended with step 3 of 12",
        rank=lambda tensors: int(tensors["lora_E"].count_nonzero()),
        bad=(
            ({"r": 3}, "r=3"),
            ({"init_r": 0}, "init_r=0"),
            ({"tinit": -1}, "tinit=-1"),
            ({"tfinal": 1.5}, "tfinal=1.5"),
            ({"deltaT": 0}, "deltaT=0"),
            ({"beta1": 1.0}, "beta1=1.0"),
            ({"beta2": -0.1}, "beta2=-0.1"),
            ({"orth_reg_weight": -1.0}, "orth_reg_weight=-1.0"),
            ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
            ({"rank_pattern": {"value": 0}}, "rank_pattern['value']=0"),
        ),
    ),
    "melora": Case(
        settings={"r": 2, "n_slices": 2, **_RANKS},
        tensors=("lora_A", "lora_B"),
        dense=_blocks,
        scale=lambda alpha, rank: alpha / rank,
        count=lambda rank, out, features: rank * (out + features),
        kinds=frozenset({"linear"}),
        size=lambda number: number + number % 2,
        start=lambda asked, out, features: 2 * asked,
        acts=False,
        rank=lambda tensors: tensors["lora_A"].shape[0] * tensors["lora_A"].shape[1],
        bad=(
            ({"n_slices": 0}, "n_slices=0"),
            ({"n_slices": 2.0}, "n_slices=2.0"),
            ({"r": [2, 4]}, "r=[2, 4]"),
            ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ),
    ),
    "mora": Case(
        # Of the scale, r is the configuration's, whatever a module's.
        settings={"r": 2, "mora_type": 1, **_RANKS},
        tensors=("lora_A",),
        dense=_square,
        scale=lambda alpha, rank: alpha / 2,
        count=lambda rank, out, features: _side(rank, out, features) ** 2,
        kinds=frozenset({"linear"}),
        sized=True,
        start=_side,
        # ReMoRA: merged at steps 4 and 8.
        training={"remora_interval": 4, "remora_warmup": 2},
        told=True,
        graphs=3,
        bad=(
            ({"mora_type": 5}, "mora_type=5"),
            ({"mora_type": "1"}, "mora_type='1'"),
            ({"mora_type": True}, "mora_type=True"),
            ({"fold_inputs": 1}, "fold_inputs=1"),
            ({"remora_interval": 0}, "remora_interval=0"),
            ({"remora_types": 3}, "remora_types=3"),
            ({"remora_warmup": -1}, "remora_warmup=-1"),
            ({"remora_interval": 5}, "remora_warmup=50"),
            ({"remora_interval": 5, "mora_type": 6}, "mora_type=6"),
            ({"remora_interval": 5, "mora_type": 4}, "mora_type=4"),
            ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
            ({"module_sizes": 3}, "module_sizes=3"),
            ({"module_sizes": {"query": [4]}}, "module_sizes['query']=[4]"),
        ),
    ),
}

EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def config_of(method, **settings):
    """A configuration of the case, but for ``settings``."""
    case = CASES[method.name]
    return method.config(**{"target_modules": list(case.targets), **case.settings, **settings})


def adapted(method, base, **settings):
    """``base`` with a fresh adapter, drawn alike at every call."""
    torch.manual_seed(11)
    return peft.get_peft_model(base, config_of(method, **settings))


def optimizer_of(model, lr=2e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def batch(step, rows=4):
    """Tokens and labels of a classification for the tiny BERT."""
    ids = torch.randint(5, 99, (rows, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def run(model, optimizer, steps):
    """A plain loop over the steps of these numbers."""
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ready(method, base, **settings):
    """A model in training whose method does, in 12 steps of ``attach``, all that it does."""
    return adapted(method, base, **{**CASES[method.name].training, **settings}).train()


def trained(method, base, steps=4, **settings):
    """``base`` with an adapter that a few steps have moved off its start, by a plain optimizer."""
    model = adapted(method, base, **settings).train()
    run(model, optimizer_of(model), range(steps))
    return model.eval()


def adapted_modules(model):
    """The adapted modules by their names in the base model."""
    inside = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {name: module for name, module in inside.named_modules() if isinstance(module, BaseTunerLayer)}


def tensors_of(method, layer, adapter="default"):
    """What the update of a module is made of, by name."""
    return {name: getattr(layer, name)[adapter].weight for name in CASES[method.name].tensors}


def ranks_of(method, model, adapter="default"):
    """The components of every module that act now, by its name."""
    rank = CASES[method.name].rank
    return {name: rank(tensors_of(method, layer, adapter)) for name, layer in adapted_modules(model).items()}


def asked_of(method, name):
    """The rank that is asked for of the module of this name."""
    return CASES[method.name].asked(name)


def start_of(method, layer, name):
    """The rank at the start of the module of this name."""
    return CASES[method.name].start(asked_of(method, name), layer.site.out, layer.site.features)


def dense(method, layer, name, adapter="default", alpha=ALPHA):
    """The update (out, in) of a module, float64, of the tensors it has now; gradients pass."""
    case = CASES[method.name]
    tensors = {key: tensor.double() for key, tensor in tensors_of(method, layer, adapter).items()}
    size = (layer.site.out, layer.site.features) if case.sized else ()
    return case.scale(alpha, asked_of(method, name)) * case.dense(case.part(tensors, name), *size)


def as_weight(delta, module):
    """An update (out, in) in the shape of the base layer's weight."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return (delta.t() if isinstance(base, (nn.Embedding, Conv1D)) else delta).reshape(base.weight.shape)


def reference(method, model, base, inputs, adapters=("default",)):
    """What ``base``, in float64, gives with the adapters' dense updates added to its weights."""
    base = base.double()
    weights = {}
    for name, layer in adapted_modules(model).items():
        deltas = [as_weight(dense(method, layer, name, adapter), layer) for adapter in adapters]
        weights[f"{name}.weight"] = base.get_submodule(name).weight + sum(deltas)
    return functional_call(base, weights, args=(), kwargs=inputs)


def trainable(model):
    """Copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_bits(found, wanted):
    """The same tensors under the same names, bit for bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
