"""The trainer: a run is found again, goes on after a cut as if nothing had happened, and never takes a bad step."""

import dataclasses
import json

import accelerate
import pytest
import torch

from deimv2_tfg import training
from deimv2_tfg.data import DatasetError
from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.evaluation import evaluate
from deimv2_tfg.recipes import RECIPES, TrainConfig, check_recipe, fractions_of, lr_factor
from deimv2_tfg.runs import load_state
from deimv2_tfg.training import find_run, parameter_groups, train


@pytest.fixture
def config(smoke_data, tmp_path):
    return TrainConfig(
        str(smoke_data), str(tmp_path), model="tiny", image_size=64, epochs=2, batch_size=4, lr=1e-3
    )


def test_a_run_holds_what_is_promised_and_is_found_again(config):
    run = train(config)
    assert {
        "config.json",
        "env.json",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "predictions_val.json",
        "best",
        "last",
        "result.json",
    } <= {p.name for p in run.iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(l["split"], l["epoch"]) for l in lines] == [
        ("train", 1),
        ("val", 1),
        ("train", 2),
        ("val", 2),
    ]
    assert {
        "commit",
        "dirty",
        "versions",
        "device",
        "seed",
        "data_hash",
        "code_hash",
    } <= json.loads((run / "env.json").read_text()).keys()
    before = (run / "result.json").read_bytes()
    assert train(config) == run and (run / "result.json").read_bytes() == before
    assert 0 <= evaluate(run, config.data_dir, "test")["AP50"] <= 1


def test_another_question_is_another_run(config):
    assert find_run(config) == find_run(dataclasses.replace(config, num_workers=2))
    assert find_run(config) != find_run(dataclasses.replace(config, lr=2e-3))


def test_a_run_that_was_cut_off_ends_in_the_same_weights(config, tmp_path, monkeypatch):
    whole = load_state(train(config))
    cut = dataclasses.replace(config, runs_dir=str(tmp_path / "cut"))
    ordinary = training.train_epoch

    def power_failure(trainer, stop):
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        return ordinary(trainer, stop)

    monkeypatch.setattr(training, "train_epoch", power_failure)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(training, "train_epoch", ordinary)
    torch.manual_seed(12345)
    resumed = load_state(train(cut))
    assert all(
        torch.equal(a, b) for a, b in zip(whole["model"].values(), resumed["model"].values())
    )
    assert all(torch.equal(a, b) for a, b in zip(whole["ema"].values(), resumed["ema"].values()))


def test_a_bad_data_dir_stops_before_anything_is_written(config, tmp_path):
    with pytest.raises(DatasetError, match="Expected layout"):
        train(dataclasses.replace(config, data_dir=str(tmp_path / "nowhere")))
    assert not any(tmp_path.iterdir())


def test_the_rate_rises_stays_and_falls(config):
    factors = [lr_factor(config, f / 100) for f in range(1, 101)]
    assert (
        factors[0] < 1
        and factors[10] == factors[49] == 1
        and abs(factors[-1] - config.lr_end) < 1e-9
    )
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_few_groups_and_no_decay_on_vectors(config):
    model = build_detector(DetectorConfig.tiny(num_classes=6))
    groups = parameter_groups(model, dataclasses.replace(config, backbone_lr=0.05))
    assert len(groups) <= 4 and len({g["lr"] for g in groups}) == 2
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_a_batch_in_parts_takes_as_many_steps(config):
    run = train(dataclasses.replace(config, micro_batch=2, epochs=1))
    assert (
        json.loads((run / "result.json").read_text())["steps"] == 3
        and load_state(run)["counters"]["micro"] == 2
    )


def test_training_ends_when_nothing_gets_better(config):
    run = train(dataclasses.replace(config, patience=1, epochs=6))
    result = json.loads((run / "result.json").read_text())
    assert result["epochs"] < 6 and load_state(run)["counters"]["since_best"] == 1


