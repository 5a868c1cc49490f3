"""Public reports of data sets gone wrong, each a kind, with what a user expects."""

import hashlib
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from damage import SIZE, read, sound_set, write
from PIL import Image, ImageDraw, ImageOps
from test_doctor import png_of_16_bits

from deimv2_tfg import cli
from deimv2_tfg.copies import copies_by_name
from deimv2_tfg.data import SPLITS, DatasetError, annotation_file, check_dataset, load_dataset
from deimv2_tfg.doctor import changes_as_text, fix_dataset
from deimv2_tfg.photographs import (
    PhotographError,
    look_at,
    number,
    read_json_file,
    read_photograph,
    read_text,
    safe_path,
    whole_number,
)
from deimv2_tfg.splits import split, split_table


@pytest.fixture
def photographs(tmp_path):
    return sound_set(tmp_path / "set", random.Random(0))


def edit(root, change, splits=SPLITS):
    for name in splits:
        coco = read(root, name)
        change(coco)
        write(root, name, coco)


def fixed(root, capsys=None):
    """The corrected copy's json by split, its changes, and what is left."""
    out, changes = fix_dataset(root)
    return {name: read(out, name) for name in SPLITS}, changes, check_dataset(out).errors


def kinds(report):
    return {finding.kind for finding in report.findings}


def objects(coco):
    return sum(len(coco[name]["annotations"]) for name in SPLITS)


def every_box(coco):
    return [(a["bbox"], a["truth"]) for name in SPLITS for a in coco[name]["annotations"]]


# --fix guesses nothing -------------------------------------------------------------------------


@pytest.mark.finding("data.md:F1")
@pytest.mark.parametrize("factor", [2, 0.5])
def test_F1_photographs_resized_after_annotation_are_left_to_a_person(photographs, factor):
    before = {name: read(photographs, name) for name in SPLITS}
    for file in photographs.glob("*/images/*.png"):
        with Image.open(file) as image:
            image.resize((int(SIZE[0] * factor), int(SIZE[1] * factor))).save(file)
    with pytest.raises(DatasetError, match="in the json"):
        load_dataset(photographs)
    coco, changes, left = fixed(photographs)
    assert changes.empty and coco == before and {f.kind for f in left} == {"size-differs"}


@pytest.mark.finding("data.md:F2")
def test_F2_names_in_sub_folders_are_sound(photographs):
    for name in SPLITS:
        (photographs / name / "images" / "batch0").mkdir()
        for file in (photographs / name / "images").glob("*.png"):
            file.rename(file.parent / "batch0" / file.name)
    edit(
        photographs, lambda c: [i.update(file_name=f"batch0/{i['file_name']}") for i in c["images"]]
    )
    assert check_dataset(photographs).errors == [] and fixed(photographs)[1].empty


@pytest.mark.finding("data.md:F3")
def test_F3_ids_as_floats_become_whole_numbers(photographs):
    def change(coco):
        for a in coco["annotations"]:
            a.update(image_id=float(a["image_id"]), category_id=float(a["category_id"]))

    edit(photographs, change)
    assert "id-type" in kinds(check_dataset(photographs))
    n = objects({name: read(photographs, name) for name in SPLITS})
    coco, changes, left = fixed(photographs)
    assert objects(coco) == n and not changes["after"].isna().any() and left == []
    ids = [(a["image_id"], a["category_id"]) for a in coco["train"]["annotations"]]
    assert {type(v) for pair in ids for v in pair} == {int}


@pytest.mark.finding("data.md:F3b")
@pytest.mark.parametrize("where", ["images", "both", "annotations", "words"])
def test_F3b_ids_as_text_are_converted_or_numbered_anew(photographs, where):
    def change(coco):
        for image in coco["images"]:
            if where != "annotations":
                image["id"] = f"photo {image['id']}" if where == "words" else str(image["id"])
        for a in coco["annotations"]:
            if where != "images":
                a["image_id"] = f"photo {a['image_id']}" if where == "words" else str(a["image_id"])

    edit(photographs, change)
    n = objects({name: read(photographs, name) for name in SPLITS})
    assert check_dataset(photographs).errors
    coco, changes, left = fixed(photographs)
    assert objects(coco) == n and left == []
    names = {i["id"]: i["uid"] for i in coco["val"]["images"]}
    assert all(names[a["image_id"]] == a["image_uid"] for a in coco["val"]["annotations"])


