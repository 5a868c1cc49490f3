"""The detector against the reference's numbers, frozen vectors, and files that must not load."""

import contextlib
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForObjectDetection

from deimv2_tfg import Predictor
from deimv2_tfg.cli import main
from deimv2_tfg.criterion import Criterion
from deimv2_tfg.data import load_dataset
from deimv2_tfg.deployment import export_notes
from deimv2_tfg.detector import (
    DetectorConfig,
    build_detector,
    convert_weights,
    count_parameters,
    load_detector,
    load_original_weights,
    postprocess,
    save_detector,
)
from deimv2_tfg.evaluation import trained_image_size
from deimv2_tfg.optim import recompute
from deimv2_tfg.training import DEIMV2
from deimv2_tfg.weights import (
    DETECTOR_RULES,
    VIT_RULES,
    WeightsError,
    find_weights,
    init_weights,
    read_weights,
    rename_weights,
)

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
VECTORS = Path(__file__).parent / "vectors" / "detector_tiny.json"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the reference numbers are not in {REFERENCE}"
)
TARGETS = [
    {
        "labels": torch.tensor([1, 2]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]]),
    },
    {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def noise(key, shape):
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def reference_state(name):
    stored, spec = (
        np.load(REFERENCE / f"{name}.npz"),
        json.loads((REFERENCE / f"{name}.json").read_text()),
    )
    state = {}
    for p in spec["params"]:
        n = noise(p["key"], p["shape"]) if "mean" in p else None
        if p["fill"] == "stored":
            value = np.array(stored["stored/" + p["key"]])
        elif p["fill"] == "anchors":
            value = np.zeros(p["shape"])
        else:
            value = p["mean"] + p["std"] * (np.abs(n) if p["fill"] == "abs_normal" else n)
        state[p["key"]] = torch.from_numpy(
            value if p["fill"] == "stored" else value.astype(np.float32)
        )
    return spec, stored, state


def set_distance(a, b):
    "Largest distance of a row of either to the nearest row of the other: queries as a set."
    distance = np.abs(a[:, None] - b[None]).max(-1)
    return max(distance.min(0).max(), distance.min(1).max())


@needs_reference
@pytest.mark.parametrize(
    "name,config",
    [("deimv2_m", DetectorConfig.m()), ("deimv2_seed_config", DetectorConfig.thesis_m())],
)
def test_parity(name, config):
    spec, expected, state = reference_state(name)
    model = build_detector(config).eval()
    report = load_original_weights(
        model,
        {
            "model": {"junk": torch.zeros(1)},
            "ema": {"module": state, "updates": 3},
            "last_epoch": 7,
        },
    )
    assert (
        report.taken == "ema.module"
        and report.loaded == len(model.state_dict())
        and set(report.ignored) == {"decoder.anchors", "decoder.valid_mask"}
    )
    assert count_parameters(model) == spec["num_params"]
    image = (
        np.random.RandomState(spec["image_seed"])
        .standard_normal((1, 3, spec["image_size"], spec["image_size"]))
        .astype(np.float32)
    )
    maps = []
    hook = model.model.conv_encoder.register_forward_hook(
        lambda module, args, output: maps.extend(output)
    )
    with torch.no_grad():
        output = model(torch.from_numpy(image))
    hook.remove()
    assert np.abs(maps[2].numpy() - expected["backbone_c4"]).max() < 1e-4
    assert (
        np.abs(np.array([m.mean().item() for m in maps]) - expected["backbone_mean"]).max() < 1e-4
    )
    ours = np.concatenate([output.logits[0].numpy(), output.pred_boxes[0].numpy()], 1)
    assert (
        set_distance(
            ours, np.concatenate([expected["pred_logits"][0], expected["pred_boxes"][0]], 1)
        )
        < 1e-4
    )


def fill(model):
    "Weights by a rule from their names, of sizes at which every part matters."
    for key, value in model.state_dict().items():
        if key.endswith(("num_batches_tracked", "inv_freq", "num_points_scale", "up", "reg_scale")):
            continue
        n = noise(key, tuple(value.shape))
        if value.ndim > 1:
            n = n / np.sqrt(np.prod(value.shape[1:]))
        elif key.endswith("running_var"):
            n = 0.75 + 0.5 * np.abs(n)
        elif "norm" in key and key.endswith("weight"):
            n = 1 + 0.1 * n
        else:
            n = 0.1 * n
        value.copy_(torch.from_numpy(n))
    return model


def frozen_output():
    model = fill(build_detector(DetectorConfig.tiny(num_classes=3))).eval()
    with torch.no_grad():
        return model(torch.from_numpy(noise("input", (1, 3, 64, 96)).astype(np.float32)))


def test_frozen_vectors():
    "The numbers of `tests/vectors`, made by this code when it agreed with the reference."
    output, frozen = frozen_output(), json.loads(VECTORS.read_text())
    ours = np.concatenate([output.logits[0].numpy(), output.pred_boxes[0].numpy()], 1)
    assert set_distance(ours, np.array(frozen["logits_boxes"])) < 1e-4


@pytest.mark.parametrize(
    "name,count", [("m", 18_243_716), ("thesis_m", 17_856_356), ("s", 9_694_220)]
)
def test_parameters(name, count):
    assert count_parameters(build_detector(getattr(DetectorConfig, name)())) == count


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (32, 32), (160, 128)])
def test_any_size(size):
    model = build_detector(DetectorConfig.tiny()).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, *size))
    queries = min(30, sum(size[0] * size[1] // s**2 for s in (8, 16, 32)))
    assert output.logits.shape == (2, queries, 6) and output.pred_boxes.shape == (2, queries, 4)
    assert output.pred_boxes.isfinite().all()
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.randn(1, 3, size[0] + 8, size[1]))


def test_training_outputs_and_gradients():
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.tiny())
    output = model(torch.randn(2, 3, 64, 64), TARGETS)
    assert (
        output["dn_num_split"] == [16, 30]
        and output["dn_num_group"] == 4
        and len(output["dn_positive_idx"][1]) == 0
    )
    assert output["layer_corners"].shape == (2, 2, 30, 132) and output["dn_layer_logits"].shape == (
        2,
        2,
        16,
        6,
    )
    assert "dn_pre_logits" not in model(torch.randn(1, 3, 64, 64), TARGETS[1:])
    sum(
        v.sum() for v in output.values() if isinstance(v, torch.Tensor) and v.requires_grad
    ).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_gradient_of_one_photograph_is_that_of_the_same_one_twice():
    "Gradients of ambiguous strides, which torch's batch norm on a CPU takes for another layout."
    torch.manual_seed(0)
    model, x = build_detector(DetectorConfig.tiny()), torch.randn(1, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()

    def gradient(x):
        model.zero_grad()
        (model(x).logits * torch.arange(30 * 6).view(30, 6).sin()).sum().div(len(x)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one, two = gradient(x), gradient(x.repeat(2, 1, 1, 1))
    assert (one - two).norm() < 1e-4 * two.norm()


def test_denoising_queries_are_not_seen():
    "The matching queries' outputs do not depend on the denoising ones."
    model = build_detector(DetectorConfig.tiny())
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x, TARGETS).logits, model(x).logits, atol=1e-5)


