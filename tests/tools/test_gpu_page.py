"""make test-gpu: one page of tests and benchmark; the benchmark's form for the CPU."""

import pytest
from helpers import run_script

from tools.benchmark.gpu import peak


@pytest.mark.slow
def test_the_page_has_all_rows(tmp_path):
    path = tmp_path / "page.md"
    given = ["--quick", "--encoders", "vit_nano", "--tests", "tests/test_gpu.py"]
    done = run_script("tools.gpu_page", path, *given)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    measured = {tuple(row[:4]): row[4:8] for row in rows if row[:1] == ["vit_nano"]}
    forms = {("eager", "1"), ("compiled", "1"), ("eager", "2")}
    assert measured.keys() == {("vit_nano", "O0", *form) for form in forms}
    for row in measured.values():
        assert all(float(cell) > 0 for cell in row)
    loaders = {row[0]: row[1:] for row in rows if row[:1] in (["opencv"], ["device"])}
    assert all(float(loaders[name][0]) > 0 for name in ("opencv", "device"))
    assert float(loaders["device"][2]) > 0 and not loaders["opencv"][2]
    assert "skipped" in text and "no CUDA device" in text


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "O0", 67),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA L40S", "tf32", 183),
        ("Tesla V100-SXM2-32GB", "tf32", None),
        ("CPU", "O0", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(name, precision, expected):
    assert peak(name, precision) == expected
