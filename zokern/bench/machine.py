"""The machine that is measured: what a result must say of it, and what limits a run."""

import datetime
import os
import platform
import re
from typing import Any

import torch

import zokern
from zokern import backends
from zokern.commit import commit

# Where the processor does not say how large its last cache is.
CPU_CACHE = 1 << 25


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions of what decides on a time."""
    import cpuinfo
    import psutil

    cpu, clock = cpuinfo.get_cpu_info(), psutil.cpu_freq()
    machine: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu.get("brand_raw", platform.processor()),
        "cpu_family": cpu.get("family"),
        "cpu_model": cpu.get("model"),
        "cpu_capability": _cpu_capability(),
        "cpu_mhz": None if clock is None else round(clock.max or clock.current),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "zokern": zokern.__version__,
        "commit": commit(),
        "backend": backends.select(device).__name__.rpartition(".")[2],
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_mhz"] = getattr(properties, "clock_rate", 0) // 1000 or None
        machine["cuda"] = torch.version.cuda
    return machine


def file_name(machine: dict[str, Any]) -> str:
    """Of the results of this kind of machine, such as ``cpu-amd-epyc-25-17-avx512-2.json``."""
    if machine["device"] == "cpu":
        keys = ["device", "cpu", "cpu_family", "cpu_model", "cpu_capability", "threads"]
    else:
        keys = ["device", "gpu"]
    if machine["backend"] != backends.ORDER[0]:
        keys.append("backend")
    words = " ".join(str(machine[key]) for key in keys if machine[key] is not None)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json"


def title(machine: dict[str, Any]) -> str:
    """In words."""
    if machine["device"] == "cpu":
        threads, family = machine["threads"], ""
        if machine["cpu_family"] is not None:
            family = f" (family {machine['cpu_family']}, model {machine['cpu_model']})"
        plural = "s" * (threads != 1)
        what = f"{machine['cpu']}{family}, {threads} thread{plural}, {machine['cpu_capability']}"
    else:
        what = machine["gpu"]
    return f"{what}, {machine['backend']} backend"


def available_memory(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def cache_size(device: torch.device) -> int:
    """Bytes of the last cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or CPU_CACHE
    except (AttributeError, OSError, ValueError):
        return CPU_CACHE


def _cpu_capability() -> str:
    if backends.load("native").why_not(torch.device("cpu")) is not None:
        return torch.backends.cpu.get_cpu_capability().lower()
    from zokern.backends.native.capability import cpu_capability

    return cpu_capability()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
