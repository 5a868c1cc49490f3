"""Baselines: right boxes and labels, empty photographs, an overfit handful, one judge for all."""

import dataclasses
import json

import pytest
import torch
from page_code import page_module

from deimv2_tfg import cli
from deimv2_tfg.baselines import (
    FASTER_RCNN,
    Baseline,
    build_baseline,
    load_baseline,
    save_baseline,
    torchvision_target,
)
from deimv2_tfg.core import open_study
from deimv2_tfg.data import load_dataset
from deimv2_tfg.evaluation import coco_metrics, evaluate
from deimv2_tfg.results import compare
from deimv2_tfg.runs import Run
from deimv2_tfg.training import find_run, phase1_config, train

page = page_module("06_baselines")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Baseline("resnet18", 3, 64).eval()


def test_targets_are_corner_pixels_with_labels_from_one():
    target = torchvision_target(
        {
            "boxes": torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.3, 0.3, 0.1, 0.0]]),
            "labels": torch.tensor([2, 0]),
        },
        (40, 80),
    )
    assert target["boxes"].tolist() == [[20, 0, 60, 20]] and target["labels"].tolist() == [3]
    empty = torchvision_target(
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, (40, 80)
    )
    assert empty["boxes"].shape == (0, 4) and len(empty["labels"]) == 0


def test_detections_are_in_pixels_of_the_original_with_labels_from_zero(model, monkeypatch):
    inside = [
        {
            "boxes": torch.tensor([[0.0, 0.0, 64.0, 64.0], [16.0, 32.0, 32.0, 64.0]]),
            "scores": torch.tensor([0.9, 0.1]),
            "labels": torch.tensor([1, 3]),
        }
    ]
    monkeypatch.setattr(model, "forward", lambda pixel_values: inside)
    (found,) = model.detections(torch.zeros(1, 3, 64, 64), torch.tensor([[100, 200]]))
    assert found["boxes"].tolist() == [[0, 0, 200, 100], [50, 50, 100, 100]] and found[
        "labels"
    ].tolist() == [0, 2]


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0"])
def test_photographs_without_a_box_train_as_well(backbone):
    model = Baseline(backbone, 3, 64).train()
    nothing, something = (
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), "labels": torch.tensor([2])},
    )
    for targets in ([nothing, nothing], [nothing, something]):
        losses = model(torch.randn(2, 3, 64, 64), targets)
        assert set(losses) == {
            "loss_classifier",
            "loss_box_reg",
            "loss_objectness",
            "loss_rpn_box_reg",
        } and all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pixels_are_not_normalised_or_resized_again(model):
    seen = []
    handle = model.detector.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    pixel_values = torch.randn(2, 3, 96, 64)
    model(pixel_values)
    handle.remove()
    assert seen[0] is pixel_values


def test_no_threshold_before_the_judge(model):
    with torch.no_grad():
        model.detector.roi_heads.box_predictor.cls_score.bias[0] += (
            6  # everything is background, almost
        )
    (found,) = model.detections(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    with torch.no_grad():
        model.detector.roi_heads.box_predictor.cls_score.bias[0] -= 6
    assert (
        found["scores"].max() < 0.05
        and len(found["scores"]) > 20
        and found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    )


def test_a_handful_is_learnt_by_heart(smoke_data):
    metrics = page.overfit("resnet18", load_dataset(smoke_data, "train"), 64, images=3, steps=36)
    assert metrics["AP50"] > 0.9


def test_kept_and_opened_again(model, tmp_path):
    save_baseline(model, tmp_path / "best", ["a", "b", "c"], image_size=64, epoch=3)
    again = load_baseline(tmp_path / "best")
    pixel_values, sizes = torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]])
    assert torch.equal(
        again.detections(pixel_values, sizes)[0]["boxes"],
        model.detections(pixel_values, sizes)[0]["boxes"],
    )
    assert again.classes == ["a", "b", "c"] and again.meta == {"image_size": 64, "epoch": 3}


def test_weights_from_a_file_load_whole_or_raise(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(1)
    file = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), file)
    config = page.baseline_config(open_study("smoke"), "resnet18", init=str(file))
    model = build_baseline(config, 3)
    stored = torch.load(file)["conv1.weight"]
    assert torch.equal(model.detector.backbone.body.conv1.weight, stored)
    with pytest.raises(ValueError, match="efficientnet_b0"):
        build_baseline(dataclasses.replace(config, model="efficientnet_b0"), 3)


@pytest.fixture(scope="module")
def config(smoke_data, tmp_path_factory):
    """A baseline of one epoch, in a directory of its own."""
    own = page.baseline_config(open_study("smoke"), "resnet18")
    runs_dir = str(tmp_path_factory.mktemp("baselines"))
    return dataclasses.replace(own, data_dir=str(smoke_data), runs_dir=runs_dir, epochs=1)


@pytest.fixture(scope="module")
def run(config):
    return train(config, FASTER_RCNN)


def test_the_same_trainer_finds_its_run_again(config, run):
    study = open_study("smoke")
    phase1 = dataclasses.asdict(phase1_config(study))
    own = dataclasses.asdict(page.baseline_config(study, "resnet18"))
    assert {k for k, v in own.items() if v != phase1[k]} == {"model", "lr", "clip", "backbone_lr"}
    assert run == find_run(config, FASTER_RCNN) == train(config, FASTER_RCNN)
    assert run.name.startswith("faster_rcnn-")


def test_a_finished_run_counts_whatever_code_trained_it(config, run):
    """It is found by what it was asked for and by its data, and not trained again."""

    def found(**changes):
        return page.finished_before(dataclasses.replace(config, **changes), FASTER_RCNN)

    assert found() == found(num_workers=1) == run
    older = run.rename(run.with_name("faster_rcnn-0123456789"))  # as if by other code
    assert found() == page.trained(config) == older
    assert found(seed=1) is None
    stored = {name: (older / name).read_text() for name in ("config.json", "env.json")}
    without = {k: v for k, v in Run(older).config.items() if k != "iou_crop"}
    Run(older).write("config.json", without)  # of before there was such a field
    assert found() == older
    Run(older).write("env.json", Run(older).environment | {"data_hash": "other"})
    assert found() is None
    for name, text in stored.items():
        (older / name).write_text(text)
    older.rename(run)


def test_the_same_judge(run, smoke_data, tmp_path, capsys):
    metrics = evaluate(run, smoke_data, "test")
    dataset = load_dataset(smoke_data, "test")
    results = json.loads((run / "predictions_test.json").read_text())
    assert coco_metrics(dataset.coco, results) == pytest.approx(metrics, nan_ok=True)
    assert {r["category_id"] for r in results} <= set(dataset.category_ids)
    table = compare([run], draws=20)
    assert table["model"][0].startswith("Faster R-CNN resnet18") and table["seeds"][0] == 1
    photographs = str(smoke_data / "test" / "images")
    asked = ["predict", str(run), photographs, "--out", str(tmp_path / "out"), "--no-pictures"]
    assert cli.main(asked) == 0
    assert cli.main(["export", str(run)]) == 2 and "only DEIMv2" in capsys.readouterr().err


def test_other_sizes_take_smaller_batches(smoke_data):
    study = open_study("smoke")
    larger = page.baseline_config(study, "resnet18", image_size=128)
    assert larger.batch_size < page.baseline_config(study, "resnet18").batch_size
    assert page.native_size(load_dataset(smoke_data, "train")) == 64
