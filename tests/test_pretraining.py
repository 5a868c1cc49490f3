"""Pre-training without labels: which photographs it sees, what it writes, and that a cut makes no difference."""

import dataclasses
import shutil

import pytest
import torch

from deimv2_tfg import pretraining as p
from deimv2_tfg.core import read_json
from deimv2_tfg.detector import DetectorConfig, build_detector, init_weights
from deimv2_tfg.runs import load_state


def config(data, runs, **changes):
    return p.PretrainConfig(
        (str(data),), str(runs), "tiny", 64, **{"epochs": 4, "batch_size": 6, "lr": 2e-3} | changes
    )


def test_photographs_of_the_test_are_not_seen(smoke_data, tmp_path):
    files = p.unlabelled(smoke_data)
    assert len(files) == 12 + 6 and {f.parent.parent.name for f in files} == {"train", "val"}
    with pytest.raises(FileNotFoundError):
        p.unlabelled(tmp_path)
    shutil.copy(files[0], tmp_path / "one.png")
    assert [f.name for f in p.unlabelled(tmp_path)] == ["one.png"]


def test_a_cut_makes_no_difference(smoke_data, tmp_path, monkeypatch):
    whole, calls, one = p.pretrain(config(smoke_data, tmp_path / "whole")), [], p.pretrain_epoch

    def cut(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(p, "pretrain_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        p.pretrain(config(smoke_data, tmp_path / "cut"))
    monkeypatch.setattr(p, "pretrain_epoch", one)
    again = p.pretrain(config(smoke_data, tmp_path / "cut"))
    assert again.name == whole.name and load_state(again)["epoch"] == 4
    for file in ("vit.pt", "vit_start.pt"):
        a, b = (torch.load(r / file, weights_only=True) for r in (whole, again))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert read_json(again / "result.json")["images_seen"] == 4 * 18


def test_what_it_wrote_is_a_start_for_the_detector(smoke_data, tmp_path):
    run = p.pretrain(config(smoke_data, tmp_path, epochs=1))
    models = {}
    for file in ("vit.pt", "vit_start.pt"):
        torch.manual_seed(0)
        models[file] = build_detector(DetectorConfig.tiny())
        assert init_weights(models[file], str(run / file)).loaded == len(
            models[file].model.conv_encoder.backbone.state_dict()
        )
    a, b = (m.state_dict() for m in models.values())
    different = {k for k in a if not torch.equal(a[k], b[k])}
    assert different and all(".conv_encoder.backbone." in k for k in different), (
        "the arms differ in the ViT only"
    )
    arms = p.arm_configs(p.TrainConfig("data"), run, (0, 1))
    assert [len(c) for c in arms.values()] == [2, 2] and len(
        {dataclasses.replace(c, init="", seed=0) for cs in arms.values() for c in cs}
    ) == 1


def test_a_loss_that_is_not_finite_ends_it(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setattr(p.MaskedViT, "forward", lambda self, x, mask: x.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        p.pretrain(config(smoke_data, tmp_path))


def test_copies_of_the_judged_test_are_left_out_whatever_their_name(smoke_data, tmp_path):
    from PIL import Image

    more, test = tmp_path / "more", sorted((smoke_data / "test" / "images").iterdir())
    more.mkdir()
    with Image.open(test[0]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(more / "mirrored.png")
    shutil.copy(test[1], more / "renamed.png")
    shutil.copy(p.unlabelled(smoke_data)[0], more / "of_train.png")
    assert [f.name for f in p.without_copies(p.unlabelled(more), test)] == ["of_train.png"]
    run = p.pretrain(
        dataclasses.replace(
            config(smoke_data, tmp_path, epochs=1),
            sources=(str(smoke_data), str(more)),
            judged=str(smoke_data),
        )
    )
    told = read_json(run / "config.json")
    assert told["photographs"] + told["left_out"] == 18 + 3 and told["left_out"] >= 2
