"""Boxes stay on what they name, none is degenerate, the same random numbers give one picture."""

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms import v2

from deimv2_tfg.transforms import (
    LIGHT,
    DrawnLight,
    MixingDataset,
    TrainTransform,
    at_fraction,
    at_size,
    copy_blend,
    in_fractions,
    input_sizes,
    mixup,
    mosaic,
    normalised,
    relit,
)

OFF = {"flips": False, "photometric": 0, "zoom_out": 0, "iou_crop": 0}
KINDS = {
    "flips": {"flips": True},
    "quarter turns": {"quarter_turns": 1},
    "photometric": {"photometric": 1},
    "zoom-out": {"zoom_out": 1},
    "IoU crop": {"iou_crop": 1},
}


def blob(i=0, size=(120, 90)):
    "A black photograph with one bright rectangle and its box."
    torch.manual_seed(i)
    w, h = size
    x = 10 + 7 * i % 40
    y = 8 + 5 * i % 30
    bw, bh = 24, 18
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x, y, x + bw, y + bh))
    return picture, {
        "labels": torch.tensor([i % 6]),
        "boxes": torch.tensor([[(x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]]),
        "image_id": i,
        "size": (h, w),
    }


def bright_in_boxes(pixel_values, target):
    "Share of a network input's bright pixels that its boxes hold (with a pixel of margin)."
    bright = pixel_values.mean(0) > 1
    inside = torch.zeros_like(bright)
    h, w = bright.shape
    corners = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([w, h, w, h])
    for x0, y0, x1, y1 in corners.round().int().tolist():
        inside[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
    return (bright & inside).sum().item() / max(1, bright.sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_stay_on_what_they_name(kind):
    change = TrainTransform(96, **OFF | KINDS[kind])
    for i in range(12):
        x, target = change(*blob(i))
        assert len(target["boxes"]) == len(target["labels"])
        if len(target["boxes"]):
            assert target["boxes"][:, 2:].min() * 96 > 1
            assert bright_in_boxes(x, target) > 0.95


def as_shares(photograph):
    return v2.functional.to_dtype(v2.functional.to_image(photograph), torch.float32, scale=True)


def test_light_on_a_batch_is_that_of_each_photograph():
    "torchvision's own on numbers; on bytes, which it rounds after each part, a level on average."
    photographs = [Image.effect_noise((30, 20), 80).convert("RGB") for _ in range(40)]
    for i, photograph in enumerate(photographs):
        photograph.paste((9 * i % 256, 5 * i % 256, 200), (3, 3, 20, 12))
    torch.manual_seed(0)
    lights = [DrawnLight(1.0)(p, {})[1]["light"] for p in photographs]
    drawn_next = torch.rand(3)
    torch.manual_seed(0)
    drawn = [torch.rand(1) < 1 and LIGHT.make_params([p]) for p in photographs]
    assert torch.equal(torch.rand(3), drawn_next)
    pixels = torch.stack([v2.functional.pil_to_tensor(p) for p in photographs])
    found = relit(pixels, torch.stack(lights), plain=True)
    own = [LIGHT.transform(as_shares(p), d) for p, d in zip(photographs, drawn, strict=True)]
    assert (found - torch.stack(own)).abs().max() < 1e-5
    rounded = [as_shares(LIGHT.transform(p, d)) for p, d in zip(photographs, drawn, strict=True)]
    assert 255 * (found - torch.stack(rounded)).abs().mean() < 1
    again = relit(normalised(pixels), torch.stack(lights))
    assert torch.allclose(again, normalised((255 * found).round().byte()), atol=0.02)


def test_without_light_a_batch_stays_as_it_is():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    as_it_is = torch.stack([DrawnLight(0.0)(None, {})[1]["light"]] * 2)
    assert torch.allclose(relit(pixels, as_it_is), normalised(pixels), atol=1e-5)


def test_light_that_is_drawn_for_later_changes_no_other_choice():
    kinds = {"photometric": 0.7, "zoom_out": 0.5, "quarter_turns": 0.5}
    for i in range(12):
        targets = []
        for later in (False, True):
            change = TrainTransform(32, light_later=later, **kinds)
            photograph, target = blob(i)
            targets.append(change(photograph, target)[1])
        assert torch.equal(targets[0]["boxes"], targets[1]["boxes"])
        assert targets[1]["light"].shape == (8,)


def test_mosaic_keeps_boxes_whose_centre_is_in_the_window():
    shares = []
    for k in range(16):
        samples = [blob(4 * k + i) for i in range(4)]
        torch.manual_seed(k)
        sheet, target = mosaic(samples, 96)
        x, moved = TrainTransform(192, **OFF)(sheet, target)
        assert target["mixed_with"] == [4 * k + 1, 4 * k + 2, 4 * k + 3]
        assert target["image_id"] == 4 * k
        if len(moved["boxes"]):
            assert 0 <= moved["boxes"].min() and moved["boxes"].max() <= 1
            shares.append(bright_in_boxes(x, moved))
    assert len(shares) >= 8
    # the rest belongs to objects of which the window left less than half
    assert sum(shares) / len(shares) > 0.8


def test_mixup_has_the_boxes_of_both():
    change = TrainTransform(64, **OFF)
    a, ta = change(*blob(1))
    b, tb = change(*blob(2))
    x, target = mixup(a, ta, b, tb)
    assert torch.equal(target["boxes"], torch.cat([ta["boxes"], tb["boxes"]]))
    assert target["labels"].tolist() == [1, 2]
    assert target["mixed_with"] == [2]
    assert (torch.minimum(a, b) - 1e-5 <= x).all()
    assert (x <= torch.maximum(a, b) + 1e-5).all()


def test_copies_cover_nothing_that_is_annotated():
    for seed in range(12):
        picture, target = blob(0)
        torch.manual_seed(seed)
        pasted, more = copy_blend(picture, target, *blob(seed + 1))
        assert torch.allclose(in_fractions(more)["boxes"][:1], target["boxes"], atol=1e-6)
        assert len(more["boxes"]) <= 2
        x, moved = TrainTransform(96, **OFF)(pasted, more)
        assert bright_in_boxes(x, moved) > 0.95


def test_an_object_as_large_as_its_photograph_is_not_copied():
    picture, target = blob(0)
    whole = target | {"boxes": torch.tensor([[0.5, 0.5, 0.9, 0.9]]), "image_id": 9}
    assert len(copy_blend(picture, target, picture, whole)[1]["boxes"]) == 1
    # it would lie on the part's own box
    assert len(copy_blend(picture, whole, picture, target)[1]["boxes"]) == 1


def test_images_without_boxes_can_be_mixed():
    picture, target = blob(3)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    bare = (picture, target | none)
    mixing = MixingDataset([bare, bare], TrainTransform(64), 64, mosaic=1, mixup=1, copy_blend=1)
    x, target = mixing[0]
    assert x.shape == (3, 64, 64)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64


def test_the_schedule_ends_mixing_first_and_the_rest_before_the_end():
    assert at_fraction(0.2) == {"strength": 1, "mosaic": True, "mixup": True, "copy_blend": True}
    assert at_fraction(0.6) == {"strength": 1, "mosaic": False, "mixup": False, "copy_blend": True}
    assert at_fraction(0.9) == {"strength": 0, "mosaic": False, "mixup": False, "copy_blend": False}
    mixing = MixingDataset(
        [blob(i) for i in range(6)], TrainTransform(64, **OFF), 64, mosaic=1, mixup=1, copy_blend=1
    )
    mixing.on = at_fraction(0.95)
    assert torch.equal(mixing[2][0], TrainTransform(64, **OFF)(*blob(2))[0])


def test_the_same_random_numbers_give_the_same_picture():
    mixing = MixingDataset(
        [blob(i) for i in range(6)],
        TrainTransform(64, quarter_turns=0.5, zoom_out=0.5),
        64,
        mosaic=0.5,
        mixup=0.5,
        copy_blend=0.5,
    )
    for i in range(6):
        torch.manual_seed(i)
        x, target = mixing[i]
        torch.manual_seed(i)
        again, same = mixing[i]
        assert torch.equal(x, again) and torch.equal(target["boxes"], same["boxes"])


def test_sizes_are_multiples_of_the_stride():
    assert input_sizes(160, 0.25) == [128, 160, 192] and input_sizes(160, 0) == [160]
    assert at_size(torch.zeros(2, 3, 64, 64), 96).shape == (2, 3, 96, 96)


def test_mosaic_and_copies_keep_a_box_to_the_pixel():
    samples = [blob(i, (96, 96)) for i in range(4)]
    torch.manual_seed(1)
    _, target = mosaic(samples, 96, smallest=1.0)  # the whole sheet: nothing moves but the corner
    expected = []
    for k, (_, plain) in enumerate(samples):
        corners = box_convert(plain["boxes"], "cxcywh", "xyxy") * 96
        expected.append(corners + torch.tensor([k % 2, k // 2, k % 2, k // 2]) * 96)
    assert torch.allclose(target["boxes"], torch.cat(expected), atol=1e-4)
    assert target["boxes"].canvas_size == (192, 192)
