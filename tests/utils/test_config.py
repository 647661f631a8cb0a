"""Configuration files, --opts and the command line."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from utils.arguments import number_in, parse_arguments
from utils.config import (
    DEFAULTS,
    KEYS,
    Use,
    as_dict,
    changed_settings,
    check_ranges,
    configuration_facts,
    leaves,
    load_config,
    markdown_table,
    run_folder,
    settings,
    to_json,
    with_values,
)
from utils.errors import UserError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = sorted(
    p for p in RECIPES if re.fullmatch(r"(moby|byol|synco)_.*_(tiny|small|base)", p.stem)
)


def write(folder: Path, text: str, name: str = "c.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_there_are_18_recipes():
    assert len(PUBLISHED) == 18


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_recipe_says_what_the_paper_says(path):
    config = load_config(str(path))
    method, encoder = path.stem.split("_", 1)
    byol = method == "byol"
    assert (method, encoder) == (config.MODEL.TYPE, config.MODEL.ENCODER)
    assert config.MODEL.NAME.startswith(f"{method}__{encoder}__odpr02_tdpr0_cm099")
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (300, 5)
    assert (2e-4 if byol else 1e-3) == config.TRAIN.BASE_LR
    assert (0.03 if byol else 0.05) == config.TRAIN.WEIGHT_DECAY
    assert (0.996 if byol else 0.99) == config.MODEL.CONTRAST_MOMENTUM
    assert config.AUG.SSL_AUG and config.AUG.SSL_AUG_TYPE == "byol"


def test_every_key_of_a_published_file_loads(tmp_path):
    """All keys, in the forms in which YAML files write numbers."""
    text = """
DATA: {BATCH_SIZE: 128, DATA_PATH: d, DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic,
  PIN_MEMORY: True, NUM_WORKERS: 8, ZIP_MODE: False, CACHE_MODE: part, TRAINING_IMAGES: 1}
MODEL: {TYPE: moby, ENCODER: swin_tiny, NAME: n, RESUME: '', NUM_CLASSES: 1000, DROP_RATE: 0,
  DROP_PATH_RATE: 0.1, LABEL_SMOOTHING: 0.1, ONLINE_DROP_PATH_RATE: 0.2,
  TARGET_DROP_PATH_RATE: 0.0, CONTRAST_MOMENTUM: 0.99, CONTRAST_TEMPERATURE: 0.2,
  CONTRAST_NUM_NEGATIVE: 4096, PROJ_NUM_LAYERS: 2, PRED_NUM_LAYERS: 2, STOP_GRAD_CONV1: False,
  REPLACE_LN_WITH_BN: False, N_HARD: 256, N1: 128, N2: 128, N3: 128, N4: 128, N5: 128, N6: 128,
  WARMUP_EPOCHS: 30, COOLDOWN_EPOCHS: 100}
TRAIN: {START_EPOCH: 0, EPOCHS: 300, WARMUP_EPOCHS: 20, WEIGHT_DECAY: 0.05, BASE_LR: 1e-3,
  WARMUP_LR: 5e-7, MIN_LR: 5e-6, CLIP_GRAD: 5, AUTO_RESUME: True, ACCUMULATION_STEPS: 0,
  USE_CHECKPOINT: False, LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1},
  OPTIMIZER: {NAME: adamw, EPS: 1e-8, BETAS: [0.9, 0.95], MOMENTUM: 0.9}}
LINEAR_EVAL: {PRETRAINED: '', WEIGHTS: freeze}
AUG: {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel,
  RECOUNT: 1, MIXUP: 0.8, CUTMIX: 1.0, CUTMIX_MINMAX: [0.1, 0.9], MIXUP_PROB: 1.0,
  MIXUP_SWITCH_PROB: 0.5, MIXUP_MODE: batch, SSL_AUG: True, SSL_AUG_TYPE: byol,
  SSL_AUG_CROP: 0.08, SSL_LINEAR_AUG: False}
