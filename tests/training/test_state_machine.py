"""Random sequences of what a training script may do; what must hold after each holds."""

import copy

import peft
import pytest
import torch
from growing import growing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.training.modules import adapted_modules
from torch import nn

TOTAL = 60


class Training(RuleBasedStateMachine):
    @initialize(
        r=st.integers(1, 4),
        max_r=st.none() | st.integers(4, 6),
        paper=st.booleans(),
        interval=st.none() | st.integers(1, 9),
        top_h=st.none() | st.integers(1, 4),
        add_r=st.integers(1, 3),
        kind=st.sampled_from([torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop]),
        warmup=st.integers(0, 9),
    )
    def begin(self, r, max_r, paper, interval, top_h, add_r, kind, warmup):
        make = IncreLoraConfig.paper if paper else growing
        self.config = make(
            r=r,
            max_r=max_r,
            target_modules=["0", "2", "4"],
            deltaT=interval,
            top_h=top_h,
            add_r=add_r,
        )
        self.kind, self.warmup = kind, warmup
        self.model, self.optimizer = self.build()
        self.scheduler = self.attach()
        self.ranks = self.scheduler.ranks
        self.saved = None

    def build(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
        model = peft.get_peft_model(base, copy.deepcopy(self.config))
        return model, self.kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def attach(self):
        return attach(self.model, self.optimizer, total_steps=TOTAL, lr_warmup_steps=self.warmup)

    @rule(steps=st.integers(1, 12), micro=st.integers(1, 3))
    def train(self, steps, micro):
        self.model.train()
        for _ in range(steps):
            for _ in range(micro):
                x = torch.randn(4, 5)
                (nn.functional.mse_loss(self.model(x), x[:, :3]) / micro).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @rule()
    def step_without_gradients(self):
        self.optimizer.zero_grad()
        self.optimizer.step()

    @rule()
    def overflow(self):
        x = torch.randn(4, 5)
        (self.model(x).sum() * float("inf")).backward()
        self.optimizer.zero_grad()

    @rule()
    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            self.model(torch.randn(2, 5))
        with self.model.disable_adapter():
            self.model(torch.randn(2, 5))

    @rule()
    def merge_and_unmerge(self):
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    @rule()
    def save(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.saved = copy.deepcopy(state), self.scheduler.ranks, self.scheduler.step

    @precondition(lambda self: self.saved is not None)
    @rule(attach_first=st.booleans())
    def resume(self, attach_first):
        state, ranks, step = copy.deepcopy(self.saved)
        self.model, self.optimizer = self.build()
        if attach_first:
            self.scheduler = self.attach()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if not attach_first:
            self.scheduler = self.attach()
        assert (self.scheduler.ranks, self.scheduler.step) == (ranks, step)
        self.ranks = ranks

    @invariant()
    def ranks_never_fall_nor_pass_their_caps(self):
        most = self.config.max_r or 99
        for name, rank in self.scheduler.ranks.items():
            size = min(self.model.base_model.model.get_submodule(name).base_layer.weight.shape)
            assert self.ranks[name] <= rank <= min(most, size)
        self.ranks = self.scheduler.ranks

    @invariant()
    def total_never_passes_the_budget(self):
        assert self.scheduler.total_rank <= self.scheduler.budget

    @invariant()
    def shapes_births_and_optimizer_state_fit(self):
        for module in adapted_modules(self.model, "default"):
            assert (
                module.factors[0].shape[0]
                == module.factors[1].shape[1]
                >= module.factors[2].shape[0]
                == module.rank
            )
            for parameter, _, _ in module.parameters:
                for value in self.optimizer.state.get(parameter, {}).values():
                    assert (
                        not isinstance(value, torch.Tensor)
                        or value.dim() == 0
                        or value.shape == parameter.shape
                    )

    @invariant()
    def history_adds_up_to_the_ranks(self):
        assert sum(self.scheduler.ranks.values()) >= len(self.scheduler.ranks) + len(self.scheduler.history)

    @invariant()
    def parameters_stay_finite(self):
        assert all(torch.isfinite(p).all() for p in self.model.parameters())


Training.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestTraining = pytest.mark.filterwarnings("ignore::UserWarning")(Training.TestCase)