@pytest.mark.finding("data.md:F4")
@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_F4_a_missing_box_is_taken_from_the_segmentation(photographs, kind):
    def change(coco):
        for a in coco["annotations"]:
            x, y, w, h = a.pop("bbox")
            a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if kind == "rle":
                mask = np.zeros(SIZE[::-1], np.uint8)
                mask[y : y + h, x : x + w] = 1
                edges = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel()]))
                counts = np.diff(np.r_[0, edges, mask.size]).tolist()
                a["segmentation"] = {"size": [SIZE[1], SIZE[0]], "counts": counts}

    edit(photographs, change)
    coco, changes, left = fixed(photographs)
    assert left == [] and not changes["after"].isna().any()
    assert all(np.allclose(box, truth) for box, truth in every_box(coco))


@pytest.mark.finding("data.md:F5")
def test_F5_numbers_as_text_are_numbers(photographs):
    edit(
        photographs,
        lambda c: [a.update(bbox=[str(v) for v in a["bbox"]]) for a in c["annotations"]],
    )
    coco, changes, left = fixed(photographs)
    assert left == [] and all(box == truth for box, truth in every_box(coco))


@pytest.mark.finding("data.md:F6")
def test_F6_fractions_are_left_to_a_person(photographs):
    def change(coco):
        for a in coco["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [(x + w / 2) / SIZE[0], (y + h / 2) / SIZE[1], w / SIZE[0], h / SIZE[1]]

    edit(photographs, change)
    before = {name: read(photographs, name) for name in SPLITS}
    coco, changes, left = fixed(photographs)
    assert changes.empty and coco == before and {f.kind for f in left} == {"box-fraction"}


@pytest.mark.finding("data.md:F6b")
def test_F6b_one_pixel_is_a_slip_of_the_mouse(photographs):
    edit(photographs, lambda c: c["annotations"][0].update(bbox=[0, 0, 1, 1], area=1), ["train"])
    assert "box-tiny" in kinds(check_dataset(photographs)) and fixed(photographs)[1].empty


@pytest.mark.finding("data.md:F7")
def test_F7_two_photographs_under_one_name_are_not_merged(photographs):
    def change(coco):
        coco["images"][1]["file_name"] = coco["images"][0]["file_name"]

    edit(photographs, change, ["train"])
    report = check_dataset(photographs)
    said = [f.message for f in report.errors if f.kind == "file-name-twice"]
    assert said and "two photographs under one name?" in said[0]
    coco, changes, left = fixed(photographs)
    assert changes.empty and "file-name-twice" in {f.kind for f in left}


@pytest.mark.finding("data.md:F8")
def test_F8_a_name_that_two_entries_may_mean_is_left_and_backslashes_are_slashes(photographs):
    def flattened(coco):
        coco["images"][0]["file_name"] = "cam0/train2.png"
        coco["images"][1]["file_name"] = "cam1/train2.png"
        coco["images"].pop(2)
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 3]

    edit(photographs, flattened, ["train"])
    coco, changes, left = fixed(photographs)
    assert changes.empty and {f.kind for f in left} == {"file-missing"}
    folder = photographs / "val" / "images"
    (folder / "batch0").mkdir()
    for file in folder.glob("*.png"):
        file.rename(folder / "batch0" / file.name)
    edit(
        photographs,
        lambda c: [i.update(file_name=f"batch0\\{i['file_name']}") for i in c["images"]],
        ["val"],
    )
    out, changes = fix_dataset(photographs, photographs.with_name("other"))
    assert [i["file_name"] for i in read(out, "val")["images"]] == [
        f"batch0/val{k}.png" for k in range(3)
    ]


@pytest.mark.finding("data.md:F5")
@pytest.mark.parametrize("kind", ["text", "dictionary", "nested", "decimal commas", "three"])
def test_a_box_that_says_something_is_never_taken_out(photographs, kind):
    ways = {
        "text": lambda box: ",".join(map(str, box)),
        "dictionary": lambda box: dict(zip("xywh", box, strict=True)),
        "nested": lambda box: [box],
        "decimal commas": lambda box: [f"{v},0" for v in box],
        "three": lambda box: box[:3],
    }

    def change(coco):
        coco["annotations"][0]["bbox"] = ways[kind](coco["annotations"][0]["bbox"])
        coco["annotations"][0].pop("segmentation", None)

    edit(photographs, change)
    before = {name: read(photographs, name) for name in SPLITS}
    coco, changes, left = fixed(photographs)
    assert changes.empty and coco == before and {f.kind for f in left} == {"box-malformed"}