TEST: {CROP: True}
AMP_OPT_LEVEL: O1
OUTPUT: o
TAG: t
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: False
THROUGHPUT_MODE: False
LOCAL_RANK: 0
"""
    config = load_config(write(tmp_path, text))
    assert config.TRAIN.BASE_LR == 1e-3
    assert config.TRAIN.CLIP_GRAD == 5.0 and isinstance(config.TRAIN.CLIP_GRAD, float)
    assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)
    assert config.AUG.CUTMIX_MINMAX == [0.1, 0.9]


def test_base_files_come_first_and_relative(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "TRAIN: {EPOCHS: 7, WARMUP_EPOCHS: 3}", "a.yaml")
    write(tmp_path, "BASE: [sub/a.yaml]\nTRAIN: {EPOCHS: 8}\nTAG: mid", "b.yaml")
    config = load_config(write(tmp_path, "BASE: [b.yaml]\nTAG: top"))
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TAG) == (8, 3, "top")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN: {EPOCH: 3}", "c.yaml: unknown configuration key TRAIN.EPOCH, did you mean"),
        ("FOO: 1", "c.yaml: unknown configuration key FOO"),
        ("TRAIN: 3", "c.yaml: TRAIN is a section"),
        ("TRAIN: {EPOCHS: many}", "c.yaml: TRAIN.EPOCHS must be a whole number, got 'many'"),
        ("TRAIN: {EPOCHS: 2.5}", "TRAIN.EPOCHS must be a whole number"),
        ("AUG: {SSL_AUG: 1}", "AUG.SSL_AUG must be True or False"),
        ("TAG: 5", "TAG must be text"),
        ("MODEL: {ALPHA: [0.1]}", "MODEL.ALPHA must be a list"),
        ("TRAIN: {BASE_LR: fast}", "TRAIN.BASE_LR must be a number"),
        ("- 1\n- 2", "c.yaml: a configuration is a YAML mapping"),
        ("TRAIN: {EPOCHS: [}", "c.yaml: not a valid YAML file"),
        ("BASE: [none.yaml]", "none.yaml: no such file"),
        ("BASE: [c.yaml]", "BASE files include each other"),
        ("TRAIN: !!python/object/apply:os.system ['true']", "c.yaml: not a valid YAML file"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.EPOCHS"], "has no value"),
        (["TRAIN.EPOCHSS", "3"], "did you mean TRAIN.EPOCHS?"),
        (["TRAIN", "3"], "TRAIN is a section"),
        (["TRAIN.EPOCHS.X", "3"], "unknown configuration key TRAIN.EPOCHS.X"),
        (["TRAIN.EPOCHS", "x"], "TRAIN.EPOCHS must be a whole number"),
        (["AUG.SSL_AUG", "maybe"], "AUG.SSL_AUG must be True or False"),
    ],
)
def test_mistakes_in_opts_are_named(opts, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load_config(str(RECIPES[0]), opts)


def test_opts_take_the_type_of_their_key():
    opts = ["TRAIN.BASE_LR", "1e-3", "TRAIN.EPOCHS", "5", "TAG", "17", "AUG.SSL_AUG", "true"]
    config = load_config(str(RECIPES[0]), [*opts, "TRAIN.OPTIMIZER.BETAS", "(0.8,0.9)"])
    assert config.TRAIN.BASE_LR == 1e-3 and config.TRAIN.EPOCHS == 5
    assert config.TAG == "17" and config.AUG.SSL_AUG is True
    assert config.TRAIN.OPTIMIZER.BETAS == (0.8, 0.9)


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_opts_end_in_a_configuration_or_an_error(key, value):
    try:
        load_config(str(RECIPES[0]), [key, value])
    except UserError as error:
        assert str(error)


def test_json_holds_what_has_an_effect():
    config = load_config(str(RECIPES[0]), ["MODEL.NUM_CLASSES", "7", "AUG.SSL_LINEAR_AUG", "true"])
    assert config.MODEL.NUM_CLASSES == 7 and config.AUG.SSL_LINEAR_AUG is True
    expected = json.loads(json.dumps(as_dict(config)))
    without = ("MODEL.NUM_CLASSES", "MODEL.DROP_PATH_RATE", "AUG.SSL_LINEAR_AUG")
    for section, name in (key.split(".") for key in without):
        del expected[section][name]
    assert json.loads(to_json(config)) == expected
    assert set(json.loads(to_json(config))) == set(DEFAULTS)
    assert [key for key, entry in KEYS.items() if not entry.effect] == list(without)
    assert all(f"`{key}` |" in line for key, line in zip(without, NO_EFFECT, strict=True))


NO_EFFECT = [line for line in markdown_table().splitlines() if "| **no effect**: " in line]


def test_flags_reach_the_configuration():
    _, config = parse_arguments(
        "test",
        argv=f"--cfg {RECIPES[0]} --batch-size 3 --data-path d --output o --tag t --resume r "
        "--accumulation-steps 2 --use-checkpoint --amp-opt-level O1 --zip --cache-mode full "
        "--eval --throughput --opts MODEL.NAME n".split(),
    )
    assert (config.DATA.BATCH_SIZE, config.DATA.DATA_PATH) == (3, "d")
    assert (config.DATA.ZIP_MODE, config.DATA.CACHE_MODE) == (True, "full")
    assert (config.MODEL.RESUME, config.TRAIN.ACCUMULATION_STEPS) == ("r", 2)
    assert config.TRAIN.USE_CHECKPOINT and config.EVAL_MODE and config.THROUGHPUT_MODE
    assert (config.AMP_OPT_LEVEL, run_folder(config)) == ("O1", "o/n/t")


def test_the_configuration_that_was_read_is_frozen():
    _, config = parse_arguments("test", argv=["--cfg", str(RECIPES[0])])
    for node, key in ((config, "OUTPUT"), (config.TRAIN, "BASE_LR"), (config.DATA, "DATASET")):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(node, key, node[key])
    other = with_values(config, {"TRAIN.BASE_LR": 7.0, "OUTPUT": "elsewhere"})
    assert (other.TRAIN.BASE_LR, other.OUTPUT) == (7.0, "elsewhere")
    assert (config.TRAIN.BASE_LR, config.OUTPUT) != (7.0, "elsewhere")
    with pytest.raises(AttributeError, match="immutable"):
        other.TRAIN.BASE_LR = 1.0


@pytest.mark.parametrize("flag", ["--local-rank=3", "--local_rank 3"])
def test_both_spellings_of_local_rank(flag, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    _, config = parse_arguments("test", argv=["--cfg", str(RECIPES[0]), *flag.split()])
    assert config.LOCAL_RANK == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    _, config = parse_arguments("test", argv=["--cfg", str(RECIPES[0]), *flag.split()])
    assert config.LOCAL_RANK == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tag", "x"], "--cfg"),
        (["--cfg", "nowhere.yaml"], "nowhere.yaml: no such configuration"),
        (["--cfg", str(RECIPES[0]), "--frobnicate"], "--frobnicate"),
        (["--cfg", str(RECIPES[0]), "--batch", "3"], "--batch"),
        (
            ["--cfg", str(RECIPES[0]), "--batch-size", "0"],
            "DATA.BATCH_SIZE must be from 1 to 1000000, got 0",
        ),
        (["--cfg", str(RECIPES[0]), "--amp-opt-level", "O9"], "O9"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        parse_arguments("test", argv=arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


PUBLISHED_DEFAULTS = """
DATA: {BATCH_SIZE: 64, DATA_PATH: '', DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic,
  PIN_MEMORY: true, NUM_WORKERS: 8, ZIP_MODE: false, CACHE_MODE: part}