@pytest.mark.parametrize("name,size,least", [("tiny", 64, 20), ("small", 160, 30), ("m", 640, 30)])
def test_first_loss(name, size, least):
    "From random weights, six classes: about 40 for M (700 with the library's class prior)."
    torch.manual_seed(0)
    model = build_detector(getattr(DetectorConfig, name)())
    targets = TARGETS[:1] if size == 640 else TARGETS
    with torch.no_grad():
        losses = Criterion(6)(model(torch.randn(len(targets), 3, size, size), targets), targets)
    assert least < float(sum(losses.values())) < 60


def original_state(model):
    "A model's state in original names, which are read from the reference's list for M."
    own, state = model.state_dict(), {}
    for p in json.loads((REFERENCE / "deimv2_m.json").read_text())["params"]:
        new = list(rename_weights({p["key"]: torch.zeros(6)}, DETECTOR_RULES)[0])
        if not new or any(k not in own for k in new):
            continue
        state[p["key"]] = torch.cat([own[k] for k in new]) if len(new) > 1 else own[new[0]]
        if p["key"].endswith("periods"):
            state[p["key"]] = 1 / state[p["key"]]
    return state


@needs_reference
def test_other_number_of_classes(tmp_path):
    torch.manual_seed(0)
    published = build_detector(DetectorConfig.tiny(num_classes=9))
    state = original_state(published)
    assert sum(v.numel() for v in rename_weights(state, DETECTOR_RULES)[0].values()) == sum(
        v.numel() for v in published.state_dict().values()
    )
    torch.save({"model": state}, tmp_path / "coco.pth")
    model = build_detector(DetectorConfig.tiny(num_classes=6))
    with pytest.raises(WeightsError, match="reinit_head=True") as e:
        load_original_weights(model, tmp_path / "coco.pth")
    assert "decoder.dec_score_head.1.weight" in str(
        e.value
    ) and "decoder.denoising_class_embed.weight" in str(e.value)
    report = load_original_weights(model, tmp_path / "coco.pth", reinit_head=True)
    assert len(report.reinitialised) == 2 + 2 * 2 + 1 and report.taken == "model"
    assert torch.allclose(model.model.enc_score_head.bias.sigmoid(), torch.tensor(0.01))
    other = published.model.decoder.bbox_embed[0].layers[0].weight
    assert torch.equal(model.model.decoder.bbox_embed[0].layers[0].weight, other)


