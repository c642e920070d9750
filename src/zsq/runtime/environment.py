# SPDX-License-Identifier: Apache-2.0
"""What a run ran on: versions, processor, devices; for ``zsq env`` and for the run folder."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from zsq.runtime.machine import usable_cores, usable_memory

NOT_INSTALLED = "not installed"

CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
)
"""Instructions that decide how fast float32, bfloat16 and 8-bit integer networks run."""


def environment() -> dict[str, object]:
    """Describe the software and the machine. Contains no name of a person, machine or folder.

    Returns:
        A dictionary that can be written as JSON: ``zsq``, ``python``, ``platform``, ``cpu``,
        ``memory_gib``, ``torch``, ``onnx``, ``onnxruntime`` and the optional packages.

    Example:
        >>> facts = environment()
        >>> sorted(facts["torch"])
        ['cuda', 'gpus', 'threads', 'version']
    """
    return {
        "zsq": version("zsq"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory_gib": round(usable_memory() / 2**30, 1),
        "torch": _torch(),
        "onnx": version("onnx"),
        "onnxscript": version("onnxscript"),
        "onnx_ir": version("onnx-ir"),
        "onnxruntime": _onnxruntime(),
        # Never imported here: a torchvision that does not fit the torch beside it cannot be.
        "timm": version("timm"),
        "torchvision": version("torchvision"),
        "pytorchcv": version("pytorchcv"),
    }


def version(package: str) -> str:
    """Return the installed version of ``package``, or ``"not installed"``, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, object]:
    """Name the processor, the instructions of interest and the cores."""
    fields = _first_processor(cpuinfo)
    present = set(fields.get("flags", "").split())
    return {
        # Only Linux has the file; elsewhere Python knows the name and nothing of the instructions.
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
    }


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    """Read the fields of the first processor; empty where there is no such file."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.strip().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _torch() -> dict[str, object]:
    """Describe PyTorch and the GPUs that it sees."""
    available = torch.cuda.is_available()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gpus": [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count() if available else 0)
        ],
        "threads": torch.get_num_threads(),
    }


def _onnxruntime() -> dict[str, object]:
    """Describe ONNX Runtime: its version and the providers (back ends) that it was built with."""
    # Imported here, because it takes a while and only this function needs it.
    import onnxruntime

    return {
        # Not from the metadata: the package may be called onnxruntime-gpu.
        "version": str(onnxruntime.__version__),
        "providers": list(onnxruntime.get_available_providers()),
    }