MODEL: {TYPE: moby, ENCODER: swin_tiny, NAME: moby__swin_tiny, RESUME: '', NUM_CLASSES: 1000,
  DROP_RATE: 0.0, DROP_PATH_RATE: 0.1, LABEL_SMOOTHING: 0.1, ONLINE_DROP_PATH_RATE: 0.2,
  TARGET_DROP_PATH_RATE: 0.0, CONTRAST_MOMENTUM: 0.99, CONTRAST_TEMPERATURE: 0.2,
  CONTRAST_NUM_NEGATIVE: 4096, PROJ_NUM_LAYERS: 2, PRED_NUM_LAYERS: 2, STOP_GRAD_CONV1: false,
  REPLACE_LN_WITH_BN: false, N_HARD: 256, N1: 128, N2: 128, N3: 128, N4: 128, N5: 128, N6: 128,
  WARMUP_EPOCHS: 30, COOLDOWN_EPOCHS: 100}
TRAIN: {START_EPOCH: 0, EPOCHS: 300, WARMUP_EPOCHS: 20, WEIGHT_DECAY: 0.05, BASE_LR: 5.0e-4,
  WARMUP_LR: 5.0e-7, MIN_LR: 5.0e-6, CLIP_GRAD: 5.0, AUTO_RESUME: true, ACCUMULATION_STEPS: 0,
  USE_CHECKPOINT: false, LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1},
  OPTIMIZER: {NAME: adamw, EPS: 1.0e-8, BETAS: [0.9, 0.999], MOMENTUM: 0.9}}
