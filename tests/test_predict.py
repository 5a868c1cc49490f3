"""`predict` on what a line really delivers, and an exported network that is the same network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from deimv2_tfg import Predictor, cli, deployment
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import load_dataset
from deimv2_tfg.decisions import working_points
from deimv2_tfg.deployment import (
    Detections,
    Thresholds,
    good_class,
    list_files,
    part_verdict,
    predict_files,
    run_thresholds,
)
from deimv2_tfg.detector import DetectorConfig, build_detector, load_detector, save_detector
from deimv2_tfg.evaluation import coco_metrics, jittered_results, predict
from deimv2_tfg.formats import read_voc_set
from deimv2_tfg.photographs import PhotographError
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Run
from deimv2_tfg.synthetic import make_dataset
from deimv2_tfg.training import train


def make_run(path, data, classes=None, **config):
    "A run directory with an untrained network and predictions on val; two kinds of it in tests."
    dataset = load_dataset(data, "val")
    torch.manual_seed(0)
    network = build_detector(DetectorConfig.tiny(num_classes=dataset.num_classes))
    save_detector(network, path / "best", classes or dataset.classes, image_size=64)
    write_json(path / "config.json", {"data_dir": str(data), "image_size": 64, "seed": 0} | config)
    results = jittered_results(dataset.coco, 0.05)
    weak = [r | {"score": 0.01 + 0.2 * r["score"]} for r in results]
    Run(path).save_predictions("val", weak)
    return path


@pytest.fixture(scope="module")
def run(smoke_data, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "detector-1", smoke_data)


@pytest.fixture(scope="module")
def shifted_data(smoke_data, tmp_path_factory):
    "The smoke set with category ids 1..6 instead of 0..5."
    root = tmp_path_factory.mktemp("data") / "from_one"
    shutil.copytree(smoke_data, root)
    for split in ("train", "val", "test"):
        coco = read_json(root / split / f"{split}.json")
        for category in coco["categories"]:
            category["id"] += 1
        for annotation in coco["annotations"]:
            annotation["category_id"] += 1
        write_json(root / split / f"{split}.json", coco)
    return root


def noise(folder, n, size=(64, 48)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:04d}.jpg")
    return folder


def line(folder, good, damaged):
    "A folder of photographs, every so many of them damaged in one of five ways."
    noise(folder, good + damaged)
    broken = [folder / f"{k * (good + damaged) // damaged:04d}.jpg" for k in range(damaged)]
    for k, path in enumerate(broken):
        whole = path.read_bytes()
        half = whole[: len(whole) // 2]
        path.write_bytes([b"", half, b"<html>not found</html>", whole[:20], b"\0" * 500][k % 5])
    return folder, {p.name for p in broken}


class Fixed(torch.nn.Module):
    "A network that always finds the same, on photographs of any size."

    def __init__(self, classes, boxes, labels, scores):
        super().__init__()
        self.classes = classes
        self.found = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }
        self.p = torch.nn.Parameter(torch.zeros(1))

    def detections(self, pixel_values, sizes):
        return [self.found for _ in sizes]


@pytest.mark.parametrize("good, damaged", [(38, 2), (190, 10)])
def test_a_folder_with_damaged_photographs(run, tmp_path, capsys, good, damaged):
    folder, broken = line(tmp_path / "line", good, damaged)
    (folder / "notes.txt").write_text("no photograph")
    (folder / "phone.heic").write_bytes(
        b"\0\0\0\x18ftypheic"
    )  # a photograph that Pillow cannot read
    broken = broken | {"phone.heic"}
    damaged += 1
    out = str(tmp_path / "out")
    options = ["--out", out, "--no-pictures", "--batch_size", "16"]
    assert cli.main(["predict", str(run), str(folder), *options]) == 1
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "photographs.csv")
    errors = pd.read_csv(tmp_path / "out" / "errors.csv")
    assert set(errors["file_name"]) == broken
    assert len(table) == good + damaged
    assert set(table.loc[table["verdict"] == "unknown", "file_name"]) == broken
    assert table.loc[table["file_name"].isin(broken), "reason"].notna().all()
    assert f"{good} photographs" in printed and f"{damaged} could not be read" in printed
    for name in broken:
        assert name in printed


def test_a_clean_folder_gives_the_results_of_the_evaluation(run, smoke_data, tmp_path):
    source = smoke_data / "test" / "images"
    out = tmp_path / "out"
    arguments = ["predict", str(run), str(source), "--out", str(out), "--threshold", "0"]
    assert cli.main(arguments) == 0
    results = json.loads((out / "predictions.json").read_text())
    images = json.loads((out / "images.json").read_text())
    dataset = load_dataset(smoke_data, "test")
    expected = predict(load_detector(run / "best"), dataset, 64)
    assert len(results) == len(expected)
    name = {i["id"]: i["file_name"] for i in images["images"]}
    ours = {i["file_name"]: i["id"] for i in dataset.images}
    moved = [r | {"image_id": ours[name[r["image_id"]]]} for r in results]
    # boxes are clipped here, and a clipped box overlaps no less
    assert coco_metrics(dataset.coco, moved)["AP"] == pytest.approx(
        coco_metrics(dataset.coco, expected)["AP"], abs=0.02
    )
    assert [c["name"] for c in images["categories"]] == dataset.classes
    for image in images["images"]:
        with Image.open(out / "pictures" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])


@pytest.mark.finding("training.md:2")
def test_category_ids_are_those_of_the_data_set(shifted_data, tmp_path):
    run = make_run(tmp_path / "run", shifted_data)
    source = shifted_data / "test" / "images"
    predict_files(str(run), str(source), str(tmp_path / "out"), threshold=0, pictures=False)
    results = read_json(tmp_path / "out" / "predictions.json")
    assert {r["category_id"] for r in results} <= set(range(1, 7))
    images = read_json(tmp_path / "out" / "images.json")
    coco = read_json(shifted_data / "test" / "test.json")
    names = [(c["id"], c["name"]) for c in coco["categories"]]
    assert [(c["id"], c["name"]) for c in images["categories"]] == names


@pytest.mark.finding("training.md:2")
def test_category_ids_travel_with_the_weights(shifted_data, tmp_path):
    network = build_detector(DetectorConfig.tiny(num_classes=2))
    meta = {"image_size": 64, "category_ids": [3, 7]}
    save_detector(network, tmp_path / "copied", ["dent", "hole"], **meta)
    assert Predictor.open(tmp_path / "copied").category_ids == [3, 7]


def test_boxes_stay_in_the_photograph():
    network = Fixed(["hole"], [[-3, -2, 50, 90], [35, 20, 60, 25]], [0, 0], [0.9, 0.8])
    found = Predictor(network, 32).predict(Image.new("RGB", (40, 30)), threshold=0.5)
    assert found.boxes.tolist() == [[0, 0, 40, 30], [35, 20, 40, 25]]
    report = deployment.PredictionReport(Path("out"))
    report.add("a.jpg", found, {}, [1])
    assert [r["bbox"] for r in report.results] == [[0, 0, 40, 30], [35, 20, 5, 5]]


def test_csv_and_one_file(run, smoke_data, tmp_path):
    file = list_files(smoke_data / "test" / "images")[0]
    options = {"threshold": 0.0, "results_format": "csv", "pictures": False}
    report = predict_files(str(run), str(file), str(tmp_path / "out"), **options)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(report.photographs) == 1
    assert len(table) == len(report.results) > 0
    assert set(table["file_name"]) == {file.name}
    assert not (tmp_path / "out" / "pictures").exists()
    assert not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.finding("training.md:30")
def test_a_path_an_image_and_an_array_give_one_answer(run, smoke_data):
    predictor = Predictor.open(run)
    path = list_files(smoke_data / "test" / "images")[0]
    with Image.open(path) as file:
        image = file.convert("RGB")
    first = predictor.predict(path, threshold=0.0)
    assert len(first) > 0
    for given in (str(path), image, np.asarray(image)):
        same = predictor.predict(given, threshold=0.0)
        assert np.array_equal(first.boxes, same.boxes)
        assert np.array_equal(first.scores, same.scores)
        assert np.array_equal(first.labels, same.labels)
    w, h = image.size
    assert first.boxes.shape == (len(first), 4)
    assert first.boxes.min() >= 0
    assert (first.boxes <= [w, h, w, h]).all()
    assert first.names == load_dataset(smoke_data, "test").classes
    assert list(first.scores) == sorted(first.scores, reverse=True)
    assert first.show().size == (w, h)
    assert np.array_equal(np.asarray(first.photograph), np.asarray(image))  # not drawn upon


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((30, 40, 3), np.float32),
        np.zeros((30, 40, 3), np.uint16),
        np.zeros((30, 40), np.uint8),
        np.zeros((30, 40, 4), np.uint8),
        np.zeros((3, 30, 40), np.uint8),
    ],
    ids=["float", "16 bit", "grey", "alpha", "channels first"],
)
def test_an_array_that_is_not_rgb_is_refused(array):
    with pytest.raises(ValueError, match=r"uint8, \(H, W, 3\)"):
        Predictor(Fixed(["hole"], [], [], []), 32).predict(array, threshold=0.5)


@pytest.mark.finding("training.md:8", "data.md:R1")
def test_sixteen_bits_are_refused_not_squeezed(run, tmp_path):
    folder = noise(tmp_path / "line", 1)
    deep = np.eye(64, dtype=np.uint16) * 40000
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.fromarray(deep.astype(np.float32)).save(folder / "float.tif")
    with pytest.raises(PhotographError):
        Predictor.open(run).predict(Image.open(folder / "deep.png"), threshold=0.5)
    report = predict_files(str(run), str(folder), str(tmp_path / "out"), threshold=0.5)
    assert set(report.errors) == {"deep.png", "deep.tif", "float.tif"}
    table = pd.read_csv(tmp_path / "out" / "photographs.csv").set_index("file_name")
    assert set(table.loc[list(report.errors), "verdict"]) == {"unknown"}


@pytest.mark.finding("training.md:9", "data.md:R3")
def test_a_turned_photograph_is_read_upright(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "phone.jpg", exif=exif)
    report = predict_files(
        str(run), str(tmp_path / "phone.jpg"), str(tmp_path / "out"), threshold=0.0
    )
    row = report.photographs[0]
    assert (row["width"], row["height"]) == (40, 60)
    assert Image.open(tmp_path / "out" / "pictures" / "phone.jpg").size == (40, 60)


@pytest.mark.finding("data.md:R3")
def test_every_page_of_a_scan_is_a_photograph(run, tmp_path):
    pages = [Image.new("RGB", (40, 30), (40 * k, 90, 90)) for k in range(5)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    report = predict_files(
        str(run), str(tmp_path / "scan.tif"), str(tmp_path / "out"), threshold=0.5
    )
    names = [row["file_name"] for row in report.photographs]
    assert names == [f"scan.tif#{k:06d}" for k in range(5)]


def test_thresholds_come_from_val_and_travel_with_the_weights(run, smoke_data, tmp_path):
    dataset = load_dataset(smoke_data, "val")
    points = working_points(dataset.coco, Run(run).predictions("val"))
    expected = dict(zip(points["class"], points["threshold"], strict=True))
    computed = run_thresholds(run)
    assert computed.values == pytest.approx(expected)
    assert max(computed.values.values()) < 0.3
    assert computed.trusted
    shutil.copytree(run / "best", tmp_path / "copied")
    with pytest.raises(FileNotFoundError, match="--threshold"):
        run_thresholds(tmp_path / "copied")
    kept = {"thresholds": computed.values, "chosen": computed.chosen}
    write_json(tmp_path / "copied" / "thresholds.json", kept)
    assert run_thresholds(tmp_path / "copied") == computed
    write_json(tmp_path / "copied" / "thresholds.json", computed.values)  # as they were written
    assert run_thresholds(tmp_path / "copied").values == computed.values


@pytest.mark.finding("training.md:10", "training.md:11")
def test_thresholds_say_what_they_miss(smoke_data, tmp_path):
    gone = make_run(tmp_path / "gone", smoke_data, data_dir="data")
    with pytest.raises(FileNotFoundError, match="data_dir 'data' is not found from here"):
        run_thresholds(gone)
    other = make_run(tmp_path / "other", smoke_data)
    write_json(other / "data.json", {"files": {"val/val.json": "0" * 64}})
    with pytest.raises(FileNotFoundError, match="not what the run was trained on"):
        run_thresholds(other)


@pytest.mark.finding("training.md:33")
def test_predict_writes_nothing_into_a_run(run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    folder = noise(tmp_path / "line", 2)
    predict_files(str(run), str(folder), str(tmp_path / "out"))
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_each_class_has_its_own_threshold():
    boxes = [[0, 0, 40, 30], [1, 2, 11, 22], [0, 0, 5, 5]]
    network = Fixed(["NORMAL", "HOLE"], boxes, [0, 1, 1], [0.6, 0.6, 0.2])
    thresholds = Thresholds({"NORMAL": 0.7, "HOLE": 0.5}, {"NORMAL": True, "HOLE": True})
    found = Predictor(network, 32, thresholds).predict(Image.new("RGB", (40, 30)))
    assert found.labels.tolist() == [1] and found.class_names.tolist() == ["HOLE"]
    assert found.boxes.tolist() == [[1, 2, 11, 22]]
    assert found.scores[0] == pytest.approx(0.6)


def found_of(*named, names=("NORMAL", "HOLE")):
    boxes = np.zeros((len(named), 4))
    labels = np.array([names.index(name) for name, _ in named], int)
    scores = np.array([score for _, score in named], float)
    return Detections(Image.new("RGB", (4, 4)), boxes, scores, labels, list(names))


def test_a_verdict_needs_a_good_class_and_chosen_thresholds():
    hole, sound, nothing = found_of(("HOLE", 0.8)), found_of(("NORMAL", 0.8)), found_of()
    assert part_verdict(hole, "NORMAL", True) == {
        "verdict": "defective",
        "defect_score": 0.8,
        "reason": "",
    }
    assert part_verdict(hole, "NORMAL", False)["verdict"] == "defective"
    for found in (sound, nothing):
        assert part_verdict(found, "NORMAL", True)["verdict"] == "good"
        unsure = part_verdict(found, "NORMAL", False)
        assert unsure["verdict"] == "unknown" and "no objects" in unsure["reason"]
        unknown = part_verdict(found, None, True)
        assert unknown["verdict"] == "unknown" and "--good" in unknown["reason"]
    assert part_verdict(sound, "none", True)["verdict"] == "defective"


def test_the_good_class_is_normal_or_named():
    assert good_class(["NORMAL", "HOLE"]) == "NORMAL"
    assert good_class(["tornillo", "HOLE"], "tornillo") == "tornillo"
    assert good_class(["crazing", "patches"]) is None
    assert good_class(["crazing", "patches"], "none") == "none"
    with pytest.raises(ValueError, match="choose one of NORMAL, HOLE, or none"):
        good_class(["NORMAL", "HOLE"], "GOOD")


@pytest.mark.finding("training.md:1")
def test_a_run_whose_val_has_no_objects_calls_nothing_good(smoke_data, tmp_path):
    run = make_run(tmp_path / "run", smoke_data)
    empty = {"thresholds": dict.fromkeys(Run(run).about_best["classes"], 1.0)}
    empty["chosen"] = dict.fromkeys(empty["thresholds"], False)
    write_json(run / "best" / "thresholds.json", empty)
    report = predict_files(str(run), str(noise(tmp_path / "line", 3)), str(tmp_path / "out"))
    assert {row["verdict"] for row in report.photographs} == {"unknown"}
    write_json(run / "best" / "thresholds.json", empty["thresholds"])  # as older runs have them
    report = predict_files(str(run), str(tmp_path / "line"), str(tmp_path / "out"))
    assert {row["verdict"] for row in report.photographs} == {"unknown"}


@pytest.mark.finding("training.md:20")
def test_the_good_class_of_another_name_is_no_defect(smoke_data, tmp_path):
    classes = ["tornillo", "a", "b", "c", "d", "e"]
    run = make_run(tmp_path / "run", smoke_data, classes)
    folder = str(noise(tmp_path / "line", 2))
    out = str(tmp_path / "out")
    report = predict_files(str(run), folder, out, threshold=1.0)
    assert {row["verdict"] for row in report.photographs} == {"unknown"}
    report = predict_files(str(run), folder, out, threshold=1.0, good="tornillo")
    assert {row["verdict"] for row in report.photographs} == {"good"}
    with pytest.raises(ValueError, match="good='OK'"):
        predict_files(str(run), folder, out, threshold=1.0, good="OK")


@pytest.mark.finding("training.md:18")
def test_results_are_neither_read_nor_mixed(run, tmp_path):
    folder = noise(tmp_path / "line", 3)
    out = folder / "out"
    for _ in range(3):
        report = predict_files(str(run), str(folder), str(out), threshold=0.5)
        assert len(report.photographs) == 3
    (out / "mine.txt").write_text("mine")
    one = {"results_format": "csv", "pictures": False, "threshold": 0.5}
    predict_files(str(run), str(folder / "0000.jpg"), str(out), **one)
    expected = {"errors.csv", "mine.txt", "photographs.csv", "predictions.csv", "settings.json"}
    assert {p.name for p in out.iterdir()} == expected
    for wrong in (folder, tmp_path):
        with pytest.raises(ValueError, match="choose another folder"):
            predict_files(str(run), str(folder), str(wrong), threshold=0.5)


def test_finds_are_written_in_other_formats(run, tmp_path, monkeypatch):
    network = Fixed(["NORMAL", "HOLE"], [[-3, -2, 50, 90], [5, 5, 25, 20]], [1, 1], [0.9, 0.8])
    predictor = Predictor(network, 32)
    monkeypatch.setattr(deployment.Predictor, "open", lambda *given: predictor)
    for side in ("top", "side"):
        noise(tmp_path / "line" / side, 1)
    pages = [Image.new("RGB", (40, 30), (40 * k, 90, 90)) for k in range(2)]
    pages[0].save(tmp_path / "line" / "scan.tif", save_all=True, append_images=pages[1:])
    out = tmp_path / "out"
    options = {"threshold": 0.5, "pictures": False}
    for _ in range(2):  # the second call takes the first one's place
        predict_files(str(run), str(tmp_path / "line"), str(out), write="voc, crops", **options)
    names = ["scan.tif_000000.png", "scan.tif_000001.png", "side__0000.jpg", "top__0000.jpg"]
    voc = read_voc_set(out / "voc").items
    assert [item.path.name for item in voc] == names
    for item in voc:
        width, height = item.size
        assert item.boxes == [("HOLE", 0, 0, min(50, width), height), ("HOLE", 5, 5, 20, 15)]
    assert len(list((out / "crops" / "HOLE").iterdir())) == 8
    predict_files(str(run), str(tmp_path / "line"), str(out), **options)
    assert not (out / "voc").exists() and not (out / "crops").exists()


@pytest.mark.parametrize("name", ["yolo", "pictures", "predictions.json"])
def test_what_no_prediction_wrote_is_not_written_over(run, tmp_path, name):
    folder = noise(tmp_path / "line", 1)
    mine = tmp_path / "out" / name
    if mine.suffix:
        mine.parent.mkdir()
        mine.write_text("mine")
    else:
        mine.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        predict_files(str(run), str(folder), str(mine.parent), threshold=0.5, write="yolo")
    assert list(mine.parent.iterdir()) == [mine]


@pytest.mark.finding("training.md:24", "training.md:25")
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 50.0},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"batch_size": 0},
        {"every": 0},
        {"every": -2},
        {"results_format": "xml"},
        {"write": "voc,xml"},
        {"device": "gpu"},
        {"good": "OK"},
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line_before_anything_is_written(run, tmp_path, options):
    folder = noise(tmp_path / "line", 1)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        predict_files(str(run), str(folder), str(out), **options)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.finding("training.md:25")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_device_that_is_not_there_is_one_line(run):
    with pytest.raises(ValueError, match="device='cuda'"):
        Predictor.open(run, device="cuda")


def test_a_video(run, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (extra `video`)")
    with av.open(str(tmp_path / "line.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(7):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (30 * k, 90, 120)))
            for packet in stream.encode(frame):
                film.mux(packet)
        for packet in stream.encode():
            film.mux(packet)
    out = str(tmp_path / "out")
    report = predict_files(str(run), str(tmp_path / "line.mp4"), out, threshold=0.0, every=3)
    names = [f"line.mp4#{k:06d}" for k in (0, 3, 6)]
    assert [p["file_name"] for p in report.photographs] == names and not report.errors
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 300)
    report = predict_files(str(run), str(tmp_path / "broken.mp4"), out, threshold=0.0)
    assert list(report.errors) == ["broken.mp4"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "RUN", "nowhere"],
        ["predict", "nowhere", "DATA"],
        ["predict", "RUN", "DATA", "--results_format", "xml"],
        ["export", "nowhere"],
    ],
)
def test_a_fault_of_the_user_is_a_message(
    run, smoke_data, arguments, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(run), "DATA": str(smoke_data)}
    try:
        code = cli.main([places.get(a, a) for a in arguments])
    except SystemExit as stopped:  # a wrong option
        code = stopped.code
    assert code != 0
    assert "deimv2-tfg" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run's network as a file of ONNX, from the command line."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `export`)")
    file = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    assert cli.main(["export", str(run), "--out", str(file)]) == 0
    return file


@pytest.mark.finding("training.md:22")
def test_an_exported_network_is_the_same_network(run, exported):
    notes = json.loads(exported.with_suffix(".json").read_text())
    model = load_detector(run / "best")
    assert notes["largest_difference"] < 1e-4
    assert notes["classes"] == model.classes
    assert notes["thresholds"] == run_thresholds(run).values
    assert not list(exported.parent.glob("*.part"))
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(exported), providers=["CPUExecutionProvider"]
    )
    ends = [*session.get_inputs(), *session.get_outputs()]
    assert [v.shape[0] for v in ends] == ["batch"] * 3
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    told = session.get_modelmeta().custom_metadata_map
    for key in ("classes", "category_ids", "mean", "std", "height", "width", "thresholds"):
        assert json.loads(told[key]) == notes[key]
    assert told["channel_order"] == "RGB"
    assert "255" in told["scale"] and "stretch" in told["resize"]
    for n in (1, 3, 5):
        pixel_values = torch.randn(n, 3, 64, 64)
        difference = deployment.onnx_difference(exported, model, pixel_values)
        assert difference < 1e-4
    with torch.no_grad():
        model.model.decoder.class_embed[-1].bias.add_(0.1)
    # the comparison can fail
    assert deployment.onnx_difference(exported, model, pixel_values) > 0.01


def test_swapped_queries_are_no_difference_and_a_moved_box_is_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 30, 6))
    boxes = rng.random((2, 30, 4))
    order = rng.permutation(30)
    assert deployment.query_difference((logits, boxes), (logits[:, order], boxes[:, order])) == 0
    moved = boxes.copy()
    moved[1, 7, 2] += 0.05
    shuffled = (logits[:, order], moved[:, order])
    assert deployment.query_difference((logits, boxes), shuffled) == pytest.approx(0.05)
    # another photograph's
    assert deployment.query_difference((logits, boxes), (logits[::-1], boxes[::-1])) > 0.05
    with pytest.raises(ValueError):
        deployment.query_difference((logits, boxes), (logits[:1], boxes[:1]))


def test_the_package_is_light_until_a_predictor_is_asked_for():
    code = "import sys, deimv2_tfg; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ)
    assert said.stdout.decode().strip() == "False"


def small_training(data, runs, **changes):
    small = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4, "lr": 1e-3}
    return TrainConfig(str(data), str(runs), **small | changes)


@pytest.mark.finding("training.md:1", "training.md:11")
def test_without_an_object_in_val_the_last_weights_are_kept_and_nothing_is_good(
    smoke_data, tmp_path
):
    data = Path(shutil.copytree(smoke_data, tmp_path / "data"))
    coco = read_json(data / "val" / "val.json")
    write_json(data / "val" / "val.json", coco | {"annotations": []})
    with pytest.warns(UserWarning, match="best/ holds the last weights"):
        run = train(small_training(data, tmp_path / "runs", epochs=2))
    assert Run(run).about_best["meta"]["epoch"] == 2
    best = Path(shutil.copytree(run / "best", tmp_path / "carried"))
    assert run_thresholds(best) == run_thresholds(run) and not run_thresholds(best).trusted
    shutil.rmtree(data)
    folder = noise(tmp_path / "line", 2)
    report = predict_files(str(best), str(folder), str(tmp_path / "out"), pictures=False)
    assert {row["verdict"] for row in report.rows()} == {"unknown"}


@pytest.mark.finding("training.md:27")
def test_one_photograph_of_32_pixels_is_refused_in_one_line(tmp_path):
    make_dataset(tmp_path / "one", profile="smoke", counts=(1, 1, 1))
    with pytest.raises(ValueError, match="image_size=32: one photograph .*; take 64"):
        train(small_training(tmp_path / "one", tmp_path / "runs", image_size=32))
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.finding("training.md:31")
def test_a_longer_training_names_the_shorter_one(smoke_data, tmp_path, capsys, monkeypatch):
    run = train(small_training(smoke_data, tmp_path / "runs"))
    monkeypatch.delenv("IN_TEST", raising=False)  # which silences what a person reads
    capsys.readouterr()
    train(small_training(smoke_data, tmp_path / "runs", epochs=2))
    said = "".join(capsys.readouterr())
    assert f"{run.name} is the same with 1 epochs" in said and "--init" in said


@pytest.mark.finding("training.md:22")
def test_the_onnx_file_alone_says_how_to_use_it(run, smoke_data, exported):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(exported))
    told = session.get_modelmeta().custom_metadata_map
    path = list_files(smoke_data / "test" / "images")[0]
    size = json.loads(told["width"]), json.loads(told["height"])
    resized = Image.open(path).convert(told["channel_order"]).resize(size, Image.BILINEAR)
    pixels = (np.asarray(resized, np.float32) / 255 - json.loads(told["mean"])) / np.array(
        json.loads(told["std"])
    )
    logits, boxes = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None].astype("f")})
    best = np.unravel_index(logits[0].argmax(), logits[0].shape)
    ours = Predictor.open(run).predict(path, threshold=0.0)
    assert json.loads(told["classes"])[best[1]] == ours.names[ours.labels[0]]
    assert 1 / (1 + np.exp(-logits[0][best])) == pytest.approx(ours.scores[0], abs=0.01)
