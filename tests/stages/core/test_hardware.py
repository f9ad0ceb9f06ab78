from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core import hardware
from stages.core.hardware import (
    describe_cpu,
    describe_hardware,
    energy_joules,
    int8_saturates,
    joules_between,
    list_gpus,
    memory_gib,
    peak_memory_mb,
    quota_cores,
    torch_has_cuda,
    training_gpus,
    training_precision,
)

XEON = """processor\t: {number}
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
cpu MHz\t\t: {number}00.123
flags\t\t: fpu sse avx2 avx512f avx512_vnni amx_tile amx_int8 amx_bf16 {more}

"""
GRAVITON = """processor\t: 0
Features\t: fp asimd asimddp i8mm bf16 sve

Model\t\t: Neoverse-V1
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path, cpuinfo: str, processors: int, threads_per_core: int) -> Path:
    write(root / "proc/cpuinfo", cpuinfo)
    write(root / "proc/meminfo", "MemTotal:       16777216 kB\nMemFree:        123 kB\n")
    for number in range(processors):
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        write(topology / "core_id", f"{number // threads_per_core}\n")
        write(topology / "physical_package_id", "0\n")
    return root


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable_processors", lambda: [0, 1, 2, 3])


def test_two_calls_agree_and_are_json() -> None:
    first = describe_hardware()
    assert json.loads(json.dumps(first)) == describe_hardware()
    assert first["packages"]["onnxruntime"]
    assert first["cpu"]["logical_cores"] == len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("four_processors")
def test_hardware_threads_are_not_cores(tmp_path: Path) -> None:
    text = "".join(XEON.format(number=number, more="") for number in range(4))
    cpu = describe_cpu(machine(tmp_path, text, processors=4, threads_per_core=2))
    assert cpu["model"] == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert (cpu["logical_cores"], cpu["physical_cores"]) == (4, 2)
    assert cpu["features"] == ["amx_bf16", "amx_int8", "avx2", "avx512_vnni", "avx512f"]


@pytest.mark.usefixtures("four_processors")
def test_only_features_of_every_processor_count(tmp_path: Path) -> None:
    text = XEON.format(number=0, more="avx_vnni") + XEON.format(number=1, more="")
    assert "avx_vnni" not in describe_cpu(machine(tmp_path, text, 4, 1))["features"]


@pytest.mark.usefixtures("four_processors")
def test_arm_features_are_known(tmp_path: Path) -> None:
    cpu = describe_cpu(machine(tmp_path, GRAVITON, 4, 1))
    assert cpu["model"] == "Neoverse-V1"
    assert cpu["features"] == ["bf16", "dotprod", "i8mm", "neon", "sve"]
    assert cpu["physical_cores"] == 4


@pytest.mark.usefixtures("four_processors")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        ({}, None),
    ],
)
def test_quotas_of_both_control_group_versions(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert quota_cores(tmp_path) == expected


def test_memory_is_the_lower_of_machine_and_limit(tmp_path: Path) -> None:
    machine(tmp_path, GRAVITON, 1, 1)
    assert memory_gib(tmp_path) == 16.0
    write(tmp_path / "proc/self/cgroup", "0::/job\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.max", "max\n")
    assert memory_gib(tmp_path) == 16.0
    write(tmp_path / "sys/fs/cgroup/memory.max", str(4 * 2**30))
    assert memory_gib(tmp_path) == 4.0


def test_energy_is_told_in_joules_and_the_counter_may_start_over(tmp_path: Path) -> None:
    assert energy_joules(tmp_path) is None
    assert joules_between(None, None) is None
    counter = tmp_path / "sys/class/powercap/intel-rapl:0"
    write(counter / "energy_uj", "5000000\n")
    write(counter / "max_energy_range_uj", "262143000000\n")
    assert energy_joules(tmp_path) == 5.0
    assert joules_between(2.0, 5.0, tmp_path) == 3.0
    assert joules_between(262142.0, 5.0, tmp_path) == pytest.approx(6.0)


def test_resident_memory_is_below_its_peak() -> None:
    assert 5 < hardware.resident_memory_mb() <= hardware.peak_memory_mb()


def fake_nvidia_smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "nvidia-smi", f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_as_the_driver_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA L4, 23034, 550.54.15, 8.9'; echo 'GB10, [N/A], 580.1, 12.1'", monkeypatch)
    assert list_gpus() == [
        {"name": "NVIDIA L4", "memory_mb": 23034, "driver": "550.54.15", "compute_capability": "8.9"},
        {"name": "GB10", "memory_mb": None, "driver": "580.1", "compute_capability": "12.1"},
    ]


def test_no_driver_means_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", monkeypatch)
    assert list_gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert list_gpus() == []


def test_peak_memory_grows_with_use() -> None:
    before = peak_memory_mb()
    block = bytearray(os.urandom(1)) * (300 * 2**20)
    assert peak_memory_mb() >= min(before + 1, 300)
    assert len(block) == 300 * 2**20


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ["avx2"], True),
        ("x86_64", ["avx2", "avx512f"], True),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("AMD64", ["avx2", "avx512_vnni", "avx512f"], False),
        ("x86_64", ["amx_int8"], False),
        ("aarch64", ["neon"], False),
    ],
)
def test_int8_saturates_on_x86_without_vnni(machine: str, features: list[str], expected: bool) -> None:
    assert int8_saturates(machine, features) == expected


@pytest.mark.parametrize(
    ("features", "capabilities", "expected"),
    [
        (["avx2", "avx512f", "avx512_vnni"], [], "fp32"),
        (["avx512_bf16"], [], "bf16"),
        (["amx_bf16", "amx_int8"], [], "bf16"),
        (["neon", "bf16"], [], "bf16"),
        ([], [], "fp32"),
        (["amx_bf16"], ["6.1"], "fp32"),  # what trains decides, not the CPU beside it
        ([], ["7.0"], "fp16"),
        ([], ["7.5"], "fp16"),
        ([], ["8.0"], "bf16"),
        ([], ["12.1"], "bf16"),
        ([], ["9.0", "7.5"], "fp16"),  # the weakest
        ([], ["10.0", "9.0"], "bf16"),  # numbers, not text
        ([], ["[N/A]"], "fp32"),
    ],
)
def test_training_takes_the_format_that_the_machine_multiplies(
    features: list[str], capabilities: list[str], expected: str
) -> None:
    assert training_precision(features, [{"compute_capability": one} for one in capabilities]) == expected


@pytest.mark.parametrize(
    ("visible", "cuda", "found"),
    [(None, True, 1), ("0", True, 1), ("", True, 0), ("-1", True, 0), (None, False, 0)],
)
def test_only_gpus_that_pytorch_can_train_on_count(
    visible: str | None, cuda: bool, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA L4, 23034, 550.54.15, 8.9'", monkeypatch)
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(training_gpus()) == found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cuda: Optional[str] = '13.0'", True),
        ('cuda = "12.8"', True),
        ("cuda: Optional[str] = None", False),
        ("cuda_note = 1", False),
    ],
)
def test_the_build_of_pytorch_is_read_from_its_files(
    line: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "torch/version.py", f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    found = SimpleNamespace(origin=str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: found)
    assert torch_has_cuda() == expected


def test_the_build_of_pytorch_is_what_pytorch_says() -> None:
    import torch

    assert torch_has_cuda() == (torch.version.cuda is not None)
