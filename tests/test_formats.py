"""Round trips lose nothing; every layout that tools write is read; what is left over is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deimv2_tfg import cli
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import SPLITS, annotation_file, check_dataset
from deimv2_tfg.formats import (
    Item,
    coco_box,
    read_coco_set,
    read_voc_set,
    read_yolo,
    read_yolo_set,
    split_of,
    write_coco_set,
    write_voc,
    write_yolo,
    yolo_classes,
)
from deimv2_tfg.importing import format_of, import_dataset, mask_parts, read_masks

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def real(name):
    reason = f"the real photographs {SHARED / name} are not there"
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=reason)


def content(root):
    "What a data set says: file name, size and boxes with class names, by split."
    found = {}
    for split in SPLITS:
        coco = read_json(annotation_file(root, split))
        names = {c["id"]: c["name"] for c in coco["categories"]}
        files = {i["id"]: i["file_name"] for i in coco["images"]}
        boxes = []
        for a in coco["annotations"]:
            box = [round(v, 3) for v in a["bbox"]]
            boxes.append((files[a["image_id"]], names[a["category_id"]], *box))
        sizes = {i["file_name"]: (i["width"], i["height"]) for i in coco["images"]}
        found[split] = (sizes, sorted(boxes))
    return found


def photographs(root):
    "The names of all photographs of a data set and its boxes, whatever their split."
    found = content(root)
    names = sorted(name for sizes, _ in found.values() for name in sizes)
    return names, sorted(box for _, boxes in found.values() for box in boxes)


def photograph(path, k=0, size=(96, 72), **options):
    "A grainy photograph with one dark patch at (61, 39), 12 x 17 pixels; `k`: which grain."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(k).integers(100, 160, (size[1], size[0], 3), dtype=np.uint8)
    pixels[39:56, 61:73] = 20
    Image.fromarray(pixels).save(path, **options)
    return path


PATCH = (61, 39, 12, 17)
LINE = f"0 {67 / 96:.6f} {47.5 / 72:.6f} {12 / 96:.6f} {17 / 72:.6f}\n"
XML = (
    "<annotation><filename>{0}</filename><size><width>96</width><height>72</height></size>"
    "<object><name>crack</name><bndbox><xmin>62</xmin><ymin>40</ymin><xmax>73</xmax>"
    "<ymax>56</ymax></bndbox></object></annotation>"
)


def coco_of_names(names, **more):
    "A COCO json in which each photograph shows the patch."
    images, annotations = [], []
    for k, name in enumerate(names, 1):
        images.append({"id": k, "file_name": name, "width": 96, "height": 72})
        one = {"id": k, "image_id": k, "category_id": 1, "bbox": list(PATCH), "iscrowd": 0}
        annotations.append(one | {"area": 204})
    categories = [{"id": 1, "name": "crack", "supercategory": "none"}]
    return {"images": images, "annotations": annotations, "categories": categories} | more


def all_patches(root, n, name="crack"):
    "Whether a data set has `n` photographs, each with the patch."
    names, boxes = photographs(root)
    return len(names) == len(boxes) == n and all(b[1:] == (name, *PATCH) for b in boxes)


@pytest.mark.parametrize("write", [write_voc, write_yolo], ids=["voc", "yolo"])
def test_round_trip(smoke_data, tmp_path, write):
    write(read_coco_set(smoke_data), tmp_path / "foreign")
    home = import_dataset(tmp_path / "foreign", tmp_path / "home")
    assert content(home) == content(smoke_data)
    before = {p.name: p.read_bytes() for p in smoke_data.rglob("*.jpg")}
    after = {p.name: p.read_bytes() for p in home.rglob("*.jpg")}
    assert before == after  # no photograph was encoded again


def test_the_layout_of_the_thesis_is_read_too(smoke_data, tmp_path):
    assert format_of(smoke_data) == "coco"
    assert content(import_dataset(smoke_data, tmp_path / "copy")) == content(smoke_data)


@real("neu-det")
def test_neu_det_with_its_list(tmp_path):
    source = SHARED / "neu-det"
    out = import_dataset(source, tmp_path / "neu")
    cocos = {s: read_json(annotation_file(out, s)) for s in SPLITS}
    sizes = {s: len(c["images"]) for s, c in cocos.items()}
    assert sizes["test"] == 360 and sum(sizes.values()) == 1800
    assert sum(len(c["annotations"]) for c in cocos.values()) == 4189
    listed = set((source / "splits/test.txt").read_text().split())
    assert {Path(i["file_name"]).stem for i in cocos["test"]["images"]} == listed
    for category in cocos["val"]["categories"]:
        assert sum(category["name"] in i["file_name"] for i in cocos["val"]["images"]) >= 25
    for coco in cocos.values():
        for a in coco["annotations"]:
            assert min(a["bbox"][:2]) >= 0 and a["bbox"][0] + a["bbox"][2] <= 200
    assert check_dataset(out, photographs=False).errors == []
    again = import_dataset(write_voc(read_coco_set(out), tmp_path / "voc"), tmp_path / "again")
    assert content(again) == content(out)


@real("magnetic-tile")
def test_magnetic_tile_masks_to_boxes(tmp_path):
    source = SHARED / "magnetic-tile"
    with pytest.raises(ValueError, match="exp4_num_24843.png.*allow 'small'"):
        import_dataset(source, tmp_path / "tiles", whole="Free")
    out = import_dataset(source, tmp_path / "tiles", whole="Free", allow="small")
    cocos = {s: read_json(annotation_file(out, s)) for s in SPLITS}
    assert sum(len(c["images"]) for c in cocos.values()) == 452
    names = [c["name"] for c in cocos["train"]["categories"]]
    assert names == ["Blowhole", "Break", "Crack", "Fray", "Free", "Uneven"]
    masks = {p.stem: p for p in source.glob("*/*.png")}
    for coco in cocos.values():
        for image in coco["images"]:
            if Path(image["file_name"]).stem in masks:
                own = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]
                assert_tight(masks[Path(image["file_name"]).stem], own)
    assert not check_dataset(out).errors


def assert_tight(mask, boxes):
    "Each side of every box touches a pixel of the mask; what no box covers is dust."
    pixels = np.asarray(Image.open(mask).convert("L")) > 127
    covered = np.zeros_like(pixels)
    for x, y, w, h in boxes:
        part = pixels[y : y + h, x : x + w]
        assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
        covered[y : y + h, x : x + w] = True
    assert (pixels & ~covered).sum() <= 0.02 * pixels.sum() + 12


def test_parts_of_masks_are_merged():
    mask = np.zeros((40, 40), bool)
    mask[5:10, 5:10] = mask[5:10, 14:19] = mask[30:35, 30:35] = True
    mask[20, 20] = True
    # a gap of four pixels: one defect; one pixel: dust
    assert mask_parts(mask, 6) == [((5, 5, 14, 5), 50), ((20, 20, 1, 1), 1), ((30, 30, 5, 5), 25)]
    assert [size for _, size in mask_parts(mask, 0)] == [25, 25, 1, 25]
    assert mask_parts(np.zeros((5, 5))) == []
    assert mask_parts(np.eye(6, dtype=bool), 0) == [((0, 0, 6, 6), 6)]  # touching at corners


# --- masks: what a value means ---


def mask_of(kind, path):
    "The patch as a mask of one kind."
    on = np.zeros((72, 96), np.uint8)
    on[39:56, 61:73] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "palette":
        image = Image.fromarray(on, "P")
        image.putpalette([0, 0, 0, 128, 0, 0])
    elif kind == "red":
        image = Image.fromarray(np.stack([255 * on, 0 * on, 0 * on], -1))
    elif kind == "alpha":
        image = Image.fromarray(np.stack([0 * on, 0 * on, 0 * on, 255 * on], -1), "RGBA")
    elif kind == "bilevel":
        image = Image.fromarray(on.astype(bool))
    else:
        image = Image.fromarray(on * int(kind))
    image.save(path)


@pytest.mark.finding("data.md:I1", "data.md:I2", "data.md:I2b")
@pytest.mark.parametrize("kind", ["1", "7", "255", "palette", "red", "alpha", "bilevel"])
@pytest.mark.parametrize("ending", [".png", ".PNG", "_mask.png"])
def test_any_mask_that_is_not_empty_is_a_defect(tmp_path, kind, ending):
    for k in range(10):
        photograph(tmp_path / "in" / "Crack" / f"{k}.jpg", k)
        mask_of(kind, tmp_path / "in" / "Crack" / f"{k}{ending}")
    assert all_patches(import_dataset(tmp_path / "in", tmp_path / "out"), 10, "Crack")


@pytest.mark.finding("data.md:I1b")
def test_classes_whose_masks_differ_in_kind_all_stay(tmp_path):
    for k in range(10):
        for name, kind in (("Crack", "1"), ("Hole", "255")):
            photograph(tmp_path / "in" / name / f"{name}{k}.jpg", k)
            mask_of(kind, tmp_path / "in" / name / f"{name}{k}.png")
    out = import_dataset(tmp_path / "in", tmp_path / "out", by="name")
    assert {box[1] for box in photographs(out)[1]} == {"Crack", "Hole"}


@pytest.mark.finding("data.md:I2b")
def test_a_photograph_whose_mask_is_missing_is_refused(tmp_path):
    for k in range(10):
        photograph(tmp_path / "in" / "Crack" / f"{k}.jpg", k)
        if k:
            mask_of("255", tmp_path / "in" / "Crack" / f"{k}.png")
    with pytest.raises(ValueError, match="1 photographs without a label file .Crack/0.jpg"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = import_dataset(tmp_path / "in", tmp_path / "out", allow="unlabelled")
    assert [len(part) for part in photographs(out)] == [10, 9]


@pytest.mark.finding("data.md:I2b")
def test_a_mask_without_photograph_is_refused(tmp_path):
    for k in range(10):
        photograph(tmp_path / "in" / "Crack" / f"{k}.jpg", k)
        mask_of("255", tmp_path / "in" / "Crack" / f"{k}.png")
    mask_of("255", tmp_path / "in" / "Crack" / "nobody_mask.png")
    with pytest.raises(ValueError, match="1 masks without a photograph .Crack/nobody_mask.png"):
        import_dataset(tmp_path / "in", tmp_path / "out")


@pytest.mark.finding("data.md:I8")
def test_small_parts_are_counted_and_no_photograph_turns_good_in_silence(tmp_path, capsys):
    for k in range(10):
        photograph(tmp_path / "in" / "Crack" / f"{k}.jpg", k)
        on = np.zeros((72, 96), np.uint8)
        on[10:13, 10:13] = 255  # nine pixels
        if k:
            on[39:56, 61:73] = 255
        Image.fromarray(on).save(tmp_path / "in" / "Crack" / f"{k}.png")
    with pytest.raises(ValueError, match="lose all their boxes"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert "10 parts of a mask under 12 pixels, left out" in capsys.readouterr().out
    out = import_dataset(tmp_path / "in", tmp_path / "out", min_pixels=5)
    assert len(photographs(out)[1]) == 19


@pytest.mark.finding("data.md:I1")
def test_values_that_say_no_class_are_named(tmp_path):
    for k in range(10):
        photograph(tmp_path / "in" / "images" / f"{k}.jpg", k)
        on = np.zeros((72, 96), np.uint8)
        on[39:56, 61:73], on[5:15, 5:15] = 1, 2
        (tmp_path / "in" / "masks").mkdir(exist_ok=True)
        Image.fromarray(on).save(tmp_path / "in" / "masks" / f"{k}.png")
    with pytest.raises(ValueError, match="values 1, 2"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    out = import_dataset(tmp_path / "in", tmp_path / "out", classes="crack,hole")
    boxes = {box[1:] for box in photographs(out)[1]}
    assert boxes == {("crack", *PATCH), ("hole", 5, 5, 10, 10)}


def test_a_smooth_picture_is_no_mask(tmp_path):
    photograph(tmp_path / "in" / "Crack" / "0.jpg")
    Image.radial_gradient("L").resize((96, 72)).save(tmp_path / "in" / "Crack" / "0.png")
    found = read_masks(tmp_path / "in")
    assert "not a mask of few values" in found.problems[0]


def test_mvtec_s_folders(tmp_path):
    root = tmp_path / "in"
    for k in range(12):
        photograph(root / "test" / "crack" / f"{k:03d}.png", k)
        photograph(root / "test" / "good" / f"{k:03d}.png", 20 + k)
        photograph(root / "train" / "good" / f"{k:03d}.png", 40 + k)
        mask_of("255", root / "ground_truth" / "crack" / f"{k:03d}_mask.png")
    found = read_masks(root)
    assert not found.problems and not found.left
    assert sum(len(item.boxes) for item in found.items) == 12 and len(found.items) == 36
    assert all(box == ("crack", *PATCH) for item in found.items for box in item.boxes)


# --- YOLO ---


def test_yolo_arrangements_and_faults(tmp_path):
    root = tmp_path / "in"
    for split in ("train", "valid", "test"):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True)
        Image.new("L", (100, 50)).save(root / split / "images" / "a.png")
        Image.new("L", (20, 20)).save(root / split / "images" / "b.png")
        text = "1 0.5 0.5 0.2 0.4\n0 0 0 1 0 1 1 0 1\n"
        (root / split / "labels" / "a.txt").write_text(text)
    (root / "data.yaml").write_text("nc: 2\nnames: {0: dent, 1: hole}\n")
    out = import_dataset(root, tmp_path / "out")
    boxes = [("a.png", "dent", 0, 0, 100, 50), ("a.png", "hole", 40, 15, 20, 20)]
    assert content(out)["val"] == ({"a.png": (100, 50), "b.png": (20, 20)}, boxes)
    (root / "test/labels/b.txt").write_text("7 .5 .5 .1 .1")
    (root / "train/labels/b.txt").write_text("0 5 5 10 10")
    with pytest.raises(ValueError, match="2 problem") as error:
        import_dataset(root, tmp_path / "out2")
    assert "class 7 of 2 has no name" in str(error.value) and "pixels?" in str(error.value)
    with pytest.raises(ValueError, match="line 2"):
        read_yolo("0 .5 .5 .1 .1\n0 .5 .5", 10, 10, ["a"])


def yolo_set(root, place, label, n=10, names="names: [crack]\n"):
    "A YOLO set; `place` and `label` are patterns of the files of photograph k."
    for k in range(n):
        photograph(root / place.format(k), k)
        text = root / label.format(k)
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(LINE)
    if names:
        (root / "data.yaml").write_text(names)
    return root


@pytest.mark.finding("data.md:I2", "data.md:I3", "data.md:I4", "data.md:G3")
@pytest.mark.parametrize(
    "place, label",
    [
        ("{0}.png", "{0}.txt"),
        ("images/{0}.png", "labels/{0}.txt"),
        ("images/{0}.png", "Labels/{0}.txt"),
        ("images/{0}.png", "labels/{0}.png.txt"),
        ("images/line2/{0}.png", "labels/line2/{0}.txt"),
        ("train/images/{0}.PNG", "train/labels/{0}.txt"),
        ("images/train/line2/{0}.png", "labels/train/line2/{0}.txt"),
        ("obj_train_data/{0}.png", "obj_train_data/{0}.txt"),
    ],
)
def test_yolo_layouts_that_name_no_splits_are_dealt(tmp_path, place, label):
    root = yolo_set(tmp_path / "in", place, label)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:G3")
def test_yolo_by_list_files(tmp_path):
    names = "train: train.txt\nval: val.txt\ntest: test.txt\nnames: [crack]\n"
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt", 10, names)
    for split, numbers in (("train", range(6)), ("val", (6, 7)), ("test", (8, 9))):
        lines = [f"./images/{k}.png" for k in numbers]
        (root / f"{split}.txt").write_text("\n".join(lines))
    sizes = {
        split: len(found[0])
        for split, found in content(import_dataset(root, tmp_path / "o")).items()
    }
    assert sizes == {"train": 6, "val": 2, "test": 2}


@pytest.mark.finding("data.md:G4")
def test_yolo_without_test_takes_it_from_train(tmp_path):
    root = tmp_path / "in"
    yolo_set(root, "images/train/{0}.png", "labels/train/{0}.txt", 20)
    for k in (30, 31):
        photograph(root / "images" / "val" / f"{k}.png", k)
        (root / "labels" / "val").mkdir(exist_ok=True)
        (root / "labels" / "val" / f"{k}.txt").write_text(LINE)
    found = content(import_dataset(root, tmp_path / "out"))
    assert {split: len(found[split][0]) for split in SPLITS} == {"train": 16, "val": 2, "test": 4}


@pytest.mark.finding("data.md:I5")
def test_yolo_s_numbers_are_kept(tmp_path):
    names = "names: {1: crack, 2: hole}\n"
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", 10, names)
    with pytest.raises(ValueError, match="class 0 of 2 has no name"):
        import_dataset(root, tmp_path / "out")
    for k in range(10):
        (root / f"{k}.txt").write_text("1" + LINE[1:])
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    categories = read_json(annotation_file(out, "train"))["categories"]
    assert categories == [{"id": 1, "name": "crack"}, {"id": 2, "name": "hole"}]


@pytest.mark.finding("data.md:I3")
def test_label_files_that_match_nothing_are_refused(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    (root / "labels" / "0.txt").rename(root / "labels" / "nobody.txt")
    with pytest.raises(ValueError, match="1 label files without a photograph .labels/nobody.txt"):
        import_dataset(root, tmp_path / "out")
    out = import_dataset(root, tmp_path / "out", allow=("labels",))
    assert [len(part) for part in photographs(out)] == [10, 9]


@pytest.mark.finding("data.md:I3")
def test_a_set_without_any_label_is_refused(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    shutil.rmtree(root / "labels")
    with pytest.raises(ValueError, match="10 photographs without a label file"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.finding("data.md:I3")
def test_the_balance_is_printed(tmp_path, capsys):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    (root / "labels" / "0.txt").unlink()
    import_dataset(root, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "10 photographs, 9 with boxes, 1 without; 9 boxes of 1 classes" in printed
    assert "1 photographs without a text file: no object on them" in printed


@pytest.mark.finding("data.md:B2", "data.md:G3")
@pytest.mark.parametrize("name", ["classes.txt", "labels/classes.txt", "obj.names"])
def test_class_names_in_a_text_file(tmp_path, name):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt", names="")
    (root / name).write_text("\ufeffcrack\n", encoding="utf-8")
    assert yolo_classes(root) == {0: "crack"}
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:B2")
def test_byte_order_marks_are_no_text(tmp_path):
    names = "\ufefftrain: train.txt\nnames: [crack]\n"
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt", 10, names)
    (root / "labels" / "0.txt").write_text("\ufeff" + LINE, encoding="utf-8")
    for split, numbers in (("train", range(6)), ("val", (6, 7)), ("test", (8, 9))):
        lines = "\n".join(f"images/{k}.png" for k in numbers)
        (root / f"{split}.txt").write_text("\ufeff" + lines, encoding="utf-8")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:C1")
def test_hidden_files_are_not_read(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    (root / "images" / "._0.png").write_bytes(b"\0\5\x16\7")
    (root / "labels" / "._0.txt").write_bytes(b"\0\5\x16\7")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:C2", "data.md:R1")
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "16 bit"])
def test_a_photograph_that_cannot_be_read_is_a_problem_with_its_name(tmp_path, damage):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    path = root / "images" / "3.png"
    if damage == "16 bit":
        Image.fromarray(np.full((72, 96), 40000, np.uint16)).save(path)
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[:30], "empty": b"", "text": b"x" * 99}[damage]
        )
    with pytest.raises(ValueError, match=r"1 problem.*\n  images/3.png: "):
        import_dataset(root, tmp_path / "out")


@pytest.mark.finding("data.md:I6")
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_photograph_is_stored_as_it_was_annotated(tmp_path, orientation):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    upright = Image.open(root / "images" / "0.png")
    stored = upright.transpose({3: Image.ROTATE_180, 6: Image.ROTATE_90}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (root / "images" / "0.png").unlink()
    stored.save(root / "images" / "0.jpg", exif=exif, quality=95)
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    (path,) = out.rglob("0.png")
    written = Image.open(path)
    assert written.size == (96, 72) and not written.getexif().get(0x0112)
    x, y, w, h = PATCH
    grey = np.asarray(written.convert("L"))
    assert grey[y : y + h, x : x + w].mean() < 40 < 100 < grey[: y - 3].mean()


# --- Pascal VOC ---


def voc_set(root, n=10, place="JPEGImages/{}.jpg", label="Annotations/{}.xml", xml=XML):
    for k in range(n):
        photograph(root / place.format(k), k)
        path = root / label.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml.format(f"{k}.jpg"))
    return root


@pytest.mark.finding("data.md:G3")
@pytest.mark.parametrize(
    "place, label",
    [
        ("{}.jpg", "{}.xml"),
        ("JPEGImages/{}.jpg", "Annotations/{}.xml"),
        ("IMAGES/{}.JPG", "ANNOTATIONS/{}.XML"),
        ("train/{}.jpg", "train/{}.xml"),
    ],
)
def test_voc_without_lists_is_dealt(tmp_path, place, label):
    root = voc_set(tmp_path / "in", place=place, label=label)
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


@pytest.mark.finding("data.md:V6")
def test_voc_faults_are_listed_at_once(tmp_path, smoke_data):
    voc = write_voc(read_coco_set(smoke_data), tmp_path / "voc")
    names = sorted((voc / "Annotations").iterdir())
    names[0].write_text("<annotation>")
    names[1].unlink()
    with (voc / "ImageSets/Main/test.txt").open("a") as list_file:
        list_file.write("nobody\n")
    with pytest.raises(ValueError, match="3 problem") as error:
        import_dataset(voc, tmp_path / "out")
    for word in (names[0].name, names[1].stem, "nobody"):
        assert word in str(error.value)


def test_a_name_without_suffix_and_fractions_of_a_pixel(tmp_path):
    for folder in ("IMAGES", "ANNOTATIONS", "lists"):
        (tmp_path / folder).mkdir()
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30.5</ymax>"
    size = "<size><width>40</width><height>30</height></size>"
    thing = f"<object><name>scratch</name><bndbox>{box}</bndbox></object>"
    for k in range(12):
        Image.new("L", (40, 30)).save(tmp_path / "IMAGES" / f"s_{k}.jpg")
        text = f"<annotation><filename>s_{k}</filename>{size}{thing}</annotation>"
        (tmp_path / "ANNOTATIONS" / f"s_{k}.xml").write_text(text)
    (tmp_path / "lists/train.txt").write_text("\n".join(f"s_{k}" for k in range(9)))
    (tmp_path / "lists/test.txt").write_text("s_9\ns_10\ns_11")
    found = content(import_dataset(tmp_path, tmp_path / "out"))
    assert [len(found[s][0]) for s in SPLITS] == [8, 1, 3]
    assert found["test"][1][0] == ("s_10.jpg", "scratch", 0, 0, 40, 30.5)


@pytest.mark.finding("data.md:V1", "data.md:V6")
def test_spaces_in_names_and_flags_in_lists(tmp_path):
    root = voc_set(
        tmp_path / "in", 10, "JPEGImages/steel plate {}.jpg", "Annotations/steel plate {}.xml"
    )
    lists = {"train": range(6), "val": (6, 7), "test": (8, 9)}
    for split, numbers in lists.items():
        flag = " 1" if split == "val" else ""
        text = "\n".join(f"steel plate {k}{flag}" for k in numbers)
        (root / f"{split}.txt").write_text(text)
    found = content(import_dataset(root, tmp_path / "out"))
    assert {s: len(found[s][0]) for s in SPLITS} == {"train": 6, "val": 2, "test": 2}


@pytest.mark.finding("data.md:V2")
@pytest.mark.parametrize("size", ["<width>0</width><height>0</height>", None])
def test_a_size_that_the_xml_lacks_is_the_photograph_s(tmp_path, size, capsys):
    own = "<size><width>96</width><height>72</height></size>"
    xml = XML.replace(own, f"<size>{size}</size>" if size else "")
    if size is None:
        assert "<size>" not in xml
    out = import_dataset(voc_set(tmp_path / "in", xml=xml), tmp_path / "out")
    assert all_patches(out, 10)
    assert "10 sizes taken from the photograph" in capsys.readouterr().out
    assert not [e for e in check_dataset(out).errors if "size" in e.message]


@pytest.mark.finding("data.md:V3")
def test_a_good_part_without_xml_is_allowed_by_name(tmp_path):
    root = voc_set(tmp_path / "in")
    photograph(root / "JPEGImages" / "good.jpg", 77)
    with pytest.raises(ValueError, match="1 photographs without a label file .JPEGImages/good.jpg"):
        import_dataset(root, tmp_path / "out")
    out = import_dataset(root, tmp_path / "out", allow="unlabelled")
    assert [len(part) for part in photographs(out)] == [11, 10]


@pytest.mark.finding("data.md:V4")
def test_a_corner_at_zero_says_how_the_tool_counts(tmp_path, capsys):
    xml = XML.replace("62", "61").replace("40", "39")
    root = voc_set(tmp_path / "in", xml=xml)
    corner = xml.replace("<xmin>61", "<xmin>0").replace("<ymin>39", "<ymin>0")
    (root / "Annotations" / "0.xml").write_text(corner.format("0.jpg"))
    boxes = photographs(import_dataset(root, tmp_path / "out"))[1]
    assert boxes[0] == ("0.jpg", "crack", 0, 0, 73, 56)
    assert boxes[1] == ("1.jpg", "crack", *PATCH)
    assert "counts pixels from 0" in capsys.readouterr().out


@pytest.mark.finding("data.md:V6")
@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("<xmin>62</xmin>", "xmin is missing"),
        ("<xmin>61,5</xmin>", "xmin is no number: '61,5'"),
        ("NOBOX", "object crack has no bndbox"),
    ],
)
def test_what_an_xml_lacks_is_said_in_words(tmp_path, wrong, reason):
    root = voc_set(tmp_path / "in")
    text = XML.format("0.jpg")
    if wrong == "NOBOX":
        text = text.replace("bndbox", "polygon")
    else:
        text = text.replace("<xmin>62</xmin>", "" if "missing" in reason else wrong)
    (root / "Annotations" / "0.xml").write_text(text)
    with pytest.raises(ValueError, match="0.xml: not a Pascal VOC annotation") as error:
        import_dataset(root, tmp_path / "out")
    assert reason in str(error.value)


@pytest.mark.finding("data.md:V7")
def test_difficult_objects_are_counted(tmp_path, capsys):
    xml = XML.replace("<bndbox>", "<difficult>1</difficult><bndbox>")
    import_dataset(voc_set(tmp_path / "in", xml=xml), tmp_path / "out")
    assert "10 objects marked as difficult" in capsys.readouterr().out


@pytest.mark.finding("data.md:I6")
@pytest.mark.parametrize("orientation, reason", [(3, "turns it"), (6, "turns it")])
def test_voc_on_a_turned_photograph_is_refused_where_it_cannot_be_told(
    tmp_path, orientation, reason
):
    root = voc_set(tmp_path / "in")
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(root / "JPEGImages" / "0.jpg", exif=exif)
    with pytest.raises(ValueError, match=f"JPEGImages/0.jpg: .*{reason}"):
        import_dataset(root, tmp_path / "out")


def test_entities_are_refused(tmp_path):
    root = voc_set(tmp_path / "in")
    (tmp_path / "secret").write_text("secret")
    entity = f'<!DOCTYPE a [<!ENTITY b SYSTEM "file://{tmp_path}/secret">]>'
    text = entity + XML.format("0.jpg").replace("crack", "&b;")
    (root / "Annotations" / "0.xml").write_text(text)
    with pytest.raises(ValueError, match="0.xml: not readable as XML") as error:
        import_dataset(root, tmp_path / "out")
    assert "secret" not in str(error.value).replace("file://", "")


def test_yaml_tags_are_refused(tmp_path):
    evil = "names: !!python/object/apply:os.system ['touch evil']\n"
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt", names=evil)
    with pytest.raises(ValueError, match="not readable as YAML"):
        import_dataset(root, tmp_path / "out")


# --- COCO and other tools ---


@pytest.mark.finding("data.md:G2")
@pytest.mark.parametrize(
    "json_file, place, file_name",
    [
        ("annotations/instances_default.json", "images/{}.jpg", "{}.jpg"),
        ("result.json", "images/{}.jpg", "images/{}.jpg"),
        ("result.json", "images/{}.jpg", "images\\{}.jpg"),
        ("result.json", "images/{}.jpg", "/data/local-files/1/{}.jpg"),
        ("all.json", "{}.jpg", "{}.jpg"),
        ("all.json", "photographs/{}.jpg", "{}.jpg"),
        ("all.json", "cam0/day1/{}.jpg", "day1/{}.jpg"),
    ],
)
def test_coco_in_one_file(tmp_path, json_file, place, file_name):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / place.format(k), k)
    write_json(root / json_file, coco_of_names([file_name.format(k) for k in range(10)]))
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    assert read_json(annotation_file(out, "val"))["categories"] == [{"id": 1, "name": "crack"}]


@pytest.mark.finding("data.md:G2")
def test_the_photographs_of_a_json_may_lie_anywhere(tmp_path):
    for k in range(10):
        photograph(tmp_path / "elsewhere" / f"{k}.jpg", k)
    path = write_json(tmp_path / "all.json", coco_of_names([f"{k}.jpg" for k in range(10)]))
    elsewhere = str(tmp_path / "elsewhere")
    assert all_patches(import_dataset(path, tmp_path / "out", photographs=elsewhere), 10)


@pytest.mark.finding("data.md:G1", "data.md:X1")
def test_roboflow_s_coco(tmp_path):
    root, number = tmp_path / "in", 0
    for split, n in (("train", 6), ("valid", 2), ("test", 2)):
        names = [f"{number + k}.jpg" for k in range(n)]
        for k, name in enumerate(names):
            photograph(root / split / name, number + k)
        number += n
        parent = {"id": 0, "name": "defects", "supercategory": "none"}
        child = {"id": 1, "name": "crack", "supercategory": "defects"}
        coco = coco_of_names(names, categories=[parent, child])
        write_json(root / split / "_annotations.coco.json", coco)
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    assert {s: len(content(out)[s][0]) for s in SPLITS} == {"train": 6, "val": 2, "test": 2}
    assert read_json(annotation_file(out, "train"))["categories"] == [{"id": 1, "name": "crack"}]


def test_splits_are_named_by_folder_or_json():
    root = Path("set")
    for name, split in (
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_val2017.json", "val"),
        ("valid/images/x.png", "val"),
        ("images/Test/x.png", "test"),
        ("annotations/instances_default.json", ""),
        ("images/train_0001.png", ""),
        ("images/contest/x.png", ""),
    ):
        assert split_of(root / name, root) == split, name


@pytest.mark.finding("data.md:F4", "data.md:F5")
def test_a_box_follows_from_its_outline():
    polygon = {"segmentation": [[61, 39, 73, 39, 73, 56, 61, 56]]}
    assert coco_box(polygon, (96, 72)) == list(PATCH)
    counts = [0, 4, 12]  # a run of 0, four marked pixels, the rest
    assert coco_box({"segmentation": {"size": [4, 4], "counts": counts}}, (4, 4)) == [0, 0, 1, 4]
    assert coco_box({"bbox": ["61", "39", "12", "17"]}, (96, 72)) == list(PATCH)
    for wrong in ({"bbox": [1, 2, 3]}, {"bbox": [1, 2, "x", 4]}, {}):
        with pytest.raises(ValueError):
            coco_box(wrong, (96, 72))


@pytest.mark.finding("data.md:F3")
def test_annotations_that_are_lost_are_problems(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / f"{k}.jpg", k)
    coco = coco_of_names([f"{k}.jpg" for k in range(10)])
    coco["annotations"][0]["image_id"] = 99
    coco["annotations"][1]["category_id"] = 5
    coco["annotations"][2]["bbox"] = [1, 2, 3]
    coco["images"][4]["file_name"] = "../../etc/passwd"
    write_json(root / "all.json", coco)
    with pytest.raises(ValueError) as error:
        import_dataset(root, tmp_path / "out")
    for word in (
        "no image 99",
        "no category 5",
        "is not four numbers",
        "passwd: no such photograph",
    ):
        assert word in str(error.value)


def test_a_photograph_that_no_json_lists_is_left_over(tmp_path):
    root = tmp_path / "in"
    for k in range(11):
        photograph(root / f"{k}.jpg", k)
    write_json(root / "all.json", coco_of_names([f"{k}.jpg" for k in range(10)]))
    with pytest.raises(ValueError, match="1 photographs that are in no list .10.jpg"):
        import_dataset(root, tmp_path / "out")
    assert all_patches(import_dataset(root, tmp_path / "out", allow="unlisted"), 10)


@pytest.mark.finding("data.md:F1")
def test_boxes_drawn_at_another_size_are_refused(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / f"{k}.jpg", k, (192, 144))
    write_json(root / "all.json", coco_of_names([f"{k}.jpg" for k in range(10)]))
    with pytest.raises(ValueError, match="192 x 144, but annotated as 96 x 72"):
        import_dataset(root, tmp_path / "out")


@pytest.mark.finding("data.md:I6")
def test_coco_that_was_annotated_upright(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / f"{k}.jpg", k)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(root / "0.jpg").transpose(Image.ROTATE_90)
    stored.save(root / "0.jpg", exif=exif, quality=95)
    write_json(root / "all.json", coco_of_names([f"{k}.jpg" for k in range(10)]))
    out = import_dataset(root, tmp_path / "out")
    assert all_patches(out, 10)
    (path,) = out.rglob("0.png")
    assert np.asarray(Image.open(path).convert("L"))[39:56, 61:73].mean() < 40


def test_cvat_s_own_format(tmp_path):
    root = tmp_path / "in"
    shapes = (
        '<box label="crack" xtl="61" ytl="39" xbr="73" ybr="56"/>',
        '<polygon label="crack" points="61,39;73,39;73,56;61,56"/>',
        '<mask label="crack" left="61" top="39" width="12" height="17" rle="0, 204"/>',
    )
    images = []
    for k in range(12):
        photograph(root / "images" / f"{k}.jpg", k)
        image = f'<image id="{k}" name="{k}.jpg" width="96" height="72">{shapes[k % 3]}</image>'
        images.append(image)
    text = f"<annotations><version>1.1</version>{''.join(images)}</annotations>"
    (root / "annotations.xml").write_text(text)
    assert format_of(root) == "cvat"
    assert all_patches(import_dataset(root, tmp_path / "out"), 12)
    track = '<annotations><track id="0" label="crack"/></annotations>'
    (root / "annotations.xml").write_text(track)
    with pytest.raises(ValueError, match="export for images"):
        import_dataset(root, tmp_path / "out2")


def test_labelme(tmp_path):
    root = tmp_path / "in"
    polygon = {"label": "crack", "points": [[61, 39], [73, 40], [70, 56]], "shape_type": "polygon"}
    box = {"label": "crack", "points": [[73, 56], [61, 39]], "shape_type": "rectangle"}
    for k in range(10):
        photograph(root / f"{k}.jpg", k)
        said = {"imagePath": f"..\\raw\\{k}.jpg", "imageWidth": 96, "imageHeight": 72}
        (root / f"{k}.json").write_text(json.dumps(said | {"shapes": [polygon if k % 2 else box]}))
    assert format_of(root) == "labelme"
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


def test_folders_by_class_only_where_it_is_asked_for(tmp_path):
    for k in range(12):
        photograph(tmp_path / "in" / ("crack" if k % 2 else "good") / f"{k}.jpg", k)
    with pytest.raises(ValueError, match="format=folders"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    out = import_dataset(tmp_path / "in", tmp_path / "out", format="folders")
    names, boxes = photographs(out)
    assert len(names) == 12 and {box[1:] for box in boxes} == {("crack", 0, 0, 96, 72)}


# --- dealing and writing ---


def test_copies_of_one_photograph_go_together(tmp_path):
    root = tmp_path / "in"
    for k in range(20):
        for copy in range(2):
            photograph(root / f"{k}_{copy}.jpg", k, quality=95 - copy)
            (root / f"{k}_{copy}.txt").write_text(LINE)
    (root / "classes.txt").write_text("crack")
    found = content(import_dataset(root, tmp_path / "out"))
    for k in range(20):
        homes = {s for s in SPLITS for name in found[s][0] if name.startswith(f"{k}_")}
        assert len(homes) == 1


@pytest.mark.finding("data.md:S1")
def test_no_split_is_ever_empty(tmp_path):
    root = tmp_path / "in"
    for k in range(10):
        photograph(root / f"{k}.jpg", 0)  # all of them are one photograph
        (root / f"{k}.txt").write_text(LINE)
    (root / "classes.txt").write_text("crack")
    with pytest.raises(ValueError, match="10 of 10 photographs show the same"):
        import_dataset(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert all_patches(import_dataset(root, tmp_path / "out", by="name"), 10)


def test_one_piece_is_left_for_split(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    out = import_dataset(root, tmp_path / "out", one_piece=True)
    coco = read_json(out / "annotations.json")
    assert len(coco["images"]) == len(coco["annotations"]) == 10
    assert {p.name for p in (out / "images").iterdir()} == {i["file_name"] for i in coco["images"]}


def test_photographs_of_one_name_from_two_folders(tmp_path):
    root = tmp_path / "in"
    for k in range(12):
        for line in ("line1", "line2"):
            photograph(root / "images" / "train" / line / f"{k}.png", k + 50 * (line == "line1"))
            text = root / "labels" / "train" / line / f"{k}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(LINE)
    (root / "data.yaml").write_text("names: [crack]")
    assert all_patches(import_dataset(root, tmp_path / "out"), 24)


def test_two_photographs_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / folder / "x.png")
    both = [Item(tmp_path / folder / "x.png", (9, 9)) for folder in "ab"]
    with pytest.raises(ValueError, match="x.png"):
        write_coco_set(tmp_path / "out" / "train.json", both, {})


def test_a_link_that_leads_out_is_not_read(tmp_path):
    root = yolo_set(tmp_path / "in", "images/{0}.png", "labels/{0}.txt")
    photograph(tmp_path / "outside.png", 99)
    (root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    assert all_patches(import_dataset(root, tmp_path / "out"), 10)


def test_an_unknown_word_is_refused_with_what_there_is(tmp_path):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt")
    with pytest.raises(ValueError, match="choose from unlabelled, labels"):
        import_dataset(root, tmp_path / "out", allow="everything")
    with pytest.raises(ValueError, match="choose coco, voc, yolo"):
        import_dataset(root, tmp_path / "out", format="xml")


def test_import_from_the_command_line(tmp_path, smoke_data, capsys):
    write_yolo(read_coco_set(smoke_data), tmp_path / "yolo")
    assert cli.main(["import", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == content(smoke_data)
    assert "24 photographs" in capsys.readouterr().out
    assert cli.main(["import", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "nothing"), str(tmp_path / "o")]) == 2


def test_readers_keep_what_they_read(smoke_data, tmp_path):
    voc = read_voc_set(write_voc(read_coco_set(smoke_data), tmp_path / "voc"))
    yolo = read_yolo_set(write_yolo(read_coco_set(smoke_data), tmp_path / "yolo"))
    for found in (voc, yolo):
        assert not found.problems and not found.left
        assert len(found.items) == 24


@pytest.mark.parametrize("box", ["0 .5 .5 0 .1", "0 .5 .5 nan .1", "0 .5 .5 inf .1"])
def test_a_box_without_area_is_a_problem(tmp_path, box):
    root = yolo_set(tmp_path / "in", "{0}.png", "{0}.txt")
    (root / "0.txt").write_text(box)
    with pytest.raises(ValueError, match="0.png|0.txt"):
        import_dataset(root, tmp_path / "out")
