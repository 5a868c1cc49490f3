"""The trainer: a run is found again, goes on after a cut as if nothing had happened, and never takes a bad step."""
import dataclasses
import json

import pytest
import torch

from deimv2_tfg import training
from deimv2_tfg.data import DatasetError
from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.evaluation import evaluate
from deimv2_tfg.training import TrainConfig, find_run, load_state, lr_factor, parameter_groups, train


@pytest.fixture
def config(smoke_data, tmp_path):
    return TrainConfig(str(smoke_data), str(tmp_path), model="tiny", image_size=64, epochs=2, batch_size=4, lr=1e-3)


def test_a_run_holds_what_is_promised_and_is_found_again(config):
    run = train(config)
    assert {"config.json", "env.json", "metrics.jsonl", "tensorboard", "predictions_val.json", "best", "last", "result.json"} <= {p.name for p in run.iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(l["split"], l["epoch"]) for l in lines] == [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    assert {"commit", "dirty", "versions", "device", "seed", "data_hash", "code_hash"} <= json.loads((run / "env.json").read_text()).keys()
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
        if trainer.epoch == 1: raise KeyboardInterrupt
        return ordinary(trainer, stop)
    monkeypatch.setattr(training, "train_epoch", power_failure)
    with pytest.raises(KeyboardInterrupt): train(cut)
    monkeypatch.setattr(training, "train_epoch", ordinary)
    torch.manual_seed(12345)
    resumed = load_state(train(cut))
    assert all(torch.equal(a, b) for a, b in zip(whole["model"].values(), resumed["model"].values()))
    assert all(torch.equal(a, b) for a, b in zip(whole["average"].values(), resumed["average"].values()))


def test_a_bad_data_dir_stops_before_anything_is_written(config, tmp_path):
    with pytest.raises(DatasetError, match="Expected layout"):
        train(dataclasses.replace(config, data_dir=str(tmp_path / "nowhere")))
    assert not any(tmp_path.iterdir())


def test_the_rate_rises_stays_and_falls(config):
    factors = [lr_factor(config, f / 100) for f in range(1, 101)]
    assert factors[0] < 1 and factors[10] == factors[49] == 1 and abs(factors[-1] - config.lr_end) < 1e-9
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_few_groups_and_no_decay_on_vectors(config):
    model = build_detector(DetectorConfig.tiny(num_classes=6))
    groups = parameter_groups(model, dataclasses.replace(config, backbone_lr=.05))
    assert len(groups) <= 4 and len({g["lr"] for g in groups}) == 2
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])
