"""What a structure is promised by all that holds its parameters, shown with an update that no method has:
``s M`` of a square layer, M (n, n) as a whole, whose rank is said to be 1."""

from dataclasses import dataclass
from itertools import pairwise

import peft
import pytest
import torch
from increlora_rs import attach, export_lora, module_table
from increlora_rs.contract.config import MethodConfig
from increlora_rs.contract.method import Method
from increlora_rs.contract.policy import Policy
from increlora_rs.contract.structure import Structure
from increlora_rs.gauges import Sensitivity
from increlora_rs.ops.observed import observed
from increlora_rs.tuner.model import MethodModel
from method_cases import adapted_modules, optimizer_of
from paths import assert_near
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

SIZE = 6


@dataclass
class Whole:
    matrix: torch.Tensor
    scale: float
    is_lora: bool

    def add(self, y, x, call):
        return y + observed(x @ self.matrix.t() * self.scale, None, call.probe, call.slot)

    def with_base(self, x, weight, bias, call):
        return None

    def dense(self):
        return self.matrix * self.scale

    def lora(self, dtype=None):
        dense = self.dense().to(dtype or self.matrix.dtype)
        return (torch.eye(SIZE, dtype=dense.dtype), dense) if self.is_lora else None


class Square(Structure):
    names = ("lora_A",)
    is_lora = True

    def shapes(self, site, rank, config):
        return {"lora_A": (site.out, site.features)}

    def draw(self, site, rank, config, generator=None):
        return {"lora_A": torch.zeros(site.out, site.features)}

    def update(self, parameters, site, config, scale, *, training):
        return Whole(parameters["lora_A"], scale, self.is_lora)

    def rank_of(self, parameters):
        return 1

    def sizes(self, parameters, config, name):
        return tuple(parameters["lora_A"].shape)


@dataclass
class SquareConfig(MethodConfig):
    def check_rank(self, site, rank):
        if site.out != site.features:
            raise ValueError(f"it is {site.out} by {site.features}; leave it out of target_modules.")


METHOD = Method(
    "square_toy", "Square", SquareConfig, Square(), policy=Policy, paper="https://arxiv.org/abs/0"
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for mapping, value in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SquareConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MethodModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MethodModel.prefix),
    ):
        monkeypatch.setitem(mapping, METHOD.peft_type, value)


def base(sizes=(SIZE, SIZE, SIZE)):
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def adapted(layers=("0", "1"), moved=True):
    model = peft.get_peft_model(base(), SquareConfig(target_modules=list(layers), lora_alpha=8))
    if moved:
        generator = torch.Generator().manual_seed(4)
        for layer in adapted_modules(model).values():
            nn.init.normal_(layer.lora_A["default"].weight, generator=generator)
    return model


def inputs(number=0):
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("names", [("whole",), ("lora_M",), ("lora_A", "whole")])
def test_names_by_which_peft_would_find_no_adapter_are_refused(names):
    structure = Square()
    structure.names = names
    with pytest.raises(ValueError, match=r"square_toy: the parameters are named .*'lora_A' among them"):
        Method("square_toy", "Square", type("Other", (SquareConfig,), {}), structure)


def test_a_module_of_a_size_that_the_method_does_not_take_is_refused_by_name():
    with pytest.raises(ValueError, match="1: it is 4 by 6; leave it out"):
        peft.get_peft_model(base((SIZE, SIZE, 4)), SquareConfig(target_modules=["0", "1"]))


def test_a_refused_second_adapter_leaves_nothing_of_itself():
    model = peft.get_peft_model(base((SIZE, SIZE, 4)), SquareConfig(target_modules=["0"]))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="1: it is 4 by 6"):
        model.add_adapter("second", SquareConfig(target_modules=["1"]))
    assert list(model.peft_config) == ["default"]
    assert set(model.state_dict()) == before


def test_an_export_has_the_rank_of_the_lora_and_loses_nothing(tmp_path):
    model = adapted()
    assert export_lora(model, tmp_path).error == 0.0
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert_near(loaded(inputs()).detach(), model(inputs()).detach())


def test_an_export_of_an_update_that_is_no_lora_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Square, "is_lora", False)
    with pytest.raises(ValueError, match=r"module '0' is that of no LoRA; merge .*merge_and_unload\(\)"):
        export_lora(adapted(), tmp_path)


@pytest.mark.parametrize("is_lora", [True, False])
def test_the_table_of_modules_has_the_norm_and_the_singular_values_of_the_whole_update(is_lora, monkeypatch):
    monkeypatch.setattr(Square, "is_lora", is_lora)
    model = adapted()
    for row, layer in zip(module_table(model).rows, adapted_modules(model).values(), strict=True):
        dense = 8 * layer.lora_A["default"].weight.detach().double()
        assert row.norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert row.singular_values == pytest.approx(torch.linalg.svdvals(dense).tolist(), rel=1e-5)


def test_a_rank_that_is_not_the_configurations_changes_no_configuration(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.peft_config["default"].rank_pattern == {}
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_an_update_of_torchs_operations_tells_of_a_training_that_lacks_its_policy():
    model = adapted(moved=False).train()
    with pytest.warns(UserWarning, match="adapter of Square and no scheduler attached"):
        for number in range(50):
            model(inputs(number)).sum().backward()


def test_a_gauge_to_which_an_update_shows_nothing_is_refused():
    class Gauged(Policy):
        def __init__(self, modules, config, plan):
            super().__init__(modules, config, plan)
            self.gauge = Sensitivity.of(len(modules))

    model = adapted().train()
    attach(model, optimizer_of(model), policy=Gauged)
    with pytest.raises(NotImplementedError, match="policy of Square has a gauge, and its update shows no"):
        model(inputs())


def test_an_update_of_torchs_operations_is_compiled_whole_and_trains_as_in_eager_mode():
    ends = []
    for compiles in (False, True):
        model = adapted().train()
        optimizer = optimizer_of(model)
        attach(model, optimizer, total_steps=3)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        for number in range(3):
            net(inputs(number)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
