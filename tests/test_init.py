"""Where training starts: random weights, another detector, a bare ViT; each told in the run."""

import dataclasses
import json

import pytest
import torch

from deimv2_tfg.cli import main
from deimv2_tfg.detector import DetectorConfig, build_detector, load_detector, save_detector
from deimv2_tfg.optim import parameter_groups
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.training import find_run, train
from deimv2_tfg.weights import WeightsError, init_weights


@pytest.fixture
def config(smoke_data, tmp_path):
    return TrainConfig(
        str(smoke_data),
        str(tmp_path / "runs"),
        model="tiny",
        image_size=64,
        epochs=1,
        batch_size=4,
        lr=1e-60,  # of no effect on a float32
        ema=0.0,
    )


@pytest.fixture
def elsewhere(tmp_path):
    "A detector of two classes, as another project might have left it."
    torch.manual_seed(7)
    return save_detector(
        build_detector(DetectorConfig.tiny(num_classes=2)),
        tmp_path / "elsewhere",
        classes=["a", "b"],
    )


def test_a_run_goes_on_from_the_weights_it_was_given(config, elsewhere):
    run = train(dataclasses.replace(config, init=str(elsewhere)))
    start = json.loads((run / "env.json").read_text())["start"]
    assert start["taken"] == "model.safetensors" and len(start["reinitialised"]) == 7
    given, kept = load_detector(elsewhere).state_dict(), load_detector(run / "best").state_dict()
    weights = [
        k
        for k in given
        if k not in start["reinitialised"] and "running" not in k and "num_batches" not in k
    ]
    assert len(weights) > 100 and all(torch.equal(given[k], kept[k]) for k in weights)
    assert (
        json.loads((train(config) / "env.json").read_text())["start"]["taken"] == "random weights"
    )


def test_what_was_trained_before_moves_slowly_unless_told(config):
    model = build_detector(DetectorConfig.tiny())

    def rates(**kw):
        groups = parameter_groups(model, dataclasses.replace(config, lr=1.0, lr_rule="none", **kw))
        return {group["lr"] for group in groups}

    assert rates() == {1.0}
    assert rates(init="dinov3") == {1.0, 0.05}
    assert rates(init="coco", backbone_lr=1.0) == {1.0}


def test_other_first_weights_are_another_run(config, elsewhere, tmp_path):
    file = tmp_path / "weights.pth"
    names = [find_run(config), find_run(dataclasses.replace(config, init=str(elsewhere)))]
    for value in (0.0, 1.0):
        torch.save({"w": torch.full((1,), value)}, file)
        names.append(find_run(dataclasses.replace(config, init=str(file))))
    assert len(set(names)) == 4
    other = tmp_path / "renamed.pth"
    file.rename(other)
    assert find_run(dataclasses.replace(config, init=str(other))) == names[-1]


@pytest.mark.parametrize(
    "init, file", [("coco", "deimv2_dinov3_s_coco.pth"), ("dinov3", "vitt_distill.pt")]
)
def test_published_weights_are_known_by_content(config, monkeypatch, tmp_path, init, file):
    monkeypatch.setenv("DEIMV2_TFG_WEIGHTS", str(tmp_path))
    asked = dataclasses.replace(config, model="s", init=init)
    names = []
    for content in (b"weights", b"later weights", b"weights"):
        (tmp_path / file).write_bytes(content)
        names.append(find_run(asked))
    assert names[0] == names[2] != names[1]
    assert names[0] == find_run(dataclasses.replace(asked, init=str(tmp_path / file)))


def test_cached_files_of_the_hub_are_known_by_their_content(config, monkeypatch, tmp_path):
    file = tmp_path / "model.safetensors"
    monkeypatch.setattr("deimv2_tfg.weights.cached_file", lambda repository, name: str(file))
    names = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        names += [find_run(dataclasses.replace(config, init="owner/name")), find_run(config)]
    assert names[0] != names[2] and names[1] == names[3]


def test_weights_that_are_not_there_stop_with_what_to_do(config, monkeypatch, tmp_path):
    monkeypatch.setenv("DEIMV2_TFG_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="nothing was published for the configuration 'tiny'"):
        train(dataclasses.replace(config, init="coco"))
    assert not list((tmp_path / "runs").rglob("env.json"))


def test_the_command_line_knows_numbers_that_may_be_absent(monkeypatch):
    seen = []
    monkeypatch.setattr("deimv2_tfg.training.train", lambda config, family: seen.append(config))
    words = ["--backbone_lr", "0.1", "--init", "coco", "--epochs", "3"]
    assert main(["train", "photographs", *words]) == 0
    assert main(["train", "photographs"]) == 0
    given = TrainConfig("photographs", backbone_lr=0.1, init="coco", epochs=3)
    assert seen == [given, TrainConfig("photographs")]


def test_inference_mode_leaves_nothing_that_training_trips_over():
    model, x = build_detector(DetectorConfig.tiny()), torch.randn(1, 3, 96, 32)
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).logits.sum().backward()


@pytest.mark.finding("training.md:3")
@pytest.mark.parametrize("there", ["backwards", "others", "fewer"])
def test_rows_of_the_class_heads_go_by_name(tmp_path, there):
    classes = ["dent", "hole", "crack"]
    names = {"backwards": classes[::-1], "others": ["x", "y", "z"], "fewer": ["hole", "x"]}[there]
    torch.manual_seed(7)
    given = build_detector(DetectorConfig.tiny(num_classes=len(names)))
    save_detector(given, tmp_path / "given", classes=names)
    model = build_detector(DetectorConfig.tiny(num_classes=3))
    report = init_weights(model, str(tmp_path / "given"), classes=classes)
    shared = [name for name in classes if name in names]
    assert report.classes == tuple(shared) and len(report.reinitialised) == 7
    old, new = given.state_dict(), model.state_dict()
    for head in report.reinitialised:
        for k, name in enumerate(classes):
            same = name in names and torch.equal(new[head][k], old[head][names.index(name)])
            assert same == (name in names) or head.endswith("bias")
    again = init_weights(model, str(tmp_path / "given"), classes=names)
    assert again.reinitialised == () if len(names) == 3 else again.reinitialised


@pytest.mark.finding("training.md:28")
def test_a_run_stands_for_its_best_weights(tmp_path, monkeypatch):
    model = build_detector(DetectorConfig.tiny(num_classes=2))
    best = save_detector(model, tmp_path / "run" / "best", classes=["a", "b"])
    for init in (tmp_path / "run", best, best / "model.safetensors"):
        assert init_weights(model, str(init)).loaded == len(model.state_dict())

    def no_network(repository, name):
        raise OSError("no network")

    monkeypatch.setattr("deimv2_tfg.weights.cached_file", no_network)
    with pytest.raises(WeightsError, match="no such run or file here"):
        init_weights(model, "runs/typo")
