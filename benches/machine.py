"""On what a run was made: the processor and the versions."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

_PACKAGES = ("torch", "peft", "transformers", "numpy", "increlora_rs")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, threads, versions, date."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": "amx_bf16" in _flags(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "date": date.today().isoformat(),
    }


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return ""


def _processor() -> str:
    name = _cpuinfo("model name") or platform.processor() or "unknown processor"
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family else name


def _flags() -> list[str]:
    return _cpuinfo("flags").split()