def test_errors_list_everything():
    model = build_detector(DetectorConfig.tiny())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as e:
        load_original_weights(
            model,
            {
                "decoder.enc_score_head.weight": torch.zeros(6, 48),
                "decoder.decoder.up": torch.tensor([0.5]),
                "decoder.query_pos_head.layers.0.weight": torch.zeros(7, 4),
                "decoder.pre_bbox_head.layers.0.bias": torch.full((48,), torch.nan),
                "stranger": torch.zeros(1),
            },
        )
    text = str(e.value)
    assert f"missing ({len(before) - 4})" in text and all(
        k in text for k in before if "bbox_embed" in k
    )
    assert (
        "unexpected (1):\n  stranger" in text
        and "wrong shape (1)" in text
        and "7x4, should be 48x4" in text
        and "not finite (1)" in text
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_attack_is_refused_and_not_run(tmp_path, how):
    mark, file = tmp_path / "was_run", tmp_path / "checkpoint.pth"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"model": Attack(mark)}, protocol=2))
    else:
        torch.save({"model": Attack(mark)}, file)
    with pytest.raises(WeightsError, match="refused, nothing in it was run"):
        load_original_weights(build_detector(DetectorConfig.tiny()), file)
    assert not mark.exists()


def test_damaged_files_are_refused(tmp_path):
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "good.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-700])
    (tmp_path / "text.pth").write_text("<html>quota exceeded</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"w": torch.zeros(3)}, tmp_path / "good.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:20])
    for name in (
        "short.pth",
        "text.pth",
        "empty.pth",
        "list.pth",
        "short.safetensors",
        "absent.pth",
    ):
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    assert read_weights(tmp_path / "good.safetensors")[0]["w"].shape == (3,)


def test_bare_vit(tmp_path):
    "A ViT file changes the ViT and nothing else."
    torch.manual_seed(0)
    source, model = build_detector(DetectorConfig.tiny()), build_detector(DetectorConfig.tiny())
    own, state = source.model.conv_encoder.backbone.state_dict(), {}
    keys = [
        "cls_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "rope_embed.periods",
    ] + [
        f"blocks.{i}.{part}.{kind}"
        for i in range(3)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
        for kind in ("weight", "bias")
    ]
    for key in keys:
        new = list(rename_weights({key: torch.zeros(3)}, VIT_RULES)[0])
        state[key] = 1 / own[new[0]] if "periods" in key else torch.cat([own[k] for k in new])
    torch.save(state, tmp_path / "vit.pt")
    head = model.model.enc_score_head.weight.clone()
    assert load_original_weights(model, tmp_path / "vit.pt").loaded == len(own)
    assert all(
        torch.allclose(v, own[k]) for k, v in model.model.conv_encoder.backbone.state_dict().items()
    )
    assert torch.equal(head, model.model.enc_score_head.weight)
    del state["blocks.2.norm2.bias"]
    with pytest.raises(WeightsError, match=r"missing \(1\):\n  model.layer.2.norm2.bias"):
        load_original_weights(model, state)


def test_save_and_load(tmp_path):
    model = build_detector(DetectorConfig.tiny(num_classes=3, num_queries=20)).eval()
    save_detector(model, tmp_path / "best", classes=["a", "b", "c"], epoch=4)
    again, x = load_detector(tmp_path / "best"), torch.randn(1, 3, 64, 64)
    library = AutoModelForObjectDetection.from_pretrained(tmp_path / "best")
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits) and torch.equal(
            model(x).logits, library(x).logits
        )
    assert (
        again.classes == ["a", "b", "c"]
        and again.meta == {"epoch": 4}
        and again.detector_config == model.detector_config
    )
    assert library.config.id2label == {0: "a", 1: "b", 2: "c"} and not again.training
    assert len({p.data_ptr() for p in again.parameters()}) == len(list(again.parameters()))


@needs_reference
def test_convert(tmp_path):
    model = build_detector(DetectorConfig.s(num_classes=2)).eval()
    torch.save({"ema": {"module": original_state(model)}}, tmp_path / "s.pth")
    report = convert_weights(tmp_path / "s.pth", tmp_path / "out", model="s")
    assert (
        report.taken == "ema.module"
        and load_detector(tmp_path / "out").detector_config == model.detector_config
    )


