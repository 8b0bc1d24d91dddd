"""Moves are held against what came of them."""

import numpy as np
import pytest
import torch
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.methods.increlora.moves import Moves
from increlora_rs.methods.increlora.verdict import Verdict
from peft import get_peft_model
from torch import nn

STEPS, WIDTH = 200, 12


def births(*steps):
    return np.array(steps, dtype=np.int64)


def test_nothing_is_known_before_what_came_is_judged():
    verdict = Verdict()
    verdict.moved(10, np.array([0.1, 0.3, 0.2]))
    assert (verdict.ratio, verdict.pays, list(verdict.waiting)) == (None, None, [10])


def test_the_ratio_is_the_geometric_mean_over_all_that_came():
    verdict = Verdict()
    verdict.moved(10, np.array([0.1, 0.3, 0.2]))
    verdict.judge(10, np.array([5.0, 0.8, 0.2]), births(0, 10, 10))
    # 4 times and once as much as the median of what left.
    assert verdict.ratio == pytest.approx(2.0) and verdict.pays
    verdict.moved(20, np.array([1.0]))
    verdict.judge(20, np.array([0.5, 9.0]), births(20, 10))
    assert verdict.ratio == pytest.approx(2.0 ** (1 / 3)) and verdict.pays is False
    assert not verdict.waiting


def test_what_is_worth_nothing_counts_a_thousandth():
    verdict = Verdict()
    verdict.moved(1, np.array([0.0]))
    verdict.judge(1, np.array([0.0, 1.0]), births(1, 1))
    assert verdict.ratio == pytest.approx(1.0)


def test_what_came_and_is_gone_tells_nothing():
    verdict = Verdict()
    verdict.moved(5, np.array([1.0]))
    verdict.judge(5, np.array([1.0]), births(0))
    assert verdict.ratio is None and not verdict.waiting


def test_its_state_comes_back():
    verdict, again = Verdict(), Verdict()
    verdict.moved(5, np.array([1.0]))
    verdict.judge(5, np.array([3.0]), births(5))
    verdict.moved(9, np.array([0.5]))
    again.restore(verdict.state())
    assert (again.ratio, again.waiting) == (verdict.ratio, {9: 0.5})


class Blocks(nn.Module):
    """Layers side by side, each of its own input."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(10))
        for part in self.parts:
            part.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def forward(self, x):
        return torch.stack([part(piece) for part, piece in zip(self.parts, x.unbind(1), strict=True)], 1)


def trained(scales, policy=Moves):
    """A training where layer k is to gain an update of full rank and of size ``scales[k]``."""
    torch.manual_seed(1)
    model = get_peft_model(
        Blocks(), IncreLoraConfig(r=1, importance="fluctuation", lora_alpha=1, target_modules=r"parts\.\d+")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS, policy=policy)
    updates = [scale * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for scale in scales]
    for _ in range(STEPS):
        x = torch.randn(16, len(scales), WIDTH)
        with torch.no_grad(), model.disable_adapter():
            goal = model(x) + torch.einsum("bki,koi->bko", x, torch.stack(updates))
        (model(x) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return scheduler


class Vain(Moves):
    """What came turns out to be worth next to nothing."""

    def _judge(self, number, worth, births, seen):
        super()._judge(number, np.where(births > 0, 1e-9, worth), births, seen)


def test_ranks_move_as_long_as_it_pays():
    scheduler = trained([0.0] * 8 + [1.0] * 2)
    ranks = list(scheduler.ranks.values())
    assert scheduler.logs()["moved_worth"] > 2.0
    assert sum(ranks[8:]) >= 8


def test_ranks_stay_where_what_came_is_not_worth_more(caplog):
    with caplog.at_level("INFO", logger="increlora_rs"):
        scheduler = trained([0.0] * 8 + [1.0] * 2, policy=Vain)
    assert scheduler.logs()["moved_worth"] < 2.0
    # The trial alone moved: a tenth of the budget.
    assert sorted(scheduler.ranks.values()) == [0] + [1] * 8 + [2]
    assert len({row["step"] for row in scheduler.history}) == 1
    assert sum("ranks stay where they are" in record.getMessage() for record in caplog.records) == 1


def test_where_nothing_does_anything_yet_nothing_is_worth_more():
    model = get_peft_model(
        Blocks(), IncreLoraConfig(r=1, importance="fluctuation", target_modules=r"parts\.\d+")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scheduler = attach(model, optimizer, total_steps=20)
    for _ in range(20):
        model(torch.randn(4, 10, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(scheduler.ranks.values()) == {1}