@pytest.mark.finding("data.md:F6")
def test_boxes_in_per_cent_are_no_corners(photographs):
    def change(coco):
        for a in coco["annotations"]:
            a.pop("segmentation", None)
            a["bbox"] = [100 * v / side for v, side in zip(a["bbox"], SIZE * 2, strict=True)]
            a["area"] = a["bbox"][2] * a["bbox"][3]

    edit(photographs, change, ["val", "test"])
    before = {name: read(photographs, name) for name in SPLITS}
    coco, changes, left = fixed(photographs)
    assert changes.empty and coco == before and {f.kind for f in left} == {"box-outside"}


@pytest.mark.finding("data.md:F8")
def test_accents_written_in_two_ways_are_one_name(photographs):
    """macOS stores an accent apart from its letter, most tools write both as one sign."""
    for file in (photographs / "val" / "images").glob("*.png"):
        file.rename(file.with_name(unicodedata.normalize("NFD", f"baño {file.name}")))
    edit(
        photographs,
        lambda c: [i.update(file_name=f"baño {i['file_name']}") for i in c["images"]],
        ["val"],
    )
    assert {f.kind for f in check_dataset(photographs).errors} == {"file-name-case"}
    coco, changes, left = fixed(photographs)
    assert left == [] and not changes["after"].isna().any()


@pytest.mark.finding("data.md:F8")
@pytest.mark.parametrize("name", ["train0.jpg", "train0", "1f3a-train0.png", "train%30.png"])
def test_no_entry_goes_while_a_file_that_is_not_listed_may_be_meant(photographs, name):
    edit(photographs, lambda c: c["images"][0].update(file_name=name), ["train"])
    coco, changes, left = fixed(photographs)
    assert changes.empty and {f.kind for f in left} == {"file-missing"}
    (photographs / "train" / "images" / "train0.png").unlink()
    coco, changes, left = fixed(photographs)
    assert left == [] and [i["uid"] for i in coco["train"]["images"]] == ["train1", "train2"]


@pytest.mark.finding("data.md:F4")
def test_what_is_taken_out_is_said_per_split(photographs, capsys):
    edit(
        photographs,
        lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 5], segmentation=[]),
        ["val"],
    )
    file = next((photographs / "test" / "images").glob("*.png"))
    file.write_bytes(file.read_bytes()[:100])
    assert cli.main(["doctor", str(photographs), "--fix"]) == 1
    said = capsys.readouterr().out
    assert "val: TAKEN OUT: 1 annotations (box-empty)" in said
    assert "test: TAKEN OUT: 1 images (photo-truncated)" in said


def test_the_loss_of_a_last_box_is_said(photographs):
    one = [a for a in read(photographs, "val")["annotations"] if a["image_id"] == 1]
    edit(
        photographs,
        lambda c: [
            a.update(bbox=[1, 1, 0, 1], segmentation=[])
            for a in c["annotations"]
            if a["image_id"] == 1
        ],
        ["val"],
    )
    out, changes = fix_dataset(photographs)
    assert len(one) == changes["after"].isna().sum()
    assert "left without any object, look at them: val0.png" in changes_as_text(changes, out)


@pytest.mark.finding("data.md:F3")
def test_a_wrong_export_is_not_emptied(photographs):
    edit(
        photographs,
        lambda c: [a.update(category_id=a["category_id"] + 5) for a in c["annotations"]],
    )
    coco, changes, left = fixed(photographs)
    assert changes.empty and {f.kind for f in left} == {"category-id-unknown"}


# Reading ---------------------------------------------------------------------------------------


@pytest.mark.finding("data.md:B1", "training.md:17")
def test_B1_a_byte_order_mark_is_read_everywhere(photographs):
    for name in SPLITS:
        file = annotation_file(photographs, name)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert check_dataset(photographs).errors == [] and len(load_dataset(photographs)) == 3
    assert fixed(photographs)[1].empty and len(split_table(photographs)) == 9


