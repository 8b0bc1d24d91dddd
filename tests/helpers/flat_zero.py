"""As much of DeepSpeed's ZeRO 1 as one process sees of it, under the names that it has there, for tests that
need no DeepSpeed."""

from types import SimpleNamespace

import torch


class DeepSpeedZeroOptimizer:
    """Has a torch optimizer train a flat copy of each group's parameters, one after the other."""

    dtype = torch.float32
    dp_process_group = torch_autocast_gradscaler = None
    elastic_checkpoint = False

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.bit16_groups = [list(group["params"]) for group in optimizer.param_groups]
        self.single_partition_of_fp32_groups = []
        for group, parameters in zip(optimizer.param_groups, self.bit16_groups, strict=True):
            start = 0
            for parameter in parameters:
                in_flat = SimpleNamespace(start=start, numel=parameter.numel())
                parameter._hp_mapping = SimpleNamespace(
                    hp_fragment_address=in_flat, lp_fragment_address=SimpleNamespace(start=0)
                )
                start += parameter.numel()
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            group["params"] = [flat.requires_grad_()]
            self.single_partition_of_fp32_groups.append(flat)

    def step(self):
        groups = self.optimizer.param_groups
        for flat, parameters, group in zip(
            self.single_partition_of_fp32_groups, self.bit16_groups, groups, strict=True
        ):
            flat.grad = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups, flat.grad = groups, None
        self.update_lp_params()

    @torch.no_grad()
    def update_lp_params(self):
        for flat, parameters in zip(self.single_partition_of_fp32_groups, self.bit16_groups, strict=True):
            pieces = flat.split([parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = None
                parameter.copy_(piece.view_as(parameter))

    def state_dict(self):
        return {
            "base_optimizer_state": self.optimizer.state_dict(),
            "flats": [flat.detach().clone() for flat in self.single_partition_of_fp32_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["base_optimizer_state"])
        for flat, saved in zip(self.single_partition_of_fp32_groups, state["flats"], strict=True):
            flat.copy_(saved)


DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
