"""Tensors with walls: NaN (or 0xEE) before and after, so that a read past an end spoils the result and a
write past it is seen."""

import torch

WALL = 64


class Guarded:
    """Tensors on ``device`` that :meth:`check` finds unharmed around."""

    def __init__(self, device):
        self.device = device
        self.walled = []

    def put(self, values):
        """A contiguous copy of ``values`` at a multiple of 16 bytes."""
        count = values.numel()
        # The second wall begins right behind the last element; the whole stays a multiple of 16 bytes.
        fill = 0xEE if values.dtype == torch.uint8 else float("nan")
        buffer = torch.full((2 * WALL + count,), fill, dtype=values.dtype, device=self.device)
        inside = buffer[WALL : WALL + count]
        inside.copy_(values.reshape(-1))
        assert inside.data_ptr() % 16 == 0
        self.walled.append(buffer)
        return inside.view(values.shape)

    def check(self):
        """Fails if a wall was written to."""
        for buffer in self.walled:
            walls = torch.cat([buffer[:WALL], buffer[-WALL:]]).cpu()
            whole = walls == 0xEE if walls.dtype == torch.uint8 else walls.isnan()
            assert whole.all(), f"memory around a tensor of {buffer.numel() - 2 * WALL} elements was written"
