"""One identity of a result: what it depends on, and how two of them differ."""

import json
import logging
from types import SimpleNamespace

import pytest
from helpers import ROOT

from evaluation.identity import differences, identified, identity, identity_said, measured
from utils.config import CLASSIFIER, FEATURE, FINE_TUNING, KEYS, NETWORK, load_config, with_values

RUN = SimpleNamespace(precision=SimpleNamespace(level="O0"))
ORIGIN = {"weights": "w", "key": "encoder", "encoder": "vit_nano", "network": {"num_heads": 4}}
DATA = {"digest": "d", "images": {"train": 2}}
CONFIG = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"))


def of(config=CONFIG, uses=NETWORK | FEATURE, origin=ORIGIN, data=DATA, **how):
    return identity(RUN, config, uses, origin, data, **how)


def another(value):
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*value, 3]


@pytest.mark.parametrize(
    "uses", [NETWORK | FEATURE, NETWORK | FEATURE | CLASSIFIER, FINE_TUNING, NETWORK]
)
def test_every_key_that_a_figure_depends_on_is_in_it_and_no_other(uses):
    """As the keys themselves say; the precision is that of the run."""
    first = of(uses=uses)
    for key, entry in KEYS.items():
        if key == "AMP_OPT_LEVEL" or not entry.effect or isinstance(entry.default, dict):
            continue
        changed = with_values(CONFIG, {key: another(entry.default or 0)})
        assert set(differences(first, of(changed, uses))) == ({key} if entry.uses & uses else set())


def test_an_identity_is_json_and_equals_itself_after_it_was_written():
    first = of(uses=NETWORK | FEATURE | CLASSIFIER | FINE_TUNING, **{"--lr": [0.1, 3.0]})
    again = json.loads(json.dumps(first))
    assert again == first and differences(again, first) == {}
    assert identity_said({"identity": again}) == first
    for nothing in (None, [], {}, {"identity": 3}, {"identity": None}):
        assert identity_said(nothing) == {}


def test_differences_are_words():
    new = of(with_values(CONFIG, {"TEST.CROP": False}), **{"--temperature": 0.1})
    old = of(origin=ORIGIN | {"weights": "v"}, data=DATA | {"digest": "e"}, **{"--temperature": 1})
    assert list(differences(old, new).values()) == [
        *("other weights", "other images", "TEST.CROP True there, False here"),
        "--temperature 1 there, 0.1 here",
    ]
    del old["TEST.CROP"], new["weights"], old["images"]  # of an older version
    assert set(differences(old, new)) == {"--temperature"}


def test_what_is_measured_is_apart_from_whose_it_is():
    """Two encoders and two lists of images are measured alike, two crops are not."""
    other = ORIGIN | {"weights": "v", "key": "encoder_k", "encoder": "swin_tiny", "network": {}}
    config = with_values(CONFIG, {"MODEL.ENCODER": "swin_tiny"})
    assert measured(of()) == measured(of(config, origin=other, data={"digest": "e"}))
    assert measured(of()) != measured(of(with_values(CONFIG, {"TEST.CROP": False})))


def test_a_baseline_has_no_network():
    config = with_values(CONFIG, {"MODEL.ENCODER": "swin_tiny"})
    origin = {"encoder": "raw_pixels"}
    assert of(origin=origin) == of(config, origin=origin)
    assert of(origin=origin)["encoder"] == "raw_pixels"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"provenance": 3}'])
def test_no_older_results_are_no_matter(tmp_path, caplog, monkeypatch, text):
    monkeypatch.setattr("evaluation.identity.gather_provenance", lambda *_: {"seed": 0})
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    logger = logging.getLogger("identity")
    run = SimpleNamespace(folder=str(tmp_path), logger=logger, effective=CONFIG, device=None)
    assert identified(run, ORIGIN, DATA, of()) == {"seed": 0, "identity": of()}
    assert not caplog.records
    provenance = {"identity": of() | {"TEST.CROP": False}}
    (tmp_path / "results.json").write_text(json.dumps({"provenance": provenance}))
    identified(run, ORIGIN, DATA, of())
    assert "of another evaluation (TEST.CROP False there, True here)" in caplog.text