def test_text_in_another_encoding_names_the_file(tmp_path):
    (tmp_path / "classes.txt").write_bytes("defecto\nañadido".encode("cp1252"))
    with pytest.raises(ValueError, match="classes.txt: not UTF-8 text"):
        read_text(tmp_path / "classes.txt")
    (tmp_path / "wide.json").write_text("[1]", encoding="utf-16")
    with pytest.raises(ValueError, match="it is UTF-16"):
        read_json_file(tmp_path / "wide.json")


def test_numbers_are_what_they_say():
    assert [whole_number(v) for v in ("1", 1.0, 1, "01", " 7 ")] == [1, 1, 1, 1, 7]
    assert [whole_number(v) for v in (1.5, "1,0", True, None, "one", float("inf"))] == [None] * 6
    assert number("61") == 61.0 and number("6,1") is None and number([1]) is None


def saved(tmp_path, array, name):
    Image.fromarray(array).save(tmp_path / name)
    return tmp_path / name


@pytest.mark.finding("data.md:R1", "data.md:R2")
def test_R1_what_is_deeper_than_8_bits_is_refused(tmp_path):
    deep = np.full((40, 50), 3000, np.uint16)
    (tmp_path / "colours.png").write_bytes(png_of_16_bits(50, 40))
    files = {
        saved(tmp_path, deep, "deep.png"): "mode-16-bit",
        saved(tmp_path, deep, "deep.tif"): "mode-16-bit",
        saved(tmp_path, deep.astype(np.float32), "float.tif"): "mode-float",
        tmp_path / "colours.png": "mode-16-bit",
    }
    for file, kind in files.items():
        with pytest.raises(PhotographError, match="save it with 8 bits") as e:
            read_photograph(file)
        assert e.value.kind == kind and e.value.file == str(file)


@pytest.mark.finding("data.md:R1b")
def test_R1b_a_16_bit_set_is_not_trained_on(photographs):
    for file in (photographs / "train" / "images").glob("*.png"):
        Image.fromarray(np.full(SIZE[::-1], 3000, np.uint16)).save(file)
    with pytest.raises(DatasetError, match="more than 8 bits a channel"):
        load_dataset(photographs)


@pytest.mark.finding("data.md:R3")
@pytest.mark.parametrize("tag", [2, 3, 4, 5, 6, 7, 8])
def test_R3_a_photograph_is_upright(tmp_path, tag):
    upright = np.zeros((30, 40), np.uint8)
    upright[:10, :5] = 200
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(upright).save(tmp_path / "p.png", exif=exif)
    with Image.open(tmp_path / "p.png") as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert read_photograph(tmp_path / "p.png").tobytes() == expected.tobytes()


@pytest.mark.finding("data.md:I6")
def test_EXIF_with_boxes_is_an_error_and_without_a_note(photographs):
    exif = Image.Exif()
    exif[274] = 3
    coco = read(photographs, "val")
    name = coco["images"][0]["file_name"]
    with Image.open(photographs / "val" / "images" / name) as image:
        image.load()
        image.save(photographs / "val" / "images" / name, exif=exif)
    assert "exif-rotated" in {f.kind for f in check_dataset(photographs).errors}
    edit(
        photographs,
        lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] != 1]),
        ["val"],
    )
    assert "exif-tag" in kinds(check_dataset(photographs)) and load_dataset(photographs, "val")


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/passwd", "a/../../x.png", "C:\\x.png", "", "a\0"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file"):
        safe_path(tmp_path, name)


def test_a_link_that_leads_out_is_refused(photographs, tmp_path):
    Image.effect_noise(SIZE, 50).save(tmp_path / "secret.png")
    name = read(photographs, "train")["images"][0]["file_name"]
    (photographs / "train" / "images" / name).unlink()
    os.symlink(tmp_path / "secret.png", photographs / "train" / "images" / name)
    with pytest.raises(DatasetError, match="is a link that leads out"):
        load_dataset(photographs)


@pytest.mark.finding("data.md:B1", "data.md:X3")
def test_a_list_of_annotations_that_is_null_is_empty_for_every_reader(photographs, tmp_path):
    edit(photographs, lambda c: c.update(annotations=None), ["test"])
    assert check_dataset(photographs).errors == [] and fixed(photographs)[1].empty
    assert [len(target["boxes"]) for _, target in load_dataset(photographs, "test")] == [0] * 3
    split(str(photographs), str(tmp_path / "anew"), by="name")
    assert len(split_table(tmp_path / "anew")) == 9


