"""Pre-training without labels: which photographs it sees, what it writes, and how it resumes."""

import dataclasses
import shutil

import pytest
import torch
from page_code import page_module
from PIL import Image

from deimv2_tfg import data
from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Run, load_state
from deimv2_tfg.weights import init_weights

p = page_module("09_pretraining")


def config(photographs, runs, **changes):
    short = {"epochs": 4, "batch_size": 6, "lr": 2e-3} | changes
    return p.PretrainConfig((str(photographs),), str(runs), "tiny", 64, **short)


def test_photographs_of_the_test_are_not_seen(smoke_data, tmp_path):
    files = p.unlabelled(smoke_data)
    assert len(files) == 12 + 6 and {f.parent.parent.name for f in files} == {"train", "val"}
    with pytest.raises(FileNotFoundError):
        p.unlabelled(tmp_path)
    shutil.copy(files[0], tmp_path / "one.png")
    assert [f.name for f in p.unlabelled(tmp_path)] == ["one.png"]


def test_an_interruption_makes_no_difference(smoke_data, tmp_path, monkeypatch):
    whole = p.pretrain(config(smoke_data, tmp_path / "whole"))
    one = p.pretrain_epoch
    calls = []

    def cut(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return one(*args)

    with monkeypatch.context() as patched:
        patched.setattr(p, "pretrain_epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            p.pretrain(config(smoke_data, tmp_path / "cut"))
    again = p.pretrain(config(smoke_data, tmp_path / "cut"))
    assert again.name == whole.name and load_state(again)["epoch"] == 4
    for file in ("vit.pt", "vit_start.pt"):
        a, b = (torch.load(run / file, weights_only=True) for run in (whole, again))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert Run(again).result["images_seen"] == 4 * 18


def test_workers_make_no_difference_and_decode_once(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    read = data.read_photograph

    def noted(source, *rest):
        with (tmp_path / "reads").open("a") as file:
            file.write(f"{source}\n")
        return read(source, *rest)

    monkeypatch.setattr(data, "read_photograph", noted)
    weights = []
    for workers in (0, 2):
        (tmp_path / "reads").write_text("")
        run = p.pretrain(config(smoke_data, tmp_path / f"{workers}", num_workers=workers))
        weights.append(torch.load(run / "vit.pt", weights_only=True))
        assert len((tmp_path / "reads").read_text().split()) == 18
    alone, with_workers = weights
    assert all(torch.equal(alone[k], with_workers[k]) for k in alone)


def test_what_it_wrote_is_a_start_for_the_detector(smoke_data, tmp_path):
    run = p.pretrain(config(smoke_data, tmp_path, epochs=1))
    states = []
    for file in ("vit.pt", "vit_start.pt"):
        torch.manual_seed(0)
        model = build_detector(DetectorConfig.tiny())
        vit = model.model.conv_encoder.backbone
        assert init_weights(model, str(run / file)).loaded == len(vit.state_dict())
        states.append(model.state_dict())
    a, b = states
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert different and all(".conv_encoder.backbone." in k for k in different)


def test_the_arms_differ_in_the_first_weights_only(tmp_path):
    arms = p.arm_configs(TrainConfig("data"), tmp_path, (0, 1))
    assert [len(configs) for configs in arms.values()] == [2, 2]
    configs = [c for group in arms.values() for c in group]
    assert len({dataclasses.replace(c, init="", seed=0) for c in configs}) == 1
    assert len({c.init for c in configs}) == 2


def test_a_loss_that_is_not_finite_ends_it(smoke_data, tmp_path, monkeypatch):
    def not_finite(self, pixel_values, mask):
        return self.to_pixels.weight.sum() * float("nan")

    monkeypatch.setattr(p.MaskedViT, "forward", not_finite)
    with pytest.raises(FloatingPointError, match="epoch 1"):
        p.pretrain(config(smoke_data, tmp_path))


def test_copies_of_the_judged_test_are_left_out_whatever_their_name(smoke_data, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    test = sorted((smoke_data / "test" / "images").iterdir())
    with Image.open(test[0]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(more / "mirrored.png")
    shutil.copy(test[1], more / "renamed.png")
    shutil.copy(p.unlabelled(smoke_data)[0], more / "of_train.png")
    assert [f.name for f in p.without_copies(p.unlabelled(more), test)] == ["of_train.png"]
    one = config(smoke_data, tmp_path, epochs=1)
    sources = (str(smoke_data), str(more))
    run = p.pretrain(dataclasses.replace(one, sources=sources, judged=str(smoke_data)))
    told = Run(run).config
    assert told["photographs"] + told["left_out"] == 18 + 3 and told["left_out"] >= 2
