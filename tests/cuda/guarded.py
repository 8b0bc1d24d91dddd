"""Tensors with walls around them. On the CPU no memory lies behind them, so that an access past the end
fails the launch; before them, and on a device on both sides, lie NaN or 0xEE, so that a read spoils the
result and a write is seen."""

import ctypes
import mmap

import torch

WALL = 64
NO_ACCESS = 0


class Guarded:
    """Tensors on ``device`` that :meth:`check` finds unharmed around."""

    def __init__(self, device):
        self.device = device
        self.walled = []

    def put(self, values):
        """A contiguous copy of ``values`` at a multiple of 16 bytes."""
        count = values.numel()
        buffer, first = self._on_cpu(values) if self.device == "cpu" else self._on_device(values)
        buffer.fill_(0xEE if values.dtype == torch.uint8 else float("nan"))
        inside = buffer[first : first + count]
        inside.copy_(values.reshape(-1))
        self.walled.append((buffer, first, count))
        return inside.view(values.shape)

    def _on_device(self, values):
        count = 2 * WALL + values.numel()
        return torch.empty(count, dtype=values.dtype, device=self.device), WALL

    def _on_cpu(self, values):
        page, size = mmap.PAGESIZE, values.element_size()
        length = (values.numel() * size // page + 2) * page
        memory = mmap.mmap(-1, length + page)
        behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + length
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(page), NO_ACCESS) == 0
        buffer = torch.frombuffer(memory, dtype=values.dtype, count=length // size)
        # The last multiple of 16 bytes: less than 16 of them lie between the end and the wall.
        first = (length - values.numel() * size) // 16 * 16 // size
        return buffer, first

    def check(self):
        """Fails if a wall was written to."""
        for buffer, first, count in self.walled:
            walls = torch.cat([buffer[:first], buffer[first + count :]]).cpu()
            whole = walls == 0xEE if walls.dtype == torch.uint8 else walls.isnan()
            assert whole.all(), f"memory around a tensor of {count} elements was written"
