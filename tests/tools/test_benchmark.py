"""tools.benchmark: it runs, and names its figures as other programs read them."""

import json
import re
import shlex

import pytest
from helpers import ROOT, run_script

from tools.benchmark import __main__ as benchmark
from tools.benchmark.gpu import peak

KEYS = """head.speedup head.extra_memory_ratio head.share_of_step step.vit_nano.O0.ratio
step.vit_nano.O1.ratio step.vit_nano.O0.share_of_limit pipeline.speedup pipeline.share_of_decode
pipeline.device_over_opencv pipeline.large_speedup momentum.speedup knn.ratio
scaling.two_processes"""
COMMAND = re.compile(r"^    python -m tools\.benchmark (.*)$", re.MULTILINE)
SMALL = ["--quick", "--encoders", "vit_nano", "--json"]


@pytest.mark.slow
def test_the_documented_commands_name_their_figures(run_main, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results.json"
    commands = COMMAND.findall((ROOT / "docs/performance.md").read_text())
    results, tables = {}, ""
    for command in commands:
        run_main(benchmark, *shlex.split(command), *SMALL, path)
        results |= json.loads(path.read_text())
        tables += capfd.readouterr().out
    assert "| momentum.speedup | " in (tmp_path / "table.md").read_text()
    for key in KEYS.split():
        value = results
        for name in key.split("."):
            value = value[name]
        assert isinstance(value, float | int)
        assert f"| {key} |" in tables
    assert results["head"]["speedup"] > 0 and results["scaling"]["two_processes"] > 0


@pytest.mark.slow
def test_the_page_of_a_gpu_has_all_rows(tmp_path):
    """In its form for the CPU."""
    path = tmp_path / "page.md"
    flags = ["--quick", "--encoders", "vit_nano", "--markdown", path]
    done = run_script("tools.benchmark", "gpu", *flags)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert text.startswith("# CPU\n\nPython 3.")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    measured = {tuple(row[:4]): row[4:8] for row in rows if row[:1] == ["vit_nano"]}
    forms = {("eager", "1"), ("compiled", "1"), ("eager", "2")}
    assert measured.keys() == {("vit_nano", "O0", *form) for form in forms}
    for row in measured.values():
        assert all(float(cell) > 0 for cell in row)
    loaders = {row[0]: row[1:] for row in rows if row[:1] in (["opencv"], ["device"])}
    assert all(float(loaders[name][0]) > 0 for name in ("opencv", "device"))
    assert float(loaders["device"][2]) > 0 and not loaders["opencv"][2]


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
