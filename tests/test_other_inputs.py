"""Inputs of the kinds that users report, in forms that no report has: refused by name, or right."""

import json
import random
import shutil

import numpy as np
import pytest
from damage import sound_set
from PIL import Image
from pycocotools import mask

from deimv2_tfg import cli
from deimv2_tfg.data import SPLITS, annotation_file, load_dataset
from deimv2_tfg.deployment import predict_files
from deimv2_tfg.detector import DetectorConfig, build_detector, save_detector
from deimv2_tfg.doctor import check_dataset, fix_dataset
from deimv2_tfg.photographs import look_at, number, read_photograph

SIZE = (96, 72)


def changed(root, change):
    """A sound set with a change to each split's COCO dictionary."""
    sound_set(root, random.Random(1))
    for split in SPLITS:
        file = annotation_file(root, split)
        coco = json.loads(file.read_text())
        text = change(coco)
        file.write_text(text if isinstance(text, str) else json.dumps(coco))
    return root


def first_box(value):
    def change(coco):
        coco["annotations"][0]["bbox"][2] = value

    return change


def first_width(value):
    def change(coco):
        coco["images"][0]["width"] = value

    return change


def first_class(value):
    def change(coco):
        coco["categories"][0]["name"] = value

    return change


def annotations_twice(coco):
    return json.dumps(coco)[:-1] + ', "annotations": []}'


def half_a_sign(coco):
    coco["images"][0]["file_name"] = "\ud800.png"


@pytest.mark.parametrize(
    "change, kind, says",
    [
        (first_box(10**400), "box-malformed", "is not four numbers"),
        (first_box(float("inf")), "box-nan", "is not four finite numbers"),
        (first_width(10**400), "image-size-invalid", "is no size in pixels"),
        (first_class(""), "category-incomplete", "no name"),
        (first_class(" \t"), "category-incomplete", "no name"),
        (annotations_twice, "json-invalid", "the key 'annotations' is there twice"),
        (half_a_sign, "json-invalid", "half a sign"),
        (first_class("\udfff"), "json-invalid", "half a sign"),
    ],
)
def test_what_no_number_and_no_name_can_be_is_an_error(tmp_path, change, kind, says):
    root = changed(tmp_path / "set", change)
    before = {split: annotation_file(root, split).read_bytes() for split in SPLITS}
    found = [f for f in check_dataset(root).errors if f.kind == kind]
    assert len(found) == len(SPLITS) and says in found[0].message
    out, changes = fix_dataset(root)
    if kind == "json-invalid":
        assert changes.empty
        assert all(annotation_file(out, s).read_bytes() == before[s] for s in SPLITS)
    else:
        with pytest.raises(ValueError, match=r"problem\(s\) in the data set"):
            load_dataset(root, "train")


def without_boxes(code):
    """A change that leaves each annotation only a run-length code: `code(box)` of its mask."""

    def change(coco):
        for annotation in coco["annotations"]:
            annotation["segmentation"] = code(annotation.pop("bbox"))

    return change


