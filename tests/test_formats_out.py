"""Predictions in other formats: what is written is read back, and nothing is lost on the way."""

from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from deimv2_tfg.core import read_json
from deimv2_tfg.formats import read_coco_set, read_cvat, read_voc_set, read_yolo_set, xml_root
from deimv2_tfg.formats_out import WRITERS, Found, flat_names, write_found
from deimv2_tfg.importing import import_dataset, read_folders

CLASSES = {"rayón": 1, "hole & edge": 4}
READERS = {"yolo": read_yolo_set, "voc": read_voc_set, "coco": read_coco_set, "cvat": read_cvat}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Photographs with finds: two of one name, one that EXIF turns, one without a find."""
    root = tmp_path_factory.mktemp("line")
    rng = np.random.default_rng(0)
    items = []
    for name in ("top/a.jpg", "side/a.jpg", "a.png", "turned.jpg", "empty.jpg"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        if name == "turned.jpg":
            exif[0x0112] = 6
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)
        size = (48, 64) if name == "turned.jpg" else (64, 48)
        boxes = [("rayón", 3.25, 4.5, 20.31, 10.0), ("hole & edge", 0.0, 30.2, size[0], 17.8)]
        boxes = [] if name == "empty.jpg" else boxes
        items.append(Found(path, size, boxes, name=name, scores=[0.75, 0.5][: len(boxes)]))
    return items


@pytest.fixture(scope="module")
def out(found, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_found(found, CLASSES, WRITERS, out)
    return out


def expected(found):
    names = flat_names([item.name for item in found])
    names = [name.replace("turned.jpg", "turned.png") for name in names]  # stored upright
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", READERS)
def test_boxes_and_names_come_back(found, out, name):
    back = {item.path.name: item for item in READERS[name](out / name).items}
    assert back.keys() == expected(found).keys()
    for file, item in expected(found).items():
        assert back[file].size == item.size
        ours, theirs = sorted(item.boxes), sorted(box[:5] for box in back[file].boxes)
        assert [box[0] for box in theirs] == [box[0] for box in ours]
        for one, other in zip(ours, theirs, strict=True):
            assert other[1:] == pytest.approx(one[1:], abs=0.01)


@pytest.mark.parametrize("name", ["yolo", "voc", "coco", "cvat"])
def test_the_importer_takes_it(out, name, tmp_path):
    import_dataset(out / name, tmp_path / "set", allow="unlabelled", one_piece=True)


def test_scores_reach_cvat_and_label_studio(found, out):
    tree = xml_root(out / "cvat" / "annotations.xml")
    for image in tree.iter("image"):
        item = expected(found)[image.get("name")]
        scores = [float(box.find("attribute[@name='score']").text) for box in image]
        assert scores == item.scores
    labels = read_json(out / "cvat" / "labels.json")
    assert [label["name"] for label in labels] == list(CLASSES)
    assert labels[0]["attributes"][0]["name"] == "score"
    tasks = read_json(out / "labelstudio" / "tasks.json")
    for task, (name, item) in zip(tasks, expected(found).items(), strict=True):
        place = unquote(task["data"]["image"].partition("?d=")[2])
        assert place == f"labelstudio/images/{name}" and (out / place).is_file()
        (said,) = task["predictions"]
        assert said["score"] == min(item.scores, default=0)
        for one, box, score in zip(said["result"], item.boxes, item.scores, strict=True):
            value = one["value"]
            sides = [value[side] / 100 for side in ("x", "y", "width", "height")]
            assert np.multiply(sides, (*item.size, *item.size)) == pytest.approx(box[1:])
            assert (value["rectanglelabels"], one["score"]) == ([box[0]], score)
            assert (one["original_width"], one["original_height"]) == item.size
    view = xml_root(out / "labelstudio" / "config.xml")
    assert [label.get("value") for label in view.iter("Label")] == list(CLASSES)
    assert one["from_name"] == view.find("RectangleLabels").get("name")
    assert one["to_name"] == view.find("Image").get("name")


def test_crops_are_the_pixels_of_the_boxes(found, out):
    crops = read_folders(out / "crops").items
    assert len(crops) == sum(len(item.boxes) for item in found)
    with (
        Image.open(out / "crops" / "rayón" / "a_1.png") as crop,
        Image.open(found[2].path) as own,
    ):
        assert np.array_equal(np.asarray(crop), np.asarray(own)[4:15, 3:24])
    with Image.open(out / "crops" / "hole _ edge" / "a_2.png") as crop:
        assert crop.size == (64, 18)


def test_nothing_is_written_over(found, out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(FileExistsError, match="voc is there already"):
        write_found(found, CLASSES, ["voc"], out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_no_two_photographs_share_a_stem():
    names = ["a/x.jpg", "a__x.png", "A/X.JPG", "../x.jpg", "x.jpg", "film.mp4#000001.png"]
    flat = flat_names(names)
    stems = [name.rpartition(".")[0].lower() for name in flat]
    assert len(set(stems)) == len(names)
    assert all("/" not in name and "#" not in name and name[0] != "." for name in flat)


def test_a_set_without_a_find_is_written(found, tmp_path):
    write_found(found[-1:], CLASSES, WRITERS, tmp_path)
    for name, reader in READERS.items():
        assert [item.boxes for item in reader(tmp_path / name).items] == [[]]
