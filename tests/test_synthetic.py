"""The built-in set: the same for a seed, exact counts, tight boxes, nobody's files overwritten."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from deimv2_tfg import synthetic
from deimv2_tfg.core import PROFILES, open_study
from deimv2_tfg.synthetic import CLASSES, THESIS_COUNTS, make_dataset, plan_split, planned_image

SPLITS = list(THESIS_COUNTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("data") / "set", profile="smoke", counts=(8, 6, 6), workers=2
    )


def pixels(root):
    found = {}
    for file in sorted(root.rglob("*.jpg")):
        decoded = np.asarray(Image.open(file)).tobytes()
        found[file.relative_to(root).as_posix()] = hashlib.sha256(decoded).hexdigest()
    return found


def annotations(root):
    return {split: json.loads((root / split / f"{split}.json").read_text()) for split in SPLITS}


def test_same_seed_same_pixels_for_any_number_of_workers(root, tmp_path):
    again = make_dataset(
        tmp_path / "again", profile="smoke", counts={"train": 8, "val": 6, "test": 6}, workers=1
    )
    assert pixels(again) == pixels(root) and annotations(again) == annotations(root)
    other = make_dataset(tmp_path / "other", profile="smoke", counts=(8, 6, 6), seed=1)
    assert not set(pixels(other).values()) & set(pixels(root).values())
    assert len(set(pixels(root).values())) == 20


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_full_size_has_the_counts_of_the_thesis(seed):
    assert PROFILES["thesis"].counts == tuple(THESIS_COUNTS[s].images for s in SPLITS)
    for split, counts in THESIS_COUNTS.items():
        plan = plan_split(split, counts.images, seed)
        assert (len(plan), sum(map(len, plan))) == (counts.images, counts.boxes)
        assert (
            tuple(sum(label in boxes for boxes in plan) for label in range(6)) == counts.images_with
        )
        assert all(boxes == (0,) for boxes in plan if 0 in boxes)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 13, 50, 500, 2000])
@pytest.mark.parametrize("split", SPLITS)
def test_every_class_in_every_plan(split, n):
    plan = plan_split(split, n)
    assert len(plan) == n and all(plan)
    if n >= 6:
        assert {label for boxes in plan for label in boxes} == set(range(6))


def test_coco_files(root):
    for split, coco in annotations(root).items():
        assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate(CLASSES))
        sizes = {i["id"]: (i["width"], i["height"]) for i in coco["images"]}
        for image in coco["images"]:
            assert (
                Image.open(root / split / "images" / image["file_name"]).size == sizes[image["id"]]
            )
        assert len(list((root / split / "images").iterdir())) == len(sizes)
        for a in coco["annotations"]:
            (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
            assert 0 <= x < x + w <= width and 0 <= y < y + h <= height and w >= 3 and h >= 3
            assert a["area"] == w * h and a["iscrowd"] == 0


@pytest.mark.parametrize("label", range(1, 6))
def test_boxes_hold_what_was_drawn(label, monkeypatch):
    "With and without a defect, pictures differ inside the box up to each side, hardly outside."

    def draw(seed):
        rng = np.random.default_rng(seed)
        canvas = synthetic.painted(rng, (150, 160))
        part = synthetic.draw_part(rng, (150, 160))
        light = synthetic.draw_light(rng)
        clean = synthetic.shade(canvas, light)
        x, y, w, h = synthetic.add_defect(rng, canvas, light, part, label)
        return np.abs(synthetic.shade(canvas, light) - clean).max(2) * (part < 0), (x, y, w, h)

    for seed in range(6):
        change, (x, y, w, h) = draw(seed)
        inside = np.zeros_like(change, bool)
        inside[y : y + h, x : x + w] = True
        assert change[inside].sum() > 0.9 * change.sum()
        near = max(3, round(0.12 * max(w, h)))
        for side in (
            np.s_[y : y + near, x : x + w],
            np.s_[y + h - near : y + h, x : x + w],
            np.s_[y : y + h, x : x + near],
            np.s_[y : y + h, x + w - near : x + w],
        ):
            assert change[side].max() > 0.08


def test_image_does_not_depend_on_the_others():
    plan = plan_split("train", 12)
    picture, boxes = planned_image(plan, 3, "train", 7, 64)
    alone, same = planned_image({7: plan[7]}, 3, "train", 7, 64)
    assert np.array_equal(picture, alone) and boxes == same and len(boxes) == len(plan[7])


def test_a_whole_set_is_reused(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert make_dataset(root, profile="smoke", counts=(8, 6, 6)) == root
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_something_else_in_the_way_is_refused(root, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="no manifest.json"):
        make_dataset(tmp_path / "photos", profile="smoke")
    assert (tmp_path / "photos" / "mine.jpg").read_bytes() == b"mine"
    with pytest.raises(FileExistsError, match="another built-in data set"):
        make_dataset(root, profile="smoke", counts=(8, 6, 6), seed=1)
    (tmp_path / "empty").mkdir()
    assert make_dataset(tmp_path / "empty", profile="smoke", counts=(1, 1, 1)) == tmp_path / "empty"


def test_a_set_that_lost_files_is_refused(tmp_path):
    root = make_dataset(tmp_path / "set", profile="smoke", counts=(2, 1, 1))
    next((root / "train" / "images").iterdir()).unlink()
    with pytest.raises(FileExistsError, match="lost files"):
        make_dataset(root, profile="smoke", counts=(2, 1, 1))


def test_an_interrupted_set_leaves_nothing(tmp_path, monkeypatch):
    whole = synthetic.planned_image

    def interrupted(plan, seed, split, index, size):
        if split == "val":
            raise KeyboardInterrupt
        return whole(plan, seed, split, index, size)

    monkeypatch.setattr(synthetic, "planned_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "set", profile="smoke", counts=(2, 1, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        dict(profile="tesis"),
        dict(counts=(1, 2)),
        dict(counts=(1, 2, 0)),
        dict(counts={"train": 3}),
        dict(counts=(1.5, 2, 3)),
    ],
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(ValueError):
        make_dataset(tmp_path / "set", **({"profile": "smoke"} | wrong))
    assert list(tmp_path.iterdir()) == []


def test_the_ordinary_set_is_what_it_was(root):
    "Boxes, sizes and mean grey of seed 0 as generator 1 drew them; numpy may move a last digit."
    coco = annotations(root)["val"]
    assert [a["bbox"] for a in coco["annotations"]] == FROZEN_BOXES
    assert [(i["width"], i["height"]) for i in coco["images"]] == FROZEN_SIZES
    means = []
    for image in coco["images"]:
        grey = Image.open(root / "val/images" / image["file_name"]).convert("L")
        means.append(np.asarray(grey).mean())
    assert means == pytest.approx(FROZEN_MEANS, abs=0.3)


FROZEN_BOXES = [
    [18, 28, 9, 9],
    [21, 13, 8, 8],
    [45, 31, 9, 9],
    [19, 19, 13, 13],
    [34, 23, 18, 20],
    [10, 6, 53, 49],
    [30, 11, 14, 21],
    [17, 12, 20, 8],
    [11, 27, 23, 22],
]
FROZEN_SIZES = [(70, 59), (69, 59), (70, 59), (70, 59), (60, 68), (62, 66)]
FROZEN_MEANS = [122.99, 126.03, 164.18, 152.57, 108.02, 149.54]


def test_a_study_without_photographs_gets_the_built_in_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    own = synthetic.study_data(open_study("smoke", data_dir=tmp_path))
    assert own == tmp_path
    root = synthetic.study_data(open_study("smoke", seed=3))
    assert root == tmp_path / "runs" / "data" / "synthetic-smoke-3"
    assert json.loads((root / "manifest.json").read_text())["seed"] == 3
