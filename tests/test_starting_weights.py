"""Pre-training that starts from weights of others: --pretrained of main_pretrain.py."""

import json

import pytest
import timm
import torch
from helpers import arguments, assert_same, weights
from torch import nn

import main_pretrain
from models.encoder import create_encoder
from utils.errors import UserError


def checkpoint(path, heads=4):
    """DINO's form, of a ViT like vit_nano whose positions are learned."""
    torch.manual_seed(7)
    real = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=heads, num_classes=0
    )
    for parameter in real.parameters():
        nn.init.normal_(parameter, std=0.02)
    state = {f"backbone.{key}": value for key, value in real.state_dict().items()}
    torch.save({"teacher": state, "epoch": 99}, path)
    return real.state_dict()


def train(run_main, imagenet, out, path, *opts, method="moby"):
    given = arguments(method, imagenet, out, "TRAIN.EPOCHS", "1", *opts)
    run_main(main_pretrain, "--pretrained", path, *given)
    return (out / "run/default/log_rank0.txt").read_text()


HEADS = ("MODEL.NUM_HEADS", "8")


@pytest.mark.parametrize("method", ["byol", "moby", "synco"])
def test_both_encoders_start_from_the_weights(run_main, imagenet, tmp_path, method):
    """A rate of 0 keeps them; positions are interpolated to the grid of 32 pixels."""
    real = checkpoint(tmp_path / "d.pth", 8)
    still = ("TRAIN.BASE_LR", "0.0", "TRAIN.WARMUP_LR", "0.0", "TRAIN.MIN_LR", "0.0", *HEADS)
    log = train(run_main, imagenet, tmp_path, tmp_path / "d.pth", *still, method=method)
    assert "starting from" in log and "weights of DINO" in log and "resumed" not in log
    state = weights(tmp_path)
    for key, value in real.items():
        for encoder in ("encoder", "encoder_k"):
            own = state["model"][f"{encoder}.{key}"]
            if key == "pos_embed":
                assert own.shape == (1, 17, 128)
                assert 0.005 < own.std() < 0.02  # fewer, each a mean of several
            else:
                torch.testing.assert_close(own, value, rtol=1e-6, atol=1e-7)
    assert (state["epoch"], state["step"]) == (0, 6)  # a schedule of its own
    config = json.loads((tmp_path / "run/default/config.json").read_text())
    assert config["MODEL"]["NUM_HEADS"] == 8
    origin = state["provenance"]
    assert origin["checkpoint"] == str(tmp_path / "d.pth")
    assert origin["network"] == {"num_heads": 8, "patch_size": 8}


@pytest.mark.slow
def test_a_run_is_continued_not_begun_again(run_main, imagenet, tmp_path):
    """The same command, as a scheduler repeats it, gives what an uninterrupted run gives."""
    checkpoint(tmp_path / "d.pth")
    opts = ("TRAIN.EPOCHS", "2", "SAVE_FREQ", "1", "MODEL.NUM_HEADS", "4")
    train(run_main, imagenet, tmp_path / "a", tmp_path / "d.pth", *opts)
    folder = tmp_path / "b/run/default"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pth").symlink_to(tmp_path / "a/run/default/ckpt_epoch_0.pth")
    (tmp_path / "d.pth").unlink()  # it has been cleaned up
    log = train(run_main, imagenet, tmp_path / "b", tmp_path / "d.pth", *opts)
    assert "at update 6" in log and "starting from" not in log
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_other_heads_are_not_continued(run_main, imagenet, tmp_path):
    """The shapes agree, so that nothing else would notice."""
    checkpoint(tmp_path / "d.pth", 8)
    train(run_main, imagenet, tmp_path, tmp_path / "d.pth", *HEADS)
    last = ("TRAIN.EPOCHS", "2")
    with pytest.raises(UserError, match="num heads 8, the encoder has 4: build it with"):
        run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, *last))
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, *last, *HEADS))
    assert weights(tmp_path)["epoch"] == 1


def test_weights_of_another_encoder_are_refused(run_main, imagenet, tmp_path):
    torch.save(create_encoder("vit_tiny", 32).state_dict(), tmp_path / "t.pth")
    with pytest.raises(UserError, match="it looks like MODEL"):
        train(run_main, imagenet, tmp_path, tmp_path / "t.pth")
    with pytest.raises(UserError, match="no such file"):
        train(run_main, imagenet, tmp_path, tmp_path / "none.pth")
