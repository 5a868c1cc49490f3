"""Round trips lose nothing; published sets convert with the counts they are known for; what is wrong is named, all at once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deimv2_tfg import cli
from deimv2_tfg.core import read_json
from deimv2_tfg.data import SPLITS, annotation_file, check_dataset
from deimv2_tfg.formats import (
    convert_masks,
    convert_voc,
    convert_yolo,
    import_dataset,
    mask_boxes,
    read_yolo,
    write_split,
    write_voc,
    write_yolo,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real = lambda name: pytest.mark.skipif(
    not (SHARED / name).is_dir(), reason=f"the real photographs {SHARED / name} are not there"
)


def content(root):
    "What a data set says: file name, size and boxes with class names, by split."
    found = {}
    for split in SPLITS:
        coco = read_json(annotation_file(root, split))
        names, files = (
            {c["id"]: c["name"] for c in coco["categories"]},
            {i["id"]: i for i in coco["images"]},
        )
        found[split] = (
            {i["file_name"]: (i["width"], i["height"]) for i in coco["images"]},
            sorted(
                (
                    files[a["image_id"]]["file_name"],
                    names[a["category_id"]],
                    *(round(v, 3) for v in a["bbox"]),
                )
                for a in coco["annotations"]
            ),
        )
    return found


@pytest.mark.parametrize(
    "there,back", [(write_voc, convert_voc), (write_yolo, convert_yolo)], ids=["voc", "yolo"]
)
def test_round_trip(smoke_data, tmp_path, there, back):
    back(there(smoke_data, tmp_path / "foreign"), tmp_path / "home")
    assert content(tmp_path / "home") == content(smoke_data)
    a = {p.name: p.read_bytes() for p in smoke_data.rglob("*.jpg")}
    assert a == {
        p.name: p.read_bytes() for p in (tmp_path / "home").rglob("*.jpg")
    }  # no photograph was encoded again
    assert import_dataset(tmp_path / "foreign", tmp_path / "told").exists() and content(
        tmp_path / "told"
    ) == content(smoke_data)


@real("neu-det")
def test_neu_det_with_its_list(tmp_path):
    source = SHARED / "neu-det"
    out = convert_voc(source, tmp_path / "neu")
    cocos = {s: read_json(annotation_file(out, s)) for s in SPLITS}
    assert {s: len(c["images"]) for s, c in cocos.items()}["test"] == 360 and sum(
        len(c["images"]) for c in cocos.values()
    ) == 1800
    assert sum(len(c["annotations"]) for c in cocos.values()) == 4189
    assert {Path(i["file_name"]).stem for i in cocos["test"]["images"]} == set(
        (source / "splits/test.txt").read_text().split()
    )
    assert (
        min(
            sum(c["name"] in i["file_name"] for i in cocos["val"]["images"])
            for c in cocos["val"]["categories"]
        )
        >= 25
    )
    assert all(
        min(a["bbox"][:2]) >= 0 and a["bbox"][0] + a["bbox"][2] <= 200
        for c in cocos.values()
        for a in c["annotations"]
    )
    assert check_dataset(out, photographs=False).errors == []
    convert_voc(write_voc(out, tmp_path / "voc"), tmp_path / "again")
    assert content(tmp_path / "again") == content(out)


@real("magnetic-tile")
def test_magnetic_tile_masks_to_boxes(tmp_path):
    out = convert_masks(SHARED / "magnetic-tile", tmp_path / "tiles", whole="Free")
    cocos = {s: read_json(annotation_file(out, s)) for s in SPLITS}
    assert sum(len(c["images"]) for c in cocos.values()) == 452
    assert [c["name"] for c in cocos["train"]["categories"]] == [
        "Blowhole",
        "Break",
        "Crack",
        "Fray",
        "Free",
        "Uneven",
    ]
    for split, coco in cocos.items():  # every box is tight: each side touches a mask's pixel
        for image in coco["images"]:
            mask = next(
                (
                    p
                    for p in (SHARED / "magnetic-tile").glob(
                        f"*/{Path(image['file_name']).stem}.png"
                    )
                ),
                None,
            )
            if mask is None:
                continue
            pixels = np.asarray(Image.open(mask).convert("L")) > 127
            its = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]
            covered = np.zeros_like(pixels)
            for x, y, w, h in its:
                part = pixels[y : y + h, x : x + w]
                assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
                covered[y : y + h, x : x + w] = True
            assert (pixels & ~covered).sum() <= 0.02 * pixels.sum() + 12  # what is left out is dust
    assert not check_dataset(out).errors


def test_masks_are_merged_and_dust_is_dropped():
    mask = np.zeros((40, 40), bool)
    mask[5:10, 5:10] = mask[5:10, 14:19] = mask[30:35, 30:35] = True
    mask[20, 20] = True
    assert mask_boxes(mask, 12, 6) == [
        (5, 5, 14, 5),
        (30, 30, 5, 5),
    ]  # a gap of four pixels: one defect; one pixel: dust
    assert mask_boxes(mask, 12, 0) == [(5, 5, 5, 5), (14, 5, 5, 5), (30, 30, 5, 5)]
    assert mask_boxes(np.zeros((5, 5))) == []
    diagonal = np.eye(6, dtype=bool)
    assert mask_boxes(diagonal, 3, 0) == [(0, 0, 6, 6)]  # pixels that touch at corners


def test_yolo_arrangements_and_faults(tmp_path):
    for split in ("train", "valid", "test"):
        for folder in ("images", "labels"):
            (tmp_path / split / folder).mkdir(parents=True)
        Image.new("L", (100, 50)).save(tmp_path / split / "images" / "a.png")
        Image.new("L", (20, 20)).save(tmp_path / split / "images" / "b.png")
        (tmp_path / split / "labels" / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n0 0 0 1 0 1 1 0 1\n")
    (tmp_path / "data.yaml").write_text("nc: 2\nnames: {0: dent, 1: hole}\n")
    out = convert_yolo(tmp_path, tmp_path / "out")
    assert content(out)["val"] == (
        {"a.png": (100, 50), "b.png": (20, 20)},
        [("a.png", "dent", 0, 0, 100, 50), ("a.png", "hole", 40, 15, 20, 20)],
    )
    (tmp_path / "test/labels/b.txt").write_text("7 .5 .5 .1 .1")
    (tmp_path / "train/labels/b.txt").write_text("0 5 5 10 10")
    with pytest.raises(ValueError) as e:
        convert_yolo(tmp_path, tmp_path / "out2")
    assert "class 7 of 2" in str(e.value) and "pixels?" in str(e.value)
    with pytest.raises(ValueError, match="line 2"):
        read_yolo("0 .5 .5 .1 .1\n0 .5 .5", 10, 10, ["a"])


def test_voc_faults_are_listed_at_once(tmp_path, smoke_data):
    voc = write_voc(smoke_data, tmp_path / "voc")
    names = sorted((voc / "Annotations").iterdir())
    names[0].write_text("<annotation>")
    names[1].unlink()
    (voc / "ImageSets/Main/test.txt").open("a").write("nobody\n")
    with pytest.raises(ValueError) as e:
        convert_voc(voc, tmp_path / "out")
    assert (
        names[0].name in str(e.value)
        and names[1].stem in str(e.value)
        and "nobody" in str(e.value)
        and "3 problem" in str(e.value)
    )


def test_a_voc_name_without_suffix(tmp_path):
    for folder in ("IMAGES", "ANNOTATIONS", "lists"):
        (tmp_path / folder).mkdir()
    for k in range(12):
        Image.new("L", (40, 30)).save(tmp_path / "IMAGES" / f"s_{k}.jpg")
        (tmp_path / "ANNOTATIONS" / f"s_{k}.xml").write_text(
            f"<annotation><filename>s_{k}</filename><size><width>40</width><height>30</height></size><object><name>scratch</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30.5</ymax></bndbox></object></annotation>"
        )
    (tmp_path / "lists/train.txt").write_text("\n".join(f"s_{k}" for k in range(9)))
    (tmp_path / "lists/test.txt").write_text("s_9\ns_10\ns_11")
    found = content(convert_voc(tmp_path, tmp_path / "out"))
    assert [len(found[s][0]) for s in SPLITS] == [8, 1, 3] and found["test"][1][0] == (
        "s_10.jpg",
        "scratch",
        0,
        0,
        40,
        30.5,
    )


def test_two_photographs_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / folder / "x.png")
    with pytest.raises(ValueError, match="x.png"):
        write_split(
            tmp_path / "out",
            "train",
            [(tmp_path / f / "x.png", 9, 9) for f in "ab"],
            [[], []],
            ["c"],
        )


def test_import_from_the_command_line(tmp_path, smoke_data, capsys):
    write_yolo(smoke_data, tmp_path / "yolo")
    assert cli.main(["import", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 0 and content(
        tmp_path / "out"
    ) == content(smoke_data)
    assert (
        cli.main(["import", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 1
        and "not empty" in capsys.readouterr().err
    )
    assert cli.main(["import", str(tmp_path / "nothing"), str(tmp_path / "o")]) == 1
