"""The linear classifier beside pre-training: what it learns, and that it changes nothing."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, spawn, views_of, weights

import main_pretrain
from evaluation.online_probe import MOMENTUM, RATE, OnlineProbe
from models.momentum import Output
from utils.errors import UserError

ON = ("TRAIN.PROBE", "True")


def source(labels, classes=3):
    return SimpleNamespace(labels=np.array(labels), classes=[str(c) for c in range(classes)])


def output(*views):
    zero = torch.zeros(())
    return Output(zero, zero, zero, (zero, zero), views)


def labelled(labels):
    """A batch of which nothing else matters."""
    return views_of(labels, labels, labels)


def probe_lines(folder):
    lines = (folder / "run/default/metrics.jsonl").read_text().splitlines()
    return [x["probe"] for x in map(json.loads, lines) if "probe" in x]


def test_training_goes_on_as_without_it(run_main, imagenet, tmp_path):
    """Weights bit for bit; the probe itself too, after a resume."""
    opts = ("TRAIN.EPOCHS", "2", "SAVE_FREQ", "1", "PRINT_FREQ", "1")
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "without", *opts))
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "with", *opts, *ON))
    without, found = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert without["rng_state"].equal(found["rng_state"])
    assert "probe" not in without and found["probe"]["weight"].any()
    assert_same(without, {name: value for name, value in found.items() if name != "probe"})
    assert probe_lines(tmp_path / "without") == []
    measured = probe_lines(tmp_path / "with")
    assert measured and all(0 <= value <= 1 for value in measured)

    folder = tmp_path / "again" / "run" / "default"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "with/run/default/ckpt_epoch_0.pth", folder / "checkpoint.pth")
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "again", *opts, *ON))
    again = weights(tmp_path / "again")["probe"]
    assert all(value.equal(again[name]) for name, value in found["probe"].items())


def test_its_step_is_torch_s_own(process_group):
    """Against a Linear layer, cross_entropy and SGD on standardised features, over three steps."""
    torch.manual_seed(0)
    probe = OnlineProbe(5, source([0, 1, 2]), torch.device("cpu"))
    layer = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    sgd = torch.optim.SGD(layer.parameters(), RATE, MOMENTUM)
    for _ in range(3):
        views = [torch.randn(6, 5) * 3 + 7 for _ in range(2)]
        labels = torch.randint(0, 3, (6,))
        given = output(*views)
        probe.learning(lambda _, given=given: given)(labelled(labels))
        probe.step(torch.tensor(True))

        inputs = torch.cat([(v - v.mean(0)) / v.std(0, correction=0) for v in views])
        logits = layer(inputs)
        expected = (logits.argmax(1) == labels.repeat(2)).float().mean()
        assert given.figures["probe"] == expected
        sgd.zero_grad()
        F.cross_entropy(logits, labels.repeat(2)).backward()
        sgd.step()
    torch.testing.assert_close(probe.weight[:, :5], layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(probe.weight[:, 5], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_it_learns_classes_that_a_line_divides(process_group):
    torch.manual_seed(0)
    probe = OnlineProbe(8, source([0, 1], classes=2), torch.device("cpu"))
    for _ in range(30):
        labels = torch.randint(0, 2, (32,))
        view = torch.randn(32, 8)
        view[:, 0] += 6 * labels
        given = output(view, view)
        probe.learning(lambda _, given=given: given)(labelled(labels))
        probe.step(torch.tensor(True))
    assert given.figures["probe"] > 0.95


def test_a_skipped_update_leaves_it_as_it_was(process_group):
    probe = OnlineProbe(2, source([0, 1]), torch.device("cpu"))
    view = torch.full((4, 2), torch.nan)
    run = probe.learning(lambda _: output(view, view))
    run(labelled(torch.zeros(4, dtype=torch.long)))
    probe.step(torch.tensor(False))
    assert not probe.weight.any() and not probe.velocity.any()


def test_processes_keep_the_same_probe():
    spawn(_learn_and_compare, 2)


def _learn_and_compare(rank: int) -> None:
    probe = OnlineProbe(4, source([0, 1]), torch.device("cpu"))
    torch.manual_seed(rank)  # each has images of its own
    view = torch.randn(8, 4)
    run = probe.learning(lambda _: output(view, view))
    run(labelled(torch.randint(0, 2, (8,))))
    probe.step(torch.tensor(True))
    both = [torch.empty_like(probe.weight) for _ in range(2)]
    torch.distributed.all_gather(both, probe.weight)
    assert both[0].equal(both[1]) and both[0].any()


@pytest.mark.parametrize(("labels", "classes"), [([0, 0], 1), ([[0, 1], [1, 0]], 2)])
def test_images_without_one_class_each_are_refused(labels, classes):
    with pytest.raises(UserError, match=r"TRAIN\.PROBE needs images with one class each"):
        OnlineProbe(4, source(labels, classes), torch.device("cpu"))


def test_the_state_of_another_probe_is_refused():
    probe = OnlineProbe(4, source([0, 1]), torch.device("cpu"))
    other = OnlineProbe(5, source([0, 1]), torch.device("cpu"))
    with pytest.raises(UserError, match=r"a\.pth: the state of another TRAIN\.PROBE"):
        probe.load_state_dict("a.pth", {"probe": other.state_dict()})
    probe.load_state_dict("a.pth", {})  # a run that began without
    assert not probe.weight.any()
