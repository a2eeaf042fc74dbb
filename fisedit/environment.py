"""Where figures were measured: the device, the versions, the date."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """The device's name, threads, versions and today's date; goes with every figure that is printed or saved."""
    device = torch.device(device)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, else Python's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment_line(environment: dict[str, Any]) -> str:
    """One line for under a table."""
    where = environment["device"]
    if environment["device type"] == "cpu":
        where += f", {environment['threads']} threads"
    return f"{where}; torch {environment['torch']}, diffusers {environment['diffusers']}; {environment['date']}"
