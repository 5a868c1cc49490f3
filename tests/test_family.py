"""The rest of DEIMv2's family: the reference's numbers, weights in the original format, export."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_criterion import assert_terms, load_reference, small_case
from test_detector import noise, set_distance

from deimv2_tfg.criterion import build_criterion
from deimv2_tfg.deployment import export_onnx
from deimv2_tfg.detector import (
    Detector,
    DetectorConfig,
    build_detector,
    convert_weights,
    count_parameters,
    library_config,
    load_detector,
    load_original_weights,
    save_detector,
)
from deimv2_tfg.evaluation import takes_plain_input
from deimv2_tfg.recipes import (
    MODELS,
    PLAIN_INPUT,
    check_recipe,
    fractions_of,
    published_recipes,
)
from deimv2_tfg.transforms import to_pixel_values
from deimv2_tfg.weights import PUBLISHED_DETECTORS, WeightsError, init_weights, stored_blocks

VECTORS = Path(__file__).parent / "vectors" / "family.npz"
COUNTS = {
    "atto": 485_009,
    "femto": 948_129,
    "pico": 1_497_803,
    "n": 3_552_765,
    "s": 9_694_220,
    "m": 18_243_716,
    "l": 32_451_388,
    "x": 51_059_666,
}


def filled(key, shape, fill, mean, std, stored):
    "A tensor of the reference's network, from the rule that it was drawn by."
    if fill == "stored":
        shared = re.sub(r"dec_bbox_head\.\d", "dec_bbox_head.0", key)
        return np.array(next((stored[k] for k in (key, shared) if k in stored), 0))
    if fill == "anchors":
        return np.zeros(shape)
    drawn = noise(key, shape)
    return mean + std * (np.abs(drawn) if fill == "abs_normal" else drawn)


@pytest.fixture(scope="module", params=["atto", "n", "l"])
def reference(request):
    "Name, facts, state in the original names and expected rows of a network of the reference."
    arrays = np.load(VECTORS)
    start = f"{request.param}/stored/"
    stored = {k.removeprefix(start): arrays[k] for k in arrays.files if k.startswith(start)}
    facts = json.loads(arrays[f"{request.param}/spec"].tobytes())
    state = {}
    for key, *rule in facts["params"]:
        value = filled(key, *rule, stored)
        state[key] = torch.from_numpy(value if rule[1] == "stored" else value.astype(np.float32))
    return request.param, facts, state, arrays[f"{request.param}/expected"]


def test_the_forward_pass_is_the_references(reference):
    name, facts, state, expected = reference
    model = build_detector(getattr(DetectorConfig, name)()).eval()
    report = load_original_weights(model, state)
    assert report.loaded == len(model.state_dict())
    assert set(report.ignored) == {"decoder.anchors", "decoder.valid_mask"}
    side = facts["image_size"]
    drawn = np.random.RandomState(facts["image_seed"]).standard_normal((1, 3, side, side))
    with torch.no_grad():
        output = model(torch.from_numpy(drawn.astype(np.float32)))
    rows = torch.cat([output.logits[0], output.pred_boxes[0]], 1).numpy()
    assert set_distance(rows, expected) < 1e-4


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameters_are_counted_as_the_reference_does(name, count):
    config = getattr(DetectorConfig, name)()
    with torch.device("meta"):
        assert count_parameters(Detector(library_config(config))) == count
    assert config.variant == name


def test_a_tensor_too_few_or_a_copy_that_differs_is_refused(reference):
    name, _, state, _ = reference
    model = build_detector(getattr(DetectorConfig, name)())
    gone = next(key for key in state if key.startswith("backbone"))
    with pytest.raises(WeightsError, match=r"missing \(1\)"):
        load_original_weights(model, {k: v for k, v in state.items() if k != gone})
    if name == "atto":
        other = {"decoder.dec_bbox_head.1.layers.0.bias": torch.zeros(64)}
        with pytest.raises(WeightsError, match=r"shared by several layers, but not the same \(1\)"):
            load_original_weights(model, state | other)
    if name == "l":
        mask = "backbone.dinov3.blocks.3.attn.qkv.bias_mask"
        with pytest.raises(WeightsError, match=mask):
            load_original_weights(model, state | {mask: torch.full((1152,), torch.nan)})


@pytest.mark.parametrize("name", ["pico", "n"])
def test_save_and_load(tmp_path, name):
    model = build_detector(getattr(DetectorConfig, name)(num_classes=3)).eval()
    again = load_detector(save_detector(model, tmp_path / "best"))
    pixel_values = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, again(pixel_values).logits)
    assert count_parameters(again) == count_parameters(model)


TARGETS = [
    {"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2)},
    {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


@pytest.mark.parametrize("name", ["atto", "n", "l"])
def test_every_trained_parameter_has_a_gradient(name):
    torch.manual_seed(0)
    model = build_detector(getattr(DetectorConfig, name)())
    output = model(torch.randn(2, 3, 64, 64), TARGETS)
    terms = [v.sum() for v in output.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    sum(terms).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(still) == (2 + 1 + 12 if name == "l" else 2)


@pytest.mark.parametrize("name, epoch", [("pico", 0), ("pico", 460), ("n", 0), ("n", 140)])
def test_every_term_is_the_references(name, epoch):
    outputs, targets, meta = load_reference(f"criterion_{name}_a")
    change = {"pico": 450, "n": 136}[name]
    criterion = build_criterion(getattr(DetectorConfig, name)(), change_epoch=change)
    losses = criterion(outputs, targets, epoch)
    assert len(losses) == {"pico": 27, "n": 37}[name]
    assert_terms(losses, meta["losses"][f"epoch_{epoch}"], tolerance=1e-5)


def test_own_matches_and_no_distributions():
    """Numbers of this code when it agreed with the reference; no local term in any head."""
    outputs, targets = small_case()
    criterion = build_criterion(DetectorConfig.atto(num_classes=3), change_epoch=100)
    frozen = json.loads((VECTORS.parent / "criterion_own.json").read_text())
    assert len(frozen["epoch_0"]) == 27
    for epoch in (0, 100):
        assert_terms(criterion(outputs, targets, epoch), frozen[f"epoch_{epoch}"])


def test_without_a_target_boxes_cost_nothing():
    outputs, targets = small_case()
    empty = [dict(t, labels=t["labels"][:0], boxes=t["boxes"][:0]) for t in targets]
    plain = {k: v for k, v in outputs.items() if not k.startswith("dn_")}
    losses = build_criterion(DetectorConfig.pico(num_classes=3))(plain, empty)
    assert len(losses) == 15 and losses["loss_bbox_aux_0"] == 0 and losses["loss_mal"] > 0


def test_networks_of_convolutions_take_photographs_as_they_are():
    white = Image.new("RGB", (40, 30), "white")
    assert to_pixel_values(64, plain=True)(white).unique().tolist() == [1]
    assert to_pixel_values(64)(white).min() > 2
    for name in MODELS:
        with torch.device("meta"):
            model = Detector(library_config(DetectorConfig.named(name)))
        assert takes_plain_input(torch.nn.Sequential(model)) == (name in PLAIN_INPUT)


def test_a_file_that_keeps_shared_tensors_once_is_read(tmp_path, reference):
    """So does safetensors, and with it the hub."""
    name, _, state, expected = reference
    if name != "atto":
        pytest.skip("nothing is shared in this network")
    once = {k: v for k, v in state.items() if not re.search(r"dec_bbox_head\.[12]", k)}
    del once["decoder.decoder.up"], once["decoder.decoder.reg_scale"]
    save_file({k: v.contiguous() for k, v in once.items()}, tmp_path / "model.safetensors")
    report = convert_weights(tmp_path / "model.safetensors", tmp_path / "atto", "atto")
    again = load_detector(tmp_path / "atto")
    assert report.loaded == len(again.state_dict())
    ours = again.model.decoder.bbox_embed[2].layers[0].weight
    assert torch.equal(ours, state["decoder.dec_bbox_head.0.layers.0.weight"])


def test_every_network_has_a_published_file():
    assert list(PUBLISHED_DETECTORS) == list(COUNTS)
    hub = {repository for _, repository in PUBLISHED_DETECTORS.values()}
    assert "Intellindust/DEIMv2_HGNetv2_N_COCO" in hub and len(hub) == len(COUNTS)


def test_the_blocks_of_a_hubs_configuration_are_taken_or_refused(tmp_path):
    config = DetectorConfig.tiny(num_classes=2, features=(0, 1, 2), vit_depth=4)
    save_detector(build_detector(config), tmp_path / "own")
    other = build_detector(DetectorConfig.tiny(num_classes=2, features=(0, 1, 3), vit_depth=4))
    with pytest.raises(WeightsError, match=r"features=\(0, 1, 2\)"):
        init_weights(other, tmp_path / "own")
    named = {"DINOv3STAs": {"name": "vit_tiny", "interaction_indexes": [5, 8, 11]}}
    (tmp_path / "config.json").write_text(json.dumps(named))
    heads = {"decoder.enc_score_head.bias": torch.zeros(2)}
    save_file(heads, tmp_path / "model.safetensors")
    assert stored_blocks(tmp_path / "model.safetensors") == (5, 8, 11)
    model = build_detector(DetectorConfig.s(num_classes=2))
    with pytest.raises(WeightsError, match=r"maps after blocks \(5, 8, 11\), this network after"):
        load_original_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match="missing"
    ):  # the blocks are taken, tensors are not there
        convert_weights(tmp_path / "model.safetensors", tmp_path / "s", "s")


def test_a_backbone_alone_is_read(reference):
    """B0 whole into N, and what a smaller network has alike."""
    name, _, state, _ = reference
    if name != "n":
        pytest.skip("one file serves all")
    start = "backbone."
    alone = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    unlike = {"n": 0, "atto": 3 + 2 * 5}  # kernels; the last two convolutions with batch norms
    for name, count in unlike.items():
        model = build_detector(getattr(DetectorConfig, name)())
        backbone = model.model.conv_encoder.backbone
        report = load_original_weights(model, alone)
        assert report.loaded == len(backbone.state_dict()) - count
        assert len(report.ignored) == len(alone) - report.loaded
        stem = backbone.embedder.stem1.convolution.weight
        assert torch.equal(stem, state["backbone.stem.stem1.conv.weight"])


@pytest.mark.parametrize(
    "name, rate, backbone, flat, plain, change",
    [
        ("atto", 2e-3, 0.5, 0.5, 0.2, 0.9),
        ("femto", 1.6e-3, 0.5, 0.5, 0.2, 0.9),
        ("pico", 1.6e-3, 0.5, 0.5, 0.2, 0.9),
        ("n", 8e-4, 0.5, 1.0, 12 / 160, 0.85),
        ("l", 5e-4, 0.025, 0.5, 8 / 68, 50 / 68),
        ("x", 5e-4, 0.02, 0.5, 8 / 58, 45 / 58),
    ],
)
def test_the_recipe_of_a_network_in_fractions(name, rate, backbone, flat, plain, change):
    config = fractions_of(published_recipes()[f"{name}, COCO"], 118_287)
    assert config.model == name and not check_recipe(config, 118_287)
    numbers = (config.lr, config.backbone_lr, config.flat, config.plain, config.matcher_change)
    assert numbers == pytest.approx((rate, backbone, flat, plain, change))
    assert (config.mixup == config.copy_blend == 0) == (name in ("atto", "femto", "pico"))


@pytest.mark.parametrize("name, encoder", [("atto", "lite"), ("lite", "dfine")])
def test_the_exported_network_is_the_same_network(tmp_path, name, encoder):
    """Each kind of encoder and backbone, of one layer; `export_onnx` raises where outputs differ.

    That of `m` is exported in `test_predict.py`.
    """
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `export`)")
    torch.manual_seed(0)
    short = {"decoder_layers": 1, "encoder_depth": 0.1, "encoder_expansion": 0.1}
    config = DetectorConfig.named(name, 2, encoder=encoder, **short)
    model = build_detector(config).eval()
    run = save_detector(model, tmp_path / "run", ["scratch", "dent"], image_size=64)
    notes = json.loads(export_onnx(run, tmp_path / "net.onnx").with_suffix(".json").read_text())
    assert notes["largest_difference"] < 1e-3
    assert notes["mean"] == ([0, 0, 0] if name in PLAIN_INPUT else [0.485, 0.456, 0.406])
