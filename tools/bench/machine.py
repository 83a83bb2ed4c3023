"""The machine that a benchmark ran on, in words."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from tools.deployment.processes import available_cpus

CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Return what ratios depend on: processor, usable cores, memory, GPU, versions; and the date, in UTC."""
    return {
        "processor": processor(),
        "cores usable": str(available_cpus()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": gpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "flwr")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """Return the model's name, as the kernel gives it where it does."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