def test_all_augmentation_at_once_with_recomputed_activations(config):
    run = train(
        dataclasses.replace(
            config,
            mosaic=0.5,
            mixup=0.5,
            copy_blend=0.5,
            quarter_turns=0.5,
            multi_scale=0.5,
            checkpointing=True,
            micro_batch=-1,
        )
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(
        l["train/skipped"] == 0 and l["train/grad_norm/max"] >= l["train/grad_norm/q50"] > 0
        for l in lines
        if l["split"] == "train"
    )
    assert 0 <= evaluate(run, config.data_dir, "test")["AP50"] <= 1


def test_a_recipe_of_iterations_is_warned_of(config):
    recipe = RECIPES["reference, COCO"]
    warm, average = check_recipe(fractions_of(recipe, 715, init="coco"), 715)
    assert "90.9 of 102 epochs" in warm and "446%" in average
    assert (
        check_recipe(fractions_of(recipe, 118_287, init="coco"), 118_287)
        == []
        == check_recipe(config, 715)
    )
    (hot,) = check_recipe(fractions_of(RECIPES["thesis, second run"], 715, init="coco"), 715)
    assert "13 times" in hot
    with pytest.raises(ValueError, match="batch_size, epochs"):
        fractions_of(RECIPES["thesis, first run"], 715)


@pytest.mark.parametrize("family", ["detector", "faster_rcnn"])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(family):
    "Of what the family's own count divides; parts of one and three photographs, with unlike numbers of boxes."
    from deimv2_tfg.baselines import FASTER_RCNN
    from deimv2_tfg.training import DEIMV2, count_boxes, make_ema, shares_of, training_step

    def toy(model, x, targets, epoch):
        return {
            "toy": sum(
                (model(photograph.mean((1, 2))) ** 2).sum() * max(1, len(t["labels"]))
                for photograph, t in zip(x, targets)
            )
            / size(targets)
        }

    kind = DEIMV2 if family == "detector" else FASTER_RCNN
    size = kind.size
    assert size is (count_boxes if family == "detector" else len)
    targets, x = (
        [{"labels": torch.zeros(n), "image_id": n} for n in (1, 7, 2, 3)],
        torch.rand(4, 3, 8, 8),
    )
    model = torch.nn.Linear(3, 2)

    def gradient(parts, size):
        training_step(
            model,
            toy,
            parts,
            torch.optim.SGD(model.parameters(), 0.0),
            make_ema(model, 10),
            accelerate.Accelerator(cpu=True),
            0,
            0,
            size,
        )
        return model.weight.grad.clone()

    parts = [(x[:1], targets[:1]), (x[1:], targets[1:])]
    torch.testing.assert_close(gradient(parts, size), gradient([(x, targets)], size))
    assert shares_of(parts, size) == (
        [1 / 13, 12 / 13] if family == "detector" else [1 / 4, 3 / 4]
    ) and shares_of(parts[:1], size) == [1.0]
    assert not torch.allclose(gradient(parts, lambda t: 1), gradient([(x, targets)], size))


def test_class_terms_of_a_detector_in_parts(smoke_data):
    from deimv2_tfg.batches import augmented, epoch_batches
    from deimv2_tfg.data import load_dataset
    from deimv2_tfg.recipes import TrainConfig
    from deimv2_tfg.training import DEIMV2, count_boxes, make_ema, training_step

    config = TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=6, clip=0)
    x, targets = next(
        iter(epoch_batches(augmented(load_dataset(config.data_dir, "train"), config), config, 0))
    )
    model, losses = DEIMV2.build(config, 6).train(), DEIMV2.losses(config, 6)
    model.config.num_denoising = 0
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    assert len({len(t["labels"]) for t in targets}) > 1

    def gradient(cuts):
        parts = [(x[a:b], targets[a:b]) for a, b in zip(cuts, cuts[1:])]
        step = training_step(
            model,
            lambda *a: {k: v for k, v in losses(*a).items() if "mal" in k},
            parts,
            torch.optim.SGD(model.parameters(), 0.0),
            make_ema(model, 10),
            accelerate.Accelerator(cpu=True),
            0,
            0,
            count_boxes,
        )
        return torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        ), step.losses

    (whole, terms), (parted, same) = gradient([0, 6]), gradient([0, 1, 3, 6])
    assert (whole - parted).norm() < 1e-4 * whole.norm()
    for name, value in terms.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6)
