"""A bad data set stops with one message that lists every problem; targets survive augmentation."""

import json
import shutil

import pandas as pd
import pytest
import torch
from page_code import page_module
from PIL import Image

from deimv2_tfg import data, doctor
from deimv2_tfg.annotations import few_objects
from deimv2_tfg.data import (
    SPLITS,
    DatasetError,
    check_dataset,
    load_dataset,
    require_dataset,
)
from deimv2_tfg.figures import class_style
from deimv2_tfg.findings import annotation_file
from deimv2_tfg.formats import Item, write_coco_set
from deimv2_tfg.transforms import TrainTransform

page = page_module("01_data")


@pytest.fixture
def photographs(tmp_path):
    for split in SPLITS:
        Image.effect_noise((40, 33), 60).convert("RGB").resize((40, 30)).save(tmp_path / "p.png")
        boxes = [("dent", 5, 5, 20, 10), ("scratch", 0, 0, 40, 3)]
        item = Item(tmp_path / "p.png", (40, 30), boxes)
        place = annotation_file(tmp_path / "set", split)
        write_coco_set(place, [item], {"dent": 0, "scratch": 1})
    return tmp_path / "set"


def edit(root, split, change):
    path = root / split / f"{split}.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def test_a_sound_set_has_no_findings(photographs):
    assert {f.kind for f in check_dataset(photographs).findings} == {
        "class-few",
        "photo-small",
        "name-in-two-splits",
    }  # tiny, as they are
    assert check_dataset(photographs).errors == []


@pytest.mark.parametrize("root", ["missing", "empty"])
def test_missing_and_empty_roots(tmp_path, root):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="Expected layout") as e:
        load_dataset(tmp_path / root)
    if root == "empty":
        assert all(f"{s}/{s}.json" in str(e.value) for s in SPLITS)


def test_all_problems_in_one_message(photographs):
    (photographs / "train/images/p.png").unlink()
    (photographs / "val/val.json").unlink()
    (photographs / "test/test.json").write_text("{")
    with pytest.raises(DatasetError) as e:
        require_dataset(photographs)
    for part in (
        "'p.png' is not in train/images",
        "val/val.json: the file is missing",
        "test/test.json: not valid JSON",
        "Expected layout",
    ):
        assert part in str(e.value)


@pytest.mark.parametrize(
    "field,change",
    [
        ("categories", lambda c: c.pop("categories")),
        ("images", lambda c: c["images"].clear()),
        ("images[0]", lambda c: c["images"][0].pop("width")),
        ("images[1].id", lambda c: c["images"].append(dict(c["images"][0]))),
        ("annotations[0].image_id", lambda c: c["annotations"][0].update(image_id=99)),
        ("annotations[0].category_id", lambda c: c["annotations"][0].update(category_id=99)),
        ("annotations[1].bbox", lambda c: c["annotations"][1].update(bbox=[1, 2, 0, 4])),
        ("annotations[1].bbox", lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4])),
        ("annotations[1].bbox", lambda c: c["annotations"][1].update(bbox=[100, 2, 5, 4])),
        ("categories", lambda c: c["categories"][0].update(name="hole")),
    ],
)
def test_each_kind_of_damage_is_named(photographs, field, change):
    edit(photographs, "val", change)
    assert field in [f.field for f in check_dataset(photographs).errors]


def test_ids_with_gaps_and_boxes_over_the_edge(photographs):
    def change(coco):
        for c in coco["categories"]:
            c["id"] = 10 - 3 * c["id"]  # dent 10, scratch 7
        for a in coco["annotations"]:
            a["category_id"] = 10 - 3 * a["category_id"]
        coco["annotations"][0]["bbox"] = [30, 20, 20, 20]

    for split in SPLITS:
        edit(photographs, split, change)
    report = check_dataset(photographs, photographs=False)
    assert (
        report.errors == []
        and [f.kind for f in report.findings].count("box-over-edge") == 3
        and [f.kind for f in report.findings].count("category-id-gaps") == 3
    )
    dataset = load_dataset(photographs, "val")
    assert dataset.classes == ["scratch", "dent"] and dataset.category_ids == [7, 10]
    assert dataset[0][1]["labels"].tolist() == [1, 0]
    assert torch.allclose(
        dataset[0][1]["boxes"][0], torch.tensor([35 / 40, 25 / 30, 10 / 40, 10 / 30])
    )


def test_colours_of_sizes_follow_the_labels(photographs):
    """A class has the colour of its boxes, in whatever order the classes come in the table."""
    boxes = pd.DataFrame(
        {
            "split": "train",
            "class": ["c", "a", "b"],
            "relative size": 0.1,
            "input pixels": [9.0, 20.0, 40.0],
        }
    )
    figure = page.plot_sizes(boxes, ["a", "b", "c"])
    dots = [c for c in figure.axes[0].collections if len(c.get_offsets())]
    for label, dot in enumerate(dots):
        assert dot.get_facecolor()[0][:3] == pytest.approx(class_style(label)["color"])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_the_look_before_a_training_opens_no_photograph(photographs, monkeypatch):
    monkeypatch.setattr(doctor, "look_at_all", None)
    assert load_dataset(photographs, "val").num_classes == 2


def test_an_image_without_boxes_is_legal(photographs):
    edit(photographs, "train", lambda c: c["annotations"].clear())
    pixel_values, target = load_dataset(photographs, "train", TrainTransform(32))[0]
    assert (
        pixel_values.shape == (3, 32, 32)
        and target["boxes"].shape == (0, 4)
        and target["labels"].shape == (0,)
    )


def test_augmentation_keeps_boxes_on_their_objects(tmp_path):
    "A bright rectangle on black: after augmentation its box is where the bright pixels are."
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (10, 8, 40, 28))
    target = {
        "labels": torch.tensor([0]),
        "boxes": torch.tensor([[25 / 60, 18 / 40, 30 / 60, 20 / 40]]),
    }
    torch.manual_seed(0)
    change = TrainTransform(96, photometric=0, zoom_out=0.5, iou_crop=0.5)
    for _ in range(40):
        pixels, moved = change(image, target)
        bright = (pixels.mean(0) > 1.4).nonzero() / 96.0
        if not len(moved["boxes"]):
            continue
        cx, cy, w, h = moved["boxes"][0].tolist()
        for got, expected in zip(
            (*bright.min(0).values.tolist(), *bright.max(0).values.tolist()),
            (cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2),
            strict=True,
        ):
            assert abs(got - expected) < 0.05
    shutil.rmtree(tmp_path)


def test_statistics_in_words_and_few_objects(photographs):
    edit(photographs, "test", lambda c: c["annotations"].clear())
    datasets = {s: load_dataset(photographs, s) for s in SPLITS}
    words = page.in_words(page.photograph_statistics(datasets), data.box_table(datasets, 64))
    assert (
        "3 photographs show 4 objects" in words
        and "1 show none and 2 show several classes" in words
        and "50 % of the boxes" in words
    )
    assert (
        few_objects(photographs, "test") == {"dent": 0, "scratch": 0}
        and few_objects(photographs, "val", few=1) == {}
    )