@pytest.mark.finding("training.md:4", "training.md:5")
def test_converted_weights_predict_are_judged_and_exported(smoke_data, tmp_path, capsys):
    classes = load_dataset(smoke_data, "test").classes
    model = build_detector(DetectorConfig.tiny(num_classes=len(classes)))
    torch.save({"ema": {"module": original_state(model)}}, tmp_path / "p.pth")
    out = str(tmp_path / "named")
    wrong = ["convert", str(tmp_path / "p.pth"), out, "--model", "tiny", "--classes", "dent,hole"]
    assert main(wrong) != 0 and "6 classes, not 2: dent, hole" in capsys.readouterr().err
    assert not (tmp_path / "named").exists()
    names = ", ".join(classes)
    assert main([*wrong[:-1], names]) == 0
    assert load_detector(out).classes == classes and trained_image_size(out) == 640
    convert_weights(tmp_path / "p.pth", out, "tiny", classes, image_size=64)
    assert main(["evaluate", out, str(smoke_data)]) == 0
    images = str(smoke_data / "test" / "images")
    options = ["--out", str(tmp_path / "out"), "--no-pictures", "--threshold", "0.5"]
    assert main(["predict", out, images, *options]) == 0
    convert_weights(tmp_path / "p.pth", tmp_path / "unnamed", "tiny", image_size=64)
    assert main(["predict", str(tmp_path / "unnamed"), images, *options]) == 0
    notes = export_notes(Predictor.open(str(tmp_path / "unnamed")))
    assert notes["classes"] == [f"class_{k}" for k in range(6)]
    capsys.readouterr()
    assert main(["predict", out, images, *options[:3]]) != 0
    assert "--threshold" in capsys.readouterr().err


def no_network(*args, **kwargs):
    raise OSError("no network")


M, TINY = DetectorConfig.m(), DetectorConfig.tiny()


@pytest.mark.parametrize(
    "init, config, words",
    [
        ("dinov3", M, "vittplus_distill.pt"),
        ("coco", M, "cannot be reached"),
        ("coco", TINY, "nothing was published"),
        ("someone/weights", M, "cannot be reached"),
        ("mistyped.pth", M, "no such file"),
    ],
)
def test_starting_points_say_what_is_missing(tmp_path, monkeypatch, init, config, words):
    monkeypatch.setenv("DEIMV2_TFG_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("deimv2_tfg.weights.cached_file", no_network)
    with pytest.raises(WeightsError, match=words):
        find_weights(init, config)


def test_starting_points_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_WEIGHTS", str(tmp_path))
    (tmp_path / "vittplus_distill.pt").write_bytes(b"")
    assert find_weights("dinov3", M) == tmp_path / "vittplus_distill.pt"
    save_detector(build_detector(TINY), tmp_path / "run")
    other = build_detector(DetectorConfig.tiny(num_classes=2))
    assert len(init_weights(other, tmp_path / "run").reinitialised) == 7


def test_variants_know_their_names():
    for name in ("m", "thesis_m", "s", "small", "tiny"):
        assert getattr(DetectorConfig, name)(3, num_queries=7).variant == name
    assert DetectorConfig.m(width=128).variant is None


def test_postprocess():
    "Sigmoid, best of query x class, pixels of the original; one query may give two labels."
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 1, 2], logits[0, 1, 0], logits[0, 0, 1] = 3.0, 2.0, 1.0
    (found,) = postprocess(
        type(
            "Output",
            (),
            {
                "logits": logits,
                "pred_boxes": torch.tensor([[[0.5, 0.5, 1, 1], [0.5, 0.25, 0.2, 0.5]]]),
            },
        ),
        [(100, 200)],
        top_k=3,
    )
    assert found["labels"].tolist() == [2, 0, 1] and torch.allclose(
        found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid()
    )
    assert torch.allclose(found["boxes"][0], torch.tensor([80.0, 0.0, 120.0, 50.0])) and found[
        "boxes"
    ][2].tolist() == [0, 0, 200, 100]


def test_bfloat16_outside_float32_boxes():
    model = build_detector(DetectorConfig.tiny())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 3, 64, 64), TARGETS)
    assert (
        output.layer_boxes.dtype
        == output.layer_logits.dtype
        == output.layer_corners.dtype
        == output.enc_boxes.dtype
        == torch.float32
    )


def gradients(checkpointing):
    "Loss and gradients of a step in bfloat16."
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.tiny())
    if checkpointing:
        recompute(DEIMV2.blocks(model))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 3, 64, 64), TARGETS)
    loss = sum(Criterion(6)(output, TARGETS).values())
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_cast_together_are_those_that_autocast_casts(monkeypatch, checkpointing):
    together = gradients(checkpointing)
    monkeypatch.setattr("deimv2_tfg.detector.autocast_weights", lambda *_: contextlib.nullcontext())
    one_by_one = gradients(checkpointing)
    assert len(together) == len(one_by_one) > 100
    assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True))