LINEAR_EVAL: {PRETRAINED: '', WEIGHTS: freeze}
AUG: {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel,
  RECOUNT: 1, MIXUP: 0.8, CUTMIX: 1.0, CUTMIX_MINMAX: null, MIXUP_PROB: 1.0,
  MIXUP_SWITCH_PROB: 0.5, MIXUP_MODE: batch, SSL_AUG: false, SSL_AUG_TYPE: byol,
  SSL_AUG_CROP: 0.08, SSL_LINEAR_AUG: false}
TEST: {CROP: true}
AMP_OPT_LEVEL: O0
OUTPUT: output
TAG: default
SAVE_FREQ: 100
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: false
THROUGHPUT_MODE: false
LOCAL_RANK: 0
"""
OWN = {  # what the published configuration does not have
    "DATA": {"BACKEND": "opencv", "MAX_BAD_FRACTION": 0.001, "TRAINING_IMAGES": 0},
    "MODEL": {
        **{"ALPHA": [0.0, 0.5], "BETA": [1.0, 1.5], "GAMMA": [0.0, 1.0]},
        **{"SIGMA": 0.1, "DELTA": 0.01, "ETA": 0.01, "OPTIONS": {}},
        **{"NUM_HEADS": 0, "PATCH_SIZE": 0, "WINDOW_SIZE": 0},
    },
    "TRAIN": {
        **{"KEEP_CHECKPOINTS": 0, "SAVE_MINUTES": 30.0, "SAVE_STEPS": 0, "KNN_FREQ": 0},
        **{"PROBE": False, "ON_SAVE_ERROR": "continue", "MAX_SKIPPED_UPDATES": 20},
        **{"WAIT_FOR_LOCK": 60.0, "SAVE_PATIENCE": 10.0, "TF32": False},
    },
    "AUG": {
        f"VIEW{view}": {
            **{"CROP": [0.08, 1.0], "RATIO": [0.75, 1.3333], "FLIP": 0.5, "JITTER": 0.8},
            **{"BRIGHTNESS": 0.4, "CONTRAST": 0.4, "SATURATION": 0.2, "HUE": 0.1, "GREY": 0.2},
            **{"BLUR": blur, "BLUR_SIGMA": [0.1, 2.0], "SOLARIZE": solarize},
            **{"SOLARIZE_FROM": 128, "INTERPOLATION": "bilinear"},
        }
        for view, blur, solarize in ((1, 1.0, 0.0), (2, 0.1, 0.2))
    },
    "AMP_OPT_LEVEL": "auto",  # published: O0
    **{"COMPILE": False, "TENSORBOARD": False, "WANDB": False, "DIST_TIMEOUT": 600.0},
}


def test_the_defaults_are_the_published_ones():
    published, ours = yaml.safe_load(PUBLISHED_DEFAULTS), as_dict(DEFAULTS)
    published["TRAIN"]["OPTIMIZER"]["BETAS"] = (0.9, 0.999)
    assert ours.pop("BASE") == [""]
    for section, value in ours.items():
        if isinstance(value, dict):
            assert value == published[section] | OWN.get(section, {}), section
        else:
            assert value == (published | OWN)[section], section


def numeric(key):
    default = KEYS[key].default
    first = default[0] if isinstance(default, (list, tuple)) else default
    return isinstance(first, (int, float)) and not isinstance(first, bool)


@pytest.mark.parametrize("key", filter(numeric, KEYS))
def test_every_number_has_a_range_whose_ends_alone_are_accepted(key, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    low, high = KEYS[key].allowed
    default = KEYS[key].default
    several = isinstance(default, (list, tuple))
    below, above = (low - 1, high + 1) if high > 1 else (-0.5, 1.5)

    def read(number):
        value = [number] * len(default) if several else type(default)(number)
        check_ranges(with_values(load_config(str(RECIPES[0])), {key: value}))

    read(low)
    read(high)
    for number in (below, above):
        if several or type(default)(number) == number:
            with pytest.raises(UserError, match=f"^{key} must be from .* to .*, got ") as raised:
                read(number)
            assert f"from {low:.8g} to {high:.8g}, got" in str(raised.value)
    if isinstance(default, float):
        with pytest.raises(UserError, match=f"^{key} must be from"):
            read(float("nan"))


@pytest.mark.parametrize(
    "given",
    [
        "TRAIN.EPOCHS 99999999999999999999999",
        "TRAIN.OPTIMIZER.BETAS (2,2)",
        "MODEL.CONTRAST_TEMPERATURE 0.0",
        "MODEL.CONTRAST_MOMENTUM 5",
        "MODEL.N3 -1",
        "AUG.CUTMIX_MINMAX [0.2,many]",
    ],
)
def test_a_number_out_of_its_range_is_refused_before_anything_is_written(given, tmp_path):
    key, value = given.split()
    command = ["--cfg", str(RECIPES[0]), "--output", str(tmp_path), "--opts", key, value]
    with pytest.raises(UserError, match=f"{key} must be from .* to "):
        parse_arguments("", argv=command)
    assert not list(tmp_path.iterdir())


def test_the_documented_table_of_keys_is_that_of_the_code():
    assert markdown_table() in (ROOT / "docs" / "keys.md").read_text()
    assert all(entry.about for entry in KEYS.values()), "each key says what it is"


WORDS = {key: entry.allowed for key, entry in KEYS.items() if isinstance(entry.default, str)}


@pytest.mark.parametrize("key", [key for key, words in WORDS.items() if words])
def test_words_are_of_a_list(key):
    choices = WORDS[key]
    for word in choices:
        parse_arguments("", argv=["--cfg", str(RECIPES[0]), "--opts", key, word])
    with pytest.raises(UserError, match=f"{key} must be one of {', '.join(choices)}, got 'x'"):
        parse_arguments("", argv=["--cfg", str(RECIPES[0]), "--opts", key, "x"])


def test_numbers_of_flags_have_ranges():
    whole, share = number_in(1, 9), number_in(0.0, 0.5)
    assert (whole("1"), whole("9"), share("0.5"), share("0")) == (1, 9, 0.5, 0.0)
    assert isinstance(whole("1"), int) and isinstance(share("0"), float)
    refused = {whole: ("0", "10", "1.5"), share: ("0.51", "-1")}
    for number, texts in refused.items():
        for text in texts:
            with pytest.raises(ValueError):  # argparse says the rest
                number(text)


def test_each_key_names_what_depends_on_it():
    for key, entry in KEYS.items():
        assert isinstance(entry.uses, Use) and entry.uses, key
        # what lies elsewhere or is logged otherwise changes no figure
        assert not (entry.uses & Use.PLACE) or entry.uses == Use.PLACE, key


def test_settings_of_a_use():
    config = load_config("configs/synco_vit_tiny.yaml")
    assert settings(as_dict(config), Use.NETWORK) == {
        "MODEL.ENCODER": "vit_tiny",
        "MODEL.NUM_HEADS": 0,
        "MODEL.PATCH_SIZE": 0,
        "MODEL.WINDOW_SIZE": 0,
        "MODEL.REPLACE_LN_WITH_BN": False,
    }
    trained = settings(as_dict(config), Use.TRAINING)
    assert trained["TRAIN.OPTIMIZER.BETAS"] == [0.9, 0.999] and "OUTPUT" not in trained
    # a configuration of before has the default of a key that came later
    assert settings({}, Use.FEATURE)["TEST.CROP"] is True
    options = settings({"MODEL": {"OPTIONS": {"margin": 1}}}, Use.TRAINING)
    assert options["MODEL.OPTIONS.margin"] == 1


def test_further_arguments_of_a_method_are_settings_of_a_training():
    config = load_config("configs/synco_vit_tiny.yaml", ["MODEL.OPTIONS.margin", "1"])
    assert configuration_facts(config)["MODEL.OPTIONS.margin"] == "1"
    assert "MODEL.OPTIONS.margin" in settings(as_dict(config), Use.TRAINING)
    assert "MODEL.OPTIONS.margin" not in settings(as_dict(config), Use.CLASSIFIER)
    assert "MODEL.OPTIONS: margin 1" in changed_settings(config).splitlines()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_differs_from_the_defaults_fits_a_screen(path):
    config = load_config(str(path), ["SEED", "7", "OUTPUT", "elsewhere", "TRAIN.CLIP_GRAD", "5.0"])
    lines = changed_settings(config).splitlines()
    assert len(lines) <= 15 and "SEED 7" in lines[-1]
    assert not any("elsewhere" in line or "CLIP_GRAD" in line for line in lines)
    shown = {
        f"{section}.{pair.split()[0]}" if section != "also" else pair.split()[0]
        for section, _, rest in (line.partition(": ") for line in lines)
        for pair in re.split(r", (?=[A-Z])", rest)
    }
    others = {key for key, value in leaves(as_dict(config)) if value != KEYS[key].default}
    assert shown == {k for k in others if KEYS[k].uses != Use.PLACE and KEYS[k].effect}
