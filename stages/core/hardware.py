"""What the machine is: processor, memory, GPUs, and the package versions that decide speed and results.

Everything here is the same on two calls on the same machine, so it can be an input of the stages that measure.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "scikit-learn",
)
"""Packages whose version can change a measured result."""

TrainingPrecision = Literal["fp32", "bf16", "fp16"]

_FEATURES = {
    # /proc/cpuinfo on x86 -> the name used here
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    # and on ARM
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
_ROOT = Path("/")
_RAPL = "sys/class/powercap/intel-rapl:0"
_NVIDIA_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")
_SECONDS_FOR_NVIDIA_SMI = 20
_FAST_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}
_BF16_CAPABILITY, _FP16_CAPABILITY = (8, 0), (7, 0)
"""First compute capabilities with tensor cores for the format: Ampere and Volta."""


def describe_hardware(root: Path = _ROOT) -> dict[str, Any]:
    """Describe the machine.

    Args:
        root: where /proc and /sys are found.

    Returns:
        `system`, `cpu`, `memory_gib`, `gpus` and `packages`; equal on two calls on the same machine.
    """
    return {
        "system": {
            "os": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "cpu": describe_cpu(root),
        "memory_gib": memory_gib(root),
        "gpus": list_gpus(),
        "packages": package_versions(),
    }


def describe_cpu(root: Path = _ROOT) -> dict[str, Any]:
    """Describe the processor: `model`, the cores this process may use, and `features` that make inference fast."""
    text = _read(root / "proc/cpuinfo")
    logical = usable_processors()
    return {
        "model": _cpu_model(text),
        "logical_cores": len(logical),
        "physical_cores": _physical_cores(logical, root),
        "quota_cores": quota_cores(root),
        "features": _cpu_features(text),
    }


def int8_saturates(machine: str, features: Sequence[str]) -> bool:
    """Tell whether products of int8 with uint8 can overflow 16 bits on the way.

    On x86 without VNNI (or AMX) the pair sums of `pmaddubsw` saturate, and results are silently wrong where weights
    use all 8 bits (onnxruntime#6004; oneDNN, "Nuances of int8 computations"). ARM accumulates in 32 bits.

    Args:
        machine: as `platform.machine` names it.
        features: of `describe_cpu`.
    """
    return machine in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(features)


def saturates_here() -> bool:
    """Tell whether products of int8 with uint8 saturate on the CPU at hand; see `int8_saturates`."""
    return int8_saturates(platform.machine(), describe_cpu()["features"])


def training_precision(features: Sequence[str], gpus: Sequence[Mapping[str, Any]]) -> TrainingPrecision:
    """Choose the number format in which a machine multiplies fastest at no risk to training.

    bf16 where it is multiplied natively, since it has the range of fp32; fp16 on GPUs that have tensor cores for it
    alone; fp32 elsewhere, where shorter formats are converted and win nothing.

    Args:
        features: of `describe_cpu`.
        gpus: of `training_gpus`; where there are any, the weakest decides.
    """
    if gpus:
        weakest = min(_capability(gpu["compute_capability"]) for gpu in gpus)
        return "bf16" if weakest >= _BF16_CAPABILITY else "fp16" if weakest >= _FP16_CAPABILITY else "fp32"
    return "bf16" if _FAST_BF16 & set(features) else "fp32"


def training_precision_here() -> TrainingPrecision:
    """Choose the number format of training on the machine at hand; see `training_precision`."""
    return training_precision(describe_cpu()["features"], training_gpus())


def training_gpus() -> list[dict[str, Any]]:
    """List the GPUs that PyTorch can train on: none without CUDA in its build, or where CUDA_VISIBLE_DEVICES hides all.

    Told without importing PyTorch, which the fingerprint has no time for.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return list_gpus() if torch_has_cuda() and not hidden else []


def torch_has_cuda() -> bool:
    """Tell whether the installed PyTorch was built with CUDA."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    version = _read(Path(package.origin).with_name("version.py"))  # has a line such as: cuda: Optional[str] = '13.0'
    return re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE) is not None


def usable_processors() -> list[int]:
    """Numbers of the logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota_cores(root: Path = _ROOT) -> float | None:
    """Cores that the control group grants, such as 1.5; None without a quota below the usable processors.

    Runtimes count processors and do not see the quota; a thread too many makes all of them wait.
    """
    quotas = [quota for folder in _control_groups(root, "cpu") if (quota := _quota(folder)) is not None]
    lowest = min(quotas, default=None)
    return lowest if lowest is not None and lowest < len(usable_processors()) else None


def thread_limit() -> int | None:
    """Threads that a runtime should start with where a quota is set; None leaves the choice to the runtime."""
    quota = quota_cores()
    return None if quota is None else max(1, round(quota))


def memory_gib(root: Path = _ROOT) -> float:
    """Memory this process may use: the machine's, or the control group's limit if lower; GiB, one decimal."""
    lines = [line for line in _read(root / "proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    total = int(lines[0].split()[1]) * 1024 if lines else _physical_memory()
    limits = [limit for folder in _control_groups(root, "memory") if (limit := _memory_limit(folder)) is not None]
    return round(min([total, *limits]) / 2**30, 1)


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MiB.

    Linux keeps `ru_maxrss` over `exec`, so a small process started by a big one would report the big one's peak;
    `VmHWM` starts anew.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def resident_memory_mb() -> float:
    """Resident memory of this process now, in MiB."""
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def energy_joules(root: Path = _ROOT) -> float | None:
    """Energy that the processor package has taken so far, from a counter that starts anywhere and starts over.

    Subtract two readings with `joules_between`. None where the machine does not tell, as most virtual ones do not, or
    tells only its administrator.
    """
    reading = _read(root / _RAPL / "energy_uj").strip()
    return int(reading) / 1e6 if reading.isdigit() else None


def joules_between(before: float | None, after: float | None, root: Path = _ROOT) -> float | None:
    """Energy taken between two readings of `energy_joules`, in joules; the counter may have started over once."""
    if before is None or after is None:
        return None
    largest = _read(root / _RAPL / "max_energy_range_uj").strip()
    over = int(largest) / 1e6 if after < before and largest.isdigit() else 0.0
    return after - before + over


def list_gpus() -> list[dict[str, Any]]:
    """List the NVIDIA GPUs with name, memory, driver and compute capability; empty without a driver."""
    query = f"--query-gpu={','.join(_NVIDIA_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_FOR_NVIDIA_SMI, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [_gpu(line) for line in done.stdout.splitlines() if line.count(",") == len(_NVIDIA_FIELDS) - 1]


def package_versions() -> dict[str, str]:
    """Versions of the installed packages among `PACKAGES`, without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpu(line: str) -> dict[str, Any]:
    name, memory, driver, capability = (part.strip() for part in line.split(","))
    # Machines with one memory for CPU and GPU report [N/A].
    return {
        "name": name,
        "memory_mb": int(float(memory)) if memory.replace(".", "").isdigit() else None,
        "driver": driver,
        "compute_capability": capability,
    }


def _capability(text: str) -> tuple[int, int]:
    """Read a compute capability such as 8.9; one that the driver does not tell is the lowest."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _cpu_model(text: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _cpu_features(text: str) -> list[str]:
    """Features that every processor has."""
    lists = [
        set(line.partition(":")[2].split())
        for line in text.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    common = set.intersection(*lists) if lists else set()
    return sorted(feature for flag, feature in _FEATURES.items() if flag in common)


def _physical_cores(processors: list[int], root: Path) -> int:
    """Count distinct cores; two hardware threads of one core share its arithmetic units."""
    cores = set()
    for number in processors:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        core = _read(topology / "core_id").strip()
        cores.add((_read(topology / "physical_package_id").strip(), core) if core else ("", f"processor {number}"))
    return len(cores)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups over this process, innermost first, in version 2 and version 1 layouts."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = Path(path.strip("/"))
        folders += [base / part for part in (folder, *folder.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()  # version 2: "150000 100000" or "max 100000"
    if not words:
        words = [*_read(folder / "cpu.cfs_quota_us").split(), *_read(folder / "cpu.cfs_period_us").split()]
    if len(words) != 2 or words[0] == "max" or int(words[0]) <= 0:
        return None
    return round(int(words[0]) / int(words[1]), 2)


def _memory_limit(folder: Path) -> int | None:
    text = (_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")).strip()
    return int(text) if text.isdigit() else None


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path) -> str:
    """Text of a file of the system, empty where the system has none such."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
