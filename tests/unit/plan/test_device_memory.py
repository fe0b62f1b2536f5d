"""Device memory as users write it: sizes, and the names of GPUs."""

from __future__ import annotations

import pytest

from sltrain_dist.errors import ConfigError
from sltrain_dist.plan.device_memory import GPUS, parse_device_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("80GB", 80 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        ("25769803776", 24 << 30),  # can only be bytes
        ("24564 MiB", 24_564 << 20),
        ("24G", 24 * 10**9),
        ("24gi", 24 << 30),
        ("500M", 500 * 10**6),
        ("10B", 10),
    ],
)
def test_device_memory(text: str, expected: int) -> None:
    assert parse_device_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("NVIDIA H100 80GB HBM3", 81559),
        ("NVIDIA H100 PCIe", 81559),
        ("H100 SXM5 80GB", 81559),
        ("NVIDIA H100 NVL", 95830),
        ("NVIDIA H200", 143771),
        ("h200 141GB", 143771),
        ("NVIDIA B200", 183359),
        ("NVIDIA A100-SXM4-40GB", 40960),
        ("NVIDIA A100-PCIE-40GB", 40960),
        ("NVIDIA A100-SXM4-80GB", 81920),
        ("NVIDIA A100 80GB PCIe", 81920),
        ("A100-80G", 81920),
        ("Tesla T4", 15360),
        ("T4 16GB", 15360),
        ("Tesla V100-SXM2-16GB", 16384),
        ("Tesla V100-SXM2-32GB", 32768),
        ("NVIDIA L4", 23034),
        ("L4 24GB", 23034),
        ("NVIDIA L40S", 46068),
        ("NVIDIA A10", 23028),
        ("NVIDIA A10G", 23028),
        ("NVIDIA GeForce RTX 3090", 24576),
        ("RTX 3090 24GB", 24576),
        ("3090 Ti", 24564),  # and not so many tebibytes
        ("5070ti", 16303),
        ("NVIDIA GeForce RTX 4090", 24564),
        ("rtx4090", 24564),
        ("rtx_4090", 24564),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376),
        ("RTX 5090", 32607),
        ("NVIDIA RTX A6000", 49140),
        ("A6000", 49140),
        ("NVIDIA RTX 6000 Ada Generation", 49140),
        ("RTX6000Ada", 49140),
        ("NVIDIA GH200 480GB", 97871),
    ],
)
def test_gpus_by_the_names_of_nvidia_smi(text: str, mib: int) -> None:
    assert parse_device_memory(text) == mib << 20


@pytest.mark.parametrize("name", list(GPUS))
def test_spelling_of_a_gpu_does_not_matter(name: str) -> None:
    for spelling in (name.lower(), name.replace(" ", "-"), name.replace(" ", ""), f"NVIDIA {name}"):
        assert parse_device_memory(spelling) == GPUS[name] << 20


@pytest.mark.parametrize(
    "text",
    [
        "A100",
        "RTX 4091",
        "24 gigs",
        "-24GiB",
        "0GiB",
        "",
        "GiB",
        "nan",
        "9" * 400,
        "L4 48GB",
        "24,5GB",
        "1e999",
        "4060 Ti",
    ],
)
def test_wrong_device_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="GiB, 80GB or bytes"):
        parse_device_memory(text)


@pytest.mark.parametrize("text", ["24", "80", "24564", "0.5", "99999999"])
def test_a_number_without_a_unit(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--device-memory {text} has no unit; write {text}GiB or {text}GB"):
        parse_device_memory(text)


def test_gpus_that_were_perhaps_meant() -> None:
    with pytest.raises(ConfigError, match=r"nor a known GPU; did you mean 'A100-40G' or 'A100-80G'\? Sizes are"):
        parse_device_memory("nvidia a100")
    with pytest.raises(ConfigError, match=r"'abacus' is neither a size nor a known GPU\. Sizes are"):
        parse_device_memory("abacus")
    with pytest.raises(ConfigError, match=r"has no unit; .*; did you mean 'RTX 4090' or 'RTX 4090 Laptop'\?"):
        parse_device_memory("4090")
