"""tools.benchmark: it runs, and names its figures as other programs read them."""

import json

import pytest
from helpers import run_script

KEYS = """head.speedup head.extra_memory_ratio head.share_of_step step.vit_nano.O0.ratio
step.vit_nano.O1.ratio step.vit_nano.O0.share_of_limit pipeline.speedup pipeline.share_of_decode
momentum.speedup knn.ratio
listing.first.seconds listing.kept.own_mb listing.order.seconds scaling.two_processes"""


@pytest.mark.slow
def test_all_parts_run_and_name_their_figures(tmp_path):
    path = tmp_path / "results.json"
    options = ("--quick", "--encoders", "vit_nano", "--json", path)
    done = run_script("tools.benchmark", *options)
    assert done.returncode == 0, done.stdout
    results = json.loads(path.read_text())
    for key in KEYS.split():
        value = results
        for name in key.split("."):
            value = value[name]
        assert isinstance(value, float | int)
        assert f"| {key} |" in done.stdout
    assert results["head"]["speedup"] > 0 and results["scaling"]["two_processes"] > 0
