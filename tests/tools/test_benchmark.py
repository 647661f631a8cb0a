"""tools.benchmark: it runs, and names its figures as other programs read them."""

import json
import re
import shlex

import pytest
from helpers import ROOT

from tools.benchmark import __main__ as benchmark

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