def compressed(box):
    x, y, w, h = box
    pixels = np.zeros((36, 48), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    code = mask.encode(pixels)
    return {"size": [36, 48], "counts": code["counts"].decode()}


def garbage(text):
    return lambda box: {"size": [36, 48], "counts": text}


def test_a_box_comes_from_a_compressed_mask(tmp_path):
    root = changed(tmp_path / "set", without_boxes(compressed))
    out, _ = fix_dataset(root)
    assert check_dataset(out, photographs=False).errors == []
    for split in SPLITS:
        for a in json.loads(annotation_file(out, split).read_text())["annotations"]:
            assert a["bbox"] == a["truth"]


@pytest.mark.parametrize("text", ["zzzzzzzz", "ñ", "0", "1" * 50, "\x00", "o"])
def test_no_box_comes_from_a_mask_that_is_none(tmp_path, text):
    root = changed(tmp_path / "set", without_boxes(garbage(text)))
    out, changes = fix_dataset(root)
    assert not (changes["field"].str.endswith("bbox")).any()
    kinds = {f.kind for f in check_dataset(out, photographs=False).errors}
    assert kinds == {"box-malformed"}
    for split in SPLITS:
        stored = json.loads(annotation_file(out, split).read_text())["annotations"]
        assert len(stored) == len(
            json.loads(annotation_file(root, split).read_text())["annotations"]
        )


def test_pixels_that_reader_and_doctor_must_both_know(tmp_path):
    grey = np.random.default_rng(0).integers(60, 200, (72, 96), np.uint8)
    image = Image.fromarray(np.stack([grey, grey // 2, 255 - grey], -1))
    image.convert("LAB").save(tmp_path / "lab.tif")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("lab.tif", "cmyk.jpg"):
        assert read_photograph(tmp_path / name).mode == "RGB"
        assert look_at(tmp_path / name).problem == ""


# Import ----------------------------------------------------------------------------------------


def photograph(path, k, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(k).integers(100, 160, SIZE[::-1]).astype(dtype)
    Image.fromarray(pixels).save(path)


CENTRE = "{c} {cx} {cy} {w} {h}\n"
CORNERS = "{c} {x} {y} {right} {bottom}\n"


def yolo(root, names="names: [crack, hole]", line=CENTRE):
    """Nine photographs with a box each, in the layout of Ultralytics."""
    for k in range(9):
        split = SPLITS[k % 3]
        photograph(root / f"images/{split}/p{k}.png", k)
        x, y, w, h = 0.05 + 0.04 * k, 0.1 + 0.02 * k, 0.2, 0.3
        sides = {"x": x, "y": y, "w": w, "h": h, "right": x + w, "bottom": y + h}
        text = line.format(c=k % 2, cx=x + w / 2, cy=y + h / 2, **sides)
        (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
        (root / f"labels/{split}/p{k}.txt").write_text(text)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\n{names}\n")


def cvat(root, shape):
    """Six photographs with a shape each, in CVAT's XML."""
    images = ""
    for k in range(6):
        photograph(root / f"p{k}.png", k)
        images += f'<image id="{k}" name="p{k}.png" width="96" height="72">{shape}</image>'
    (root / "annotations.xml").write_text(f"<annotations>{images}</annotations>")


def labelme(root, kind, points):
    """Six photographs with a shape each, in LabelMe's json."""
    for k in range(6):
        photograph(root / f"p{k}.png", k)
        shapes = [{"label": "a", "points": points, "shape_type": kind}]
        content = {"shapes": shapes, "imagePath": f"p{k}.png", "imageWidth": 96, "imageHeight": 72}
        (root / f"p{k}.json").write_text(json.dumps(content))


def imported(source, out, capsys):
    """Exit code, what is said, and the classes and number of boxes of the result."""
    code = cli.main(["import", str(source), str(out)])
    said = capsys.readouterr()
    names, boxes = [], 0
    for file in out.glob("*/*.json"):
        coco = json.loads(file.read_text())
        names = [category["name"] for category in coco["categories"]]
        boxes += len(coco["annotations"])
    return code, said.out + said.err, names, boxes


@pytest.mark.parametrize(
    "names, expected",
    [
        ("names: [yes, no]", ["yes", "no"]),
        ("names: [on, off]", ["on", "off"]),
        ("names: [1.0, 0x10]", ["1.0", "0x10"]),
        ("names: {'0': grieta, '1': agujero ñ}", ["grieta", "agujero ñ"]),
        ("nc: 2\nnames: [a, b]", ["a", "b"]),
    ],
)
def test_names_of_classes_are_what_is_written(tmp_path, capsys, names, expected):
    yolo(tmp_path / "in", names)
    code, said, found, boxes = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert (code, found, boxes) == (0, expected, 9), said


@pytest.mark.parametrize(
    "names, says",
    [
        ("nc: 3\nnames: [a, b]", "nc is 3, but there are 2 names"),
        ("names: crack, hole", "names are neither a list nor numbered"),
        ("names: [a, '']", "names are neither a list nor numbered"),
        ("names: [[a], b]", "names are neither a list nor numbered"),
        ("names: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, capsys, names, says):
    yolo(tmp_path / "in", names)
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and says in said and not (tmp_path / "out").exists()


def test_two_lists_of_classes_that_differ_are_no_choice(tmp_path, capsys):
    yolo(tmp_path / "in")
    (tmp_path / "in/other.yaml").write_text("names: [hole, crack]\n")
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and "name the classes differently" in said
    (tmp_path / "in/other.yaml").write_text("names: {0: crack, 1: hole}\n")
    assert imported(tmp_path / "in", tmp_path / "out", capsys)[0] == 0


def test_corners_where_yolo_has_centres_are_asked_about(tmp_path, capsys):
    yolo(tmp_path / "in", line=CORNERS)
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and "are they two corners" in said


def test_boxes_that_stick_out_are_counted(tmp_path, capsys):
    yolo(tmp_path / "in")
    (tmp_path / "in/labels/train/p0.txt").write_text("0 0.02 0.5 0.1 0.2\n")
    code, said, _, boxes = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert (code, boxes) == (0, 9) and "1 boxes stick out" in said


def test_a_photograph_of_16_bits_is_refused_with_its_reason(tmp_path, capsys):
    yolo(tmp_path / "in")
    photograph(tmp_path / "in/images/train/p0.png", 0, np.uint16)
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and "p0.png: more than 8 bits a channel; save it with 8 bits" in said


@pytest.mark.parametrize(
    "shape, says",
    [
        ('<mask label="a" rle="3, 4, 300" left="9" top="9" width="5" height="2"/>', "rle does not"),
        ('<mask label="a" left="9" top="9" width="5" height="2"/>', "rle"),
        ('<polygon label="a" points="9,9;20,30"/>', "a polygon of 2 points"),
        ('<points label="a" points="9,9"/>', "a points has no box"),
        ('<box label="a" xtl="9" ytl="9" xbr="nan" ybr="20"/>', "no number: 'nan'"),
    ],
)
def test_shapes_of_cvat_that_have_no_box(tmp_path, capsys, shape, says):
    (tmp_path / "in").mkdir()
    cvat(tmp_path / "in", shape)
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and says in said and not (tmp_path / "out").exists()


def test_shapes_of_labelme_that_have_no_box(tmp_path, capsys):
    labelme(tmp_path / "polygon", "polygon", [[9, 9], [20, 30]])
    code, said, *_ = imported(tmp_path / "polygon", tmp_path / "out", capsys)
    assert code == 2 and "a polygon of 2 points has no box" in said
    labelme(tmp_path / "line", "line", [[9, 9], [20, 30]])
    assert imported(tmp_path / "line", tmp_path / "out", capsys)[::3] == (0, 6)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "7z"])
def test_an_archive_is_named(tmp_path, capsys, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/set.{suffix}").write_bytes(b"PK")
    code, said, *_ = imported(tmp_path / "in", tmp_path / "out", capsys)
    assert code == 2 and f"set.{suffix} is an archive: unpack it first" in said


# Networks and prediction -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A detector directory of two classes with thresholds."""
    model = build_detector(DetectorConfig.tiny(num_classes=2))
    folder = tmp_path_factory.mktemp("network") / "best"
    save_detector(model, folder, classes=["NORMAL", "dent"], image_size=64)
    (folder / "thresholds.json").write_text(json.dumps({"NORMAL": 0.9, "dent": 0.9}))
    return folder


def rewritten(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "change, says",
    [
        (replaced("config.json", b"{}"), "its files are not those of one detector"),
        (replaced("config.json", b"[]"), "config.json: not the configuration of a detector"),
        (replaced("config.json", b"{"), "config.json: not readable as JSON"),
        (replaced("config.json", b"\xff\xfe{"), "config.json: not readable as JSON"),
        (replaced("model.safetensors", b"12345678"), "its files are not those of one detector"),
        (replaced("model.safetensors", b""), "its files are not those of one detector"),
        (replaced("thresholds.json", b"none"), "thresholds.json: not readable as JSON"),
        (rewritten(classes=["a"]), "config.json: 1 names for 2 classes"),
        (rewritten(image_size="64px"), "image_size '64px' is no size"),
        (rewritten(image_size=-64), "image_size -64 is no size"),
    ],
)
def test_a_network_that_is_damaged_is_named(tmp_path, network, capsys, change, says):
    shutil.copytree(network, tmp_path / "best")
    change(tmp_path / "best")
    photograph(tmp_path / "in/a.png", 0)
    words = ["predict", tmp_path / "best", tmp_path / "in", "--out", tmp_path / "out"]
    assert cli.main([*map(str, words)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_folder_to_predict_on_may_hold(tmp_path, network):
    grey = np.random.default_rng(0).integers(60, 200, (40, 50), np.uint8)
    pages = [Image.fromarray(grey + k) for k in range(2)]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in/a.gif")
    pages[0].save(tmp_path / "in/a.jfif", "JPEG")
    pages[0].save(tmp_path / "in/pages.tif", save_all=True, append_images=pages[1:])
    deep = [Image.fromarray((grey + k).astype(np.uint16) * 200) for k in range(2)]
    deep[0].save(tmp_path / "in/deep.tif", save_all=True, append_images=deep[1:])
    pages[0].save(tmp_path / "secret.png")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in/cut.tif").write_bytes((tmp_path / "in/pages.tif").read_bytes()[:-900])
    report = predict_files(str(network), str(tmp_path / "in"), str(tmp_path / "out"))
    names = {row["file_name"] for row in report.rows() if row["verdict"] != "unknown"}
    whole = {"a.gif", "a.jfif", "pages.tif#000000", "pages.tif#000001"}
    assert whole <= names and names <= whole | {"cut.tif#000000"}
    assert {"deep.tif", "link.png", "cut.tif"} <= report.errors.keys()
    assert "a link that leads out" in report.errors["link.png"]
    assert "more than 8 bits" in report.errors["deep.tif"]


def test_a_number_beyond_a_float_is_none(tmp_path, capsys):
    assert [number(text) for text in ("1e400", "-1e400", "inf", "nan", "1e308")] == [None] * 4 + [
        1e308
    ]
    words = ["split", str(tmp_path), str(tmp_path / "out"), "--shares", "1e400,1,1"]
    assert cli.main(words) == 2 and "three numbers over 0" in capsys.readouterr().err