# Entries ---------------------------------------------------------------------------------------


@pytest.mark.finding("data.md:V2")
def test_V2_sizes_of_zero_are_the_files_and_make_no_false_errors(photographs):
    edit(photographs, lambda c: [i.update(width=0, height=0) for i in c["images"]])
    assert {f.kind for f in check_dataset(photographs).errors} == {"image-size-invalid"}
    coco, _, left = fixed(photographs)
    assert left == [] and {(i["width"], i["height"]) for i in coco["val"]["images"]} == {SIZE}


@pytest.mark.finding("data.md:X1")
def test_X1_a_heading_is_no_class(photographs):
    def change(coco):
        for c in coco["categories"]:
            c["supercategory"] = "defects"
        coco["categories"].insert(0, {"id": 0, "name": "defects", "supercategory": "none"})

    edit(photographs, change)
    report = check_dataset(photographs)
    absent = [f.message for f in report.findings if f.kind == "class-absent"]
    assert "category-parent" in kinds(report) and not any("defects" in m for m in absent)
    coco, changes, left = fixed(photographs)
    assert [c["name"] for c in coco["train"]["categories"]] == ["dent", "scratch"] and left == []


@pytest.mark.finding("data.md:X2")
def test_X2_masks_that_are_all_crowds_are_an_error(photographs):
    edit(photographs, lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    assert "crowd-most" in {f.kind for f in check_dataset(photographs).errors}
    with pytest.raises(DatasetError, match="marked as crowds"):
        load_dataset(photographs)


@pytest.mark.finding("data.md:X3")
def test_X3_sizes_as_floats_and_no_list_of_annotations(photographs):
    edit(photographs, lambda c: [i.update(width=float(i["width"])) for i in c["images"]])
    edit(photographs, lambda c: c.update(annotations=None), ["test"])
    assert {f.kind for f in check_dataset(photographs).errors} == {"image-size-invalid"}
    coco, changes, left = fixed(photographs)
    assert left == [] and not changes["after"].isna().any()
    assert {type(i["width"]) for i in coco["train"]["images"]} == {int}


# Splits ----------------------------------------------------------------------------------------


def boards(root: Path, n=16):
    "Parts in a jig under one camera, 2 pixels of play; each with a defect of its own."
    rng = np.random.default_rng(0)
    base = Image.effect_noise((40, 40), 90).resize((200, 200))
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for k in range(n):
        dx, dy = rng.integers(-1, 2, 2)
        board = base.transform(base.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
        x, y = (int(v) for v in rng.integers(5, 180, 2))
        ImageDraw.Draw(board).ellipse([x, y, x + 6, y + 6], fill=20)
        board.save(root / "images" / f"board{k}.png")
        images.append({"id": k + 1, "file_name": f"board{k}.png", "width": 200, "height": 200})
        box = {"id": k + 1, "image_id": k + 1, "category_id": 1, "bbox": [x, y, 7, 7]}
        annotations.append(box | {"area": 49, "iscrowd": 0})
    coco = {"images": images, "annotations": annotations}
    coco["categories"] = [{"id": 1, "name": "hole"}]
    (root / "instances_default.json").write_text(json.dumps(coco))
    return root / "instances_default.json"


@pytest.mark.finding("data.md:S1")
def test_S1_a_share_is_never_empty(tmp_path, capsys):
    file = boards(tmp_path / "export")
    with pytest.raises(ValueError, match="val and test would be empty.*--by name"):
        split(str(file), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="would be empty"):
        split(str(file), str(tmp_path / "folds"), folds=5)
    assert not (tmp_path / "folds").exists()
    split(str(file), str(tmp_path / "out"), by="name")
    sizes = split_table(tmp_path / "out").groupby("split").size()
    assert sizes.min() >= 1 and sizes.sum() == 16


@pytest.mark.finding("data.md:G2")
@pytest.mark.parametrize("place", ["images", "beside", "elsewhere", "folder"])
def test_G2_one_json_is_split(tmp_path, place):
    file = boards(tmp_path / "export")
    images = ""
    if place == "beside":
        for photograph in (file.parent / "images").iterdir():
            photograph.rename(file.parent / photograph.name)
    if place == "elsewhere":
        images = str((file.parent / "images").rename(tmp_path / "photographs"))
    source = file.parent if place == "folder" else file
    split(str(source), str(tmp_path / "out"), by="name", images=images)
    assert check_dataset(tmp_path / "out", photographs=False).errors == []
    assert len(load_dataset(tmp_path / "out")) > 8


@pytest.mark.finding("data.md:G2")
def test_one_json_without_its_photographs_is_refused(tmp_path):
    file = boards(tmp_path / "export")
    shutil.rmtree(file.parent / "images")
    with pytest.raises(DatasetError, match="16 of 16 photographs are not in.*--images"):
        split(str(file), str(tmp_path / "out"), by="name")


@pytest.mark.finding("data.md:S1")
def test_as_many_groups_as_shares_are_one_each(tmp_path, capsys):
    file = boards(tmp_path / "export", 9)
    coco = read_json_file(file)
    for k, image in enumerate(coco["images"]):
        image["part"] = k // 3
    file.write_text(json.dumps(coco))
    split(str(file), str(tmp_path / "out"), by="name", column="part")
    assert split_table(tmp_path / "out").groupby("split").size().to_dict() == {
        "train": 3,
        "val": 3,
        "test": 3,
    }
    for image in coco["images"]:
        image["part"] = min(image["id"], 3)
    file.write_text(json.dumps(coco))
    capsys.readouterr()
    split(str(file), str(tmp_path / "uneven"), "0.4,0.3,0.3", by="name", column="part")
    assert "less than half of what was asked: 7 photographs" in capsys.readouterr().out


@pytest.mark.finding("data.md:G2")
@pytest.mark.parametrize(
    "change,said",
    [
        (lambda c: c["images"][0].pop("file_name"), r"box.json: images\[0\]: file_name missing"),
        (lambda c: c["images"].append("x"), r"box.json: images\[6\]: id, file_name"),
        (lambda c: c["images"][0].update(id="1"), r"box.json: images\[0\].id: '1' is not a whole"),
        (lambda c: c["images"][0].update(file_name="../x.png"), "photographs are not in"),
        (lambda c: c["images"].clear(), "no image is listed"),
        (lambda c: c.pop("images"), "it has no list of images"),
    ],
)
def test_what_is_wrong_with_one_json_is_said_by_its_name(tmp_path, change, said):
    file = boards(tmp_path / "export", 6).rename(tmp_path / "export" / "box.json")
    coco = read_json_file(file)
    change(coco)
    file.write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match=said) as e:
        split(str(file), str(tmp_path / "out"), by="name")
    assert "all.json" not in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.finding("data.md:G2")
def test_of_two_jsons_one_must_be_named(tmp_path):
    file = boards(tmp_path / "export", 6)
    shutil.copy(file, file.with_name("other.json"))
    with pytest.raises(DatasetError, match="holds instances_default.json, other.json"):
        split(str(file.parent), str(tmp_path / "out"), by="name")


@pytest.mark.parametrize("shares", ["1,0,0", "a,b,c", "nan,1,1", "inf,1,1", "1,1", "0.8"])
def test_shares_are_three_numbers(photographs, tmp_path, shares):
    with pytest.raises(ValueError, match="three numbers over 0"):
        split(str(photographs), str(tmp_path / "out"), shares)


@pytest.mark.finding("data.md:S3")
def test_S3_copies_count_where_the_original_is_there():
    exports = [f"a_{word}.rf.{k}{k}11aa22bb33.jpg" for k, word in enumerate(("tif", "webp", "jpg"))]
    assert set(copies_by_name([*exports, "b.jpg"])) == set(exports[1:])
    assert copies_by_name(["plate_dark.png", "c.png"]) == {}
    assert copies_by_name(["plate_dark.png", "plate.png"]) == {"plate_dark.png": "plate.png"}


def test_a_large_photograph_is_looked_at_in_strips(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2100, 2200, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png", compress_level=0)
    seen = look_at(tmp_path / "large.png")
    whole = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode() + pixels.tobytes())
    assert seen.pixels_digest == whole.hexdigest() and not seen.flat
