"""Configurations: what is refused, and what a published recipe means on other data."""

import dataclasses
import math
from pathlib import Path

import pytest
from page_code import page_module

from deimv2_tfg import baselines, data, fusion, recipes, sizes, text
from deimv2_tfg.recipes import (
    FusionConfig,
    Schedule,
    TrainConfig,
    check_recipe,
    config_of,
    fractions_of,
    load_recipe,
    lr_factor,
    published_recipes,
    shipped_recipes,
)
from deimv2_tfg.runs import Run

PUBLISHED = published_recipes()
WRONG = [
    *[(name, -0.001) for name in ("lr", "clip", "warmup", "weight_decay", "cache_gb", "ema")],
    *[(name, math.nan) for name in ("lr", "clip", "warmup", "flat")],
    *[(name, 15) for name in ("plain", "flat", "warmup", "mix_until", "lr_end", "mosaic")],
    *[(name, 70.0) for name in ("photometric", "zoom_out", "iou_crop", "mixup", "copy_blend")],
    *[(name, 1.5) for name in ("quarter_turns", "multi_scale", "matcher_change", "epochs")],
    *[(name, 0) for name in ("lr", "epochs", "batch_size", "eval_every", "image_size")],
    *[(name, -2) for name in ("micro_batch", "num_workers", "patience", "max_returns")],
    *[(name, "4") for name in ("batch_size", "epochs", "lr", "seed", "vertical_flips")],
    *[(name, "huge") for name in ("model", "precision", "lr_rule", "cache")],
    *[(name, None) for name in ("lr", "model", "epochs")],
    ("image_size", 50),
    ("lr", True),
    ("init", 3),
]


@pytest.mark.finding("training.md:13", "training.md:14", "training.md:15")
@pytest.mark.parametrize("field, value", WRONG)
def test_a_value_that_cannot_be_right_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value!r} \(allowed: "):
        TrainConfig("photographs", **{field: value})


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(ValueError) as e:
        TrainConfig("photographs", model="huge", lr=-1e-3, batch_size=0)
    assert [part.split("=")[0] for part in str(e.value).split("; ")] == [
        "model",
        "batch_size",
        "lr",
    ]
    assert "thesis_m, small, tiny" in str(e.value) and "above 0" in str(e.value)


@pytest.mark.finding("training.md:15")
@pytest.mark.parametrize(
    "field, value",
    [("head", "three"), ("text", "flase"), ("encoder", "bert"), ("epochs", 0), ("flat", 2.0)],
)
def test_a_fusion_that_cannot_be_right_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value!r} "):
        FusionConfig("run", "photographs", **{field: value})


def test_values_at_the_edge_are_allowed(tmp_path):
    TrainConfig(Path("photographs"), flat=1.0, plain=0, clip=0, warmup=1, micro_batch=-1, lr=1)
    FusionConfig("run", "photographs", encoder=str(tmp_path), head="linear", text="none")


def test_the_choices_are_those_of_the_other_chapters():
    assert set(recipes.MODELS) == set(sizes.VARIANTS)
    assert set(recipes.BASELINES) == set(baselines.BACKBONES)
    assert recipes.TRAIN_RANGES["cache"] == data.CACHES
    assert set(recipes.HEAD_NAMES) == set(fusion.HEADS)
    assert set(recipes.TEXT_KINDS) == {*fusion.TEXTS, "none"}
    assert set(recipes.ENCODERS) == {*text.HUB, "minilm"}


def test_the_rate_rises_stays_and_falls():
    config = TrainConfig("photographs")
    factors = [lr_factor(config, f / 100) for f in range(1, 101)]
    assert factors[0] < 1
    assert factors[10] == factors[49] == 1
    assert abs(factors[-1] - config.lr_end) < 1e-9
    assert factors[50:] == sorted(factors[50:], reverse=True)


@pytest.mark.finding("training.md:12")
def test_a_rate_that_never_falls():
    "flat = 1 divided by zero at the last step of training."
    constant = Schedule(warmup=0.0, flat=1.0, lr_end=0.02)
    assert [lr_factor(constant, done) for done in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_a_recipe_of_iterations_is_warned_of():
    recipe = PUBLISHED["reference, COCO"]
    warm, ema = check_recipe(fractions_of(recipe, 715, init="coco"), 715)
    assert "90.9 of 102 epochs" in warm and "446%" in ema
    assert check_recipe(fractions_of(recipe, 118_287, init="coco"), 118_287) == []
    assert check_recipe(TrainConfig("photographs"), 715) == []
    (hot,) = check_recipe(fractions_of(PUBLISHED["thesis, second run"], 715, init="coco"), 715)
    assert "13 times" in hot
    with pytest.raises(ValueError, match="batch_size, epochs"):
        fractions_of(PUBLISHED["thesis, first run"], 715)


def test_the_second_run_ships_as_it_was():
    assert shipped_recipes() == ["thesis_phase2", "thesis_second_run"]
    shipped = load_recipe("thesis_second_run", data_dir="photographs")
    assert shipped == fractions_of(PUBLISHED["thesis, second run"], 715, "photographs", init="coco")
    phase2 = load_recipe("thesis_phase2", FusionConfig, run="run", data_dir="photographs")
    assert (phase2.head, phase2.encoder, phase2.epochs) == ("concat", "clip", 20)


def test_a_recipe_is_written_and_read(tmp_path):
    config = TrainConfig(tmp_path, lr=1e-3, mosaic=0.5, backbone_lr=0.1, runs_dir=str(tmp_path))
    write_recipe = page_module("03f_recipes").write_recipe
    path = write_recipe(tmp_path / "mine.yml", config, "one\ntwo")
    assert path.read_text().startswith("# one\n# two\n")
    assert load_recipe(path) == dataclasses.replace(config, data_dir=str(tmp_path))
    path.write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match="no field learning_rate"):
        load_recipe(path, data_dir="photographs")
    with pytest.raises(FileNotFoundError, match="thesis_second_run"):
        load_recipe("thesis")


def test_the_configuration_of_a_run_is_read_from_it(tmp_path):
    config = TrainConfig("photographs", lr=1e-3)
    Run(tmp_path).write("config.json", vars(config) | {"classes": ["a"], "family": "detector"})
    assert config_of(tmp_path, epochs=3) == dataclasses.replace(config, epochs=3)
