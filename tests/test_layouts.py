"""More layouts that tools write by default; each box lies where it was drawn."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_formats import (
    LINE,
    PATCH,
    all_patches,
    coco_of_names,
    content,
    mask_of,
    photograph,
    photographs,
    voc_set,
    yolo_set,
)

from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import annotation_file
from deimv2_tfg.formats import coco_box, read_yolo
from deimv2_tfg.importing import format_of, import_dataset, read_masks


def coco_set(root, n=10, name="all.json", **more):
    for k in range(n):
        photograph(root / f"{k}.jpg", k)
    coco = coco_of_names([f"{k}.jpg" for k in range(n)]) | more
    write_json(root / name, coco)
    return coco


# --- YOLO ---


@pytest.mark.finding("data.md:G3")
@pytest.mark.parametrize(
    "place, label",
    [
        ("train_images/{0}.jpg", "train_labels/{0}.txt"),
        ("img/{0}.jfif", "lab/{0}.txt"),
        ("photographs/{0}.gif", "labels/{0}.txt"),
        ("images/train2017/{0}.jpg", "labels/train2017/{0}.txt"),
        ("images/valid/{0}.jpg", "labels/val/{0}.txt"),
    ],
)
def test_folders_of_other_names(tmp_path, place, label):
    root = yolo_set(tmp_path / "in", place, label)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:G3")
def test_cvat_s_yolo(tmp_path):
    root = yolo_set(tmp_path / "in", "obj_train_data/{0}.png", "obj_train_data/{0}.txt", names="")
    (root / "obj.names").write_text("crack\n")
    (root / "obj.data").write_text("classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n")
    (root / "train.txt").write_text("".join(f"data/obj_train_data/{k}.png\n" for k in range(10)))
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:G3")
def test_label_studio_s_yolo(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.jpg", "labels/{0}.txt", names="")
    (root / "classes.txt").write_text("crack")
    notes = {"categories": [{"id": 0, "name": "crack"}], "info": {"year": 2026}}
    (root / "notes.json").write_text(json.dumps(notes))
    assert format_of(root) == "yolo"
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:C1")
@pytest.mark.parametrize("place", [".ipynb_checkpoints", "__MACOSX", "images/.thumbnails"])
def test_what_lies_in_hidden_folders_is_not_read(tmp_path, place):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    photograph(root / place / "0.png", 99)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:I5")
def test_class_numbers_may_be_text(tmp_path):
    names = 'names: {"0": crack, "1": hole}\n'
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", names=names)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.parametrize(
    "names", ["names: crack\n", "names: [[a, b]]\n", "names: {a: crack}\n", "names: [null]\n"]
)
def test_names_that_are_none_are_refused(tmp_path, names):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", names=names)
    with pytest.raises(ValueError, match="data.yaml: names are neither"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.parametrize("text", ["names: " + "[" * 5000, "a: &a [x, x]\nnames: [*a, *a]\n"])
def test_a_yaml_that_unpacks_is_refused(tmp_path, text):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", names=text)
    with pytest.raises(ValueError, match="data.yaml"):
        import_dataset(root, tmp_path / "out")


def test_key_points_after_the_box_are_left(tmp_path):
    names = "kpt_shape: [3, 2]\nnames: [crack]\n"
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", names=names)
    for k in range(10):
        (root / f"{k}.txt").write_text(LINE.strip() + " .1 .1 .2 .2 .9 .9\n")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:V6")
@pytest.mark.parametrize("line", ["0 0,5 0,5 0,1 0,1", "0;.5;.5;.1;.1", "crack .5 .5 .1 .1"])
def test_a_yolo_line_that_says_no_numbers_is_named(line):
    with pytest.raises(ValueError, match="^line 1: .*is no number"):
        read_yolo(line, 96, 72, ["crack"])


# --- Pascal VOC ---


@pytest.mark.finding("data.md:G3")
def test_roboflow_s_voc(tmp_path):
    root = tmp_path / "in"
    for split, n, first in (("train", 6, 0), ("valid", 2, 20), ("test", 2, 40)):
        place = f"{split}/{first}{{}}"
        voc_set(root, n, place + ".jpg", place + ".xml")
    (root / "README.roboflow.txt").write_text("exported")
    found = content(import_dataset(root, tmp_path / "out"))
    assert [len(found[s][0]) for s in ("train", "val", "test")] == [6, 2, 2]


@pytest.mark.finding("data.md:G3")
@pytest.mark.parametrize("kind", ["SegmentationClass", "SegmentationObject"])
def test_masks_beside_the_boxes_of_voc(tmp_path, kind, capsys):
    root = voc_set(tmp_path / "in")
    for k in range(10):
        mask_of("palette", root / kind / f"{k}.png")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("\n".join(map(str, range(10))))
    (lists / "crack_trainval.txt").write_text("\n".join(f"{k} 1" for k in range(10)))
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)
    assert "10 masks beside the boxes" in capsys.readouterr().out


# --- COCO ---


@pytest.mark.finding("data.md:F3", "data.md:F3b", "data.md:F5", "data.md:X3")
@pytest.mark.parametrize("kind", [str, float, lambda k: f"{k}.0"])
def test_ids_of_another_type_are_the_same_ids(tmp_path, kind):
    root = tmp_path / "in"
    coco = coco_set(root)
    for annotation in coco["annotations"]:
        annotation |= {key: kind(annotation[key]) for key in ("image_id", "category_id")}
        annotation["bbox"] = [str(v) for v in annotation["bbox"]]
    for image in coco["images"]:
        image["width"] = kind(image["width"])
    coco["categories"][0]["id"] = kind(1)
    write_json(root / "all.json", coco)
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    assert read_json(annotation_file(out, "train"))["categories"] == [{"id": 1, "name": "crack"}]


@pytest.mark.finding("data.md:F4")
@pytest.mark.parametrize("kind", ["polygon", "counts"])
def test_boxes_from_outlines(tmp_path, kind):
    root = tmp_path / "in"
    coco = coco_set(root)
    mask = np.zeros((72, 96), int)
    mask[39:56, 61:73] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2]))).tolist()
    outline = [[61, 39, 73, 39, 73, 56, 61, 56]] if kind == "polygon" else None
    for annotation in coco["annotations"]:
        del annotation["bbox"]
        annotation["segmentation"] = outline or {"size": [72, 96], "counts": runs}
    write_json(root / "all.json", coco)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:F6", "data.md:F6b")
@pytest.mark.parametrize(
    "box, reason",
    [
        ([0.7, 0.6, 0.125, 0.236], "looks like fractions"),
        ([200, 39, 12, 17], "lies outside the 96 x 72 image"),
        ([61, 39, -12, 17], "negative side"),
        ([61, 39, 0, 17], "has no area"),
    ],
)
def test_what_the_doctor_calls_an_error_is_none_of_import_s_boxes(tmp_path, box, reason):
    root = tmp_path / "in"
    coco = coco_set(root)
    coco["annotations"][3]["bbox"] = box
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError, match=f"1 problem.*\n  3.jpg: crack: .*{reason}"):
        import_dataset(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_boxes_that_are_two_corners_are_refused(tmp_path):
    root = tmp_path / "in"
    coco = coco_set(root)
    for annotation in coco["annotations"]:
        annotation["bbox"] = [61, 39, 73, 56]
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError, match="10 of 10 boxes stick out: are they two corners"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.finding("data.md:F7", "data.md:F8")
def test_two_entries_for_one_photograph_are_refused(tmp_path):
    root = tmp_path / "in"
    coco = coco_set(root)
    coco["images"][1]["file_name"] = "cam1/0.jpg"
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError, match="0.jpg is listed 2 times"):
        import_dataset(root, tmp_path / "out", allow="unlisted")


@pytest.mark.finding("data.md:F7")
@pytest.mark.parametrize("part", ["images", "categories"])
def test_an_id_that_is_given_twice_is_refused(tmp_path, part):
    root = tmp_path / "in"
    coco = coco_set(root)
    coco[part].append({"id": 1, "file_name": "x.jpg", "name": "hole"})
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError, match="no id, or one given twice"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.finding("data.md:X3", "data.md:G1")
@pytest.mark.parametrize("said", [None, []])
def test_a_split_without_annotations(tmp_path, said):
    root = tmp_path / "in"
    coco_set(root / "train", 12)
    for k, split in ((30, "valid"), (40, "test")):
        photograph(root / split / f"{k}.jpg", k)
        coco = coco_of_names([f"{k}.jpg"], annotations=said)
        if said is None:
            del coco["annotations"]
        write_json(root / split / "_annotations.coco.json", coco)
    found = content(import_dataset(root, tmp_path / "out"))
    assert [len(found[s][0]) for s in ("train", "val", "test")] == [12, 1, 1]
    assert [len(found[s][1]) for s in ("train", "val", "test")] == [12, 0, 0]


@pytest.mark.finding("data.md:G2")
@pytest.mark.parametrize("name", ["/data/upload/1/a%20b%20{}.jpg", "C:\\lab\\a b {}.jpg"])
def test_names_as_a_web_tool_or_windows_writes_them(tmp_path, name):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / "images" / f"a b {k}.jpg", k)
    write_json(root / "result.json", coco_of_names([name.format(k) for k in range(10)]))
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


def test_a_turned_box_of_cvat_is_gone_around():
    turned = {"bbox": [10, 20, 40, 10], "attributes": {"rotation": 90.0}}
    assert coco_box(turned, (96, 72)) == [25, 5, 10, 40]
    assert coco_box({"bbox": [10, 20, 40, 10], "attributes": {}}, (96, 72)) == [10, 20, 40, 10]
    diamond = coco_box(turned | {"bbox": [0, 0, 10, 10], "attributes": {"rotation": 45}}, (96, 72))
    assert diamond == pytest.approx([5 - 50**0.5, 5 - 50**0.5, 200**0.5, 200**0.5], abs=1e-3)


# --- CVAT and LabelMe ---


@pytest.mark.finding("data.md:G2")
@pytest.mark.parametrize(
    "shape",
    [
        '<box label="crack" xtl="58.5" ytl="41.5" xbr="75.5" ybr="53.5" rotation="90.0"/>',
        '<ellipse label="crack" cx="67" cy="47.5" rx="6" ry="8.5"/>',
        '<polyline label="crack" points="61,39;73,56"/>',
    ],
)
def test_more_shapes_of_cvat(tmp_path, shape):
    root = tmp_path / "in"
    images = []
    for k in range(10):
        photograph(root / "images" / f"{k}.jpg", k)
        images.append(f'<image name="{k}.jpg" width="96" height="72">{shape}</image>')
    (root / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.parametrize(
    "shape, reason",
    [
        ('<points label="crack" points="1,2"/>', "a points has no box"),
        ('<box label="crack" ytl="1" xbr="9" ybr="9"/>', "xtl is missing"),
        ('<polygon label="crack" points="1,x;2,3"/>', "points is no number: 'x'"),
        ('<polygon label="crack"/>', "points is no number"),
    ],
)
def test_a_shape_of_cvat_without_a_box_is_named(tmp_path, shape, reason):
    photograph(tmp_path / "in" / "0.jpg")
    image = f'<annotations><image name="0.jpg" width="96" height="72">{shape}</image></annotations>'
    (tmp_path / "in" / "annotations.xml").write_text(image)
    with pytest.raises(ValueError, match="annotations.xml: 0.jpg: ") as error:
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert reason in str(error.value)


# --- masks and folders ---


@pytest.mark.finding("data.md:I2b")
@pytest.mark.parametrize(
    "place, mask",
    [
        ("train_img/{}.jpg", "train_lab/{}.png"),
        ("images/{}.jpg", "gt/{}.gif"),
        ("images/{}.png", "Ground Truth/{}.png"),
        ("Images/Anomaly/{}.JPG", "Masks/Anomaly/{}.png"),
        ("Class1/Train/{}.png", "Class1/Train/Label/{}_label.png"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    ],
)
def test_folders_of_masks(tmp_path, place, mask):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / place.format(k), k)
        mask_of("palette" if "Segm" in mask else "255", root / mask.format(k))
    assert len(read_masks(root).items) == 10
    boxes = photographs(import_dataset(root, tmp_path / "out"))[1]
    assert [box[2:] for box in boxes] == 10 * [PATCH]


@pytest.mark.finding("data.md:I1")
def test_cvat_s_masks_by_colour(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / "JPEGImages" / f"{k}.jpg", k)
        mask_of("red", root / "SegmentationClass" / f"{k}.png")
        mask_of("7", root / "SegmentationObject" / f"{k}.png")
    names = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncrack:255,0,0::\n"
    (root / "labelmap.txt").write_text(names)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:I1")
def test_inverted_masks_are_refused(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / "Crack" / f"{k}.jpg", k)
        mask_of("255", root / "Crack" / f"{k}.png")
        pixels = 255 - np.asarray(Image.open(root / "Crack" / f"{k}.png"))
        Image.fromarray(pixels).save(root / "Crack" / f"{k}.png")
    with pytest.raises(ValueError, match="10 masks that mark most of their pixels"):
        import_dataset(root, tmp_path / "out")
    out = import_dataset(root, tmp_path / "out", allow="inverted")
    assert photographs(out)[1][0][1:] == ("Crack", 0, 0, 96, 72)


@pytest.mark.finding("data.md:I1b")
def test_folders_that_are_no_classes(tmp_path):
    "KolektorSDD: one folder a part. A name for what the masks show says so."
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / f"kos{k}" / "Part0.jpg", k)
        mask_of("255", root / f"kos{k}" / "Part0_label.bmp")
    out = import_dataset(root, tmp_path / "out", classes="crack")
    boxes = photographs(out)[1]
    assert [box[1:] for box in boxes] == 10 * [("crack", *PATCH)]


@pytest.mark.finding("data.md:R1", "data.md:I1")
def test_masks_of_sixteen_bits(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / "images" / f"{k}.jpg", k)
        on = np.zeros((72, 96), np.uint16)
        on[39:56, 61:73] = 1000
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(on).save(root / "masks" / f"{k}.png")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10, "defect")


# --- the whole set ---


@pytest.mark.finding("data.md:R3")
def test_pages_are_counted(tmp_path, capsys):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt")
    first = Image.open(root / "0.png")
    first.save(root / "0.tiff", save_all=True, append_images=[first.rotate(180)])
    (root / "0.png").unlink()
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)
    assert "1 photographs of several pages: the first is taken" in capsys.readouterr().out


def test_one_piece_of_two_splits_loses_none(tmp_path):
    root = tmp_path / "in"
    for split, first in (("train", 0), ("val", 50)):
        for k in range(6):
            photograph(root / "images" / split / f"{k}.png", first + k)
            label = root / "labels" / split / f"{k}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(LINE)
    (root / "data.yaml").write_text("names: [crack]")
    out = import_dataset(root, tmp_path / "out", one_piece=True)
    images = read_json(out / "annotations.json")["images"]
    assert len(images) == len(list((out / "images").iterdir())) == 12


def test_an_archive_is_refused_by_name(tmp_path):
    yolo_set(tmp_path / "in", "{0}.png", "{0}.txt")
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "in")
    with pytest.raises(ValueError, match="set.zip is a file: unpack an archive first"):
        import_dataset(archive, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        import_dataset(tmp_path / "in", archive)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt")
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (root / "0.png").rename(root / name)
    (root / "0.txt").rename((root / name).with_suffix(".txt"))
    with pytest.raises(ValueError, match="its name is no UTF-8"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.parametrize("far", [1e7, 1e300, -1e300])
def test_a_polygon_far_outside_is_not_drawn(tmp_path, far):
    root = tmp_path / "in"
    coco = coco_set(root)
    coco["annotations"][0] |= {"bbox": None, "segmentation": [[8, 5, far, 5, 28, 20]]}
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError, match="1 problem.*\n  all.json: annotation"):
        import_dataset(root, tmp_path / "out")
