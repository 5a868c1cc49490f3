"""`predict` on what a line really delivers, and an exported network that is the same network."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from deimv2_tfg import cli, deployment
from deimv2_tfg.core import write_json
from deimv2_tfg.data import load_dataset
from deimv2_tfg.decisions import working_points
from deimv2_tfg.deployment import annotate, list_files, predict_files, run_thresholds
from deimv2_tfg.detector import DetectorConfig, build_detector, save_detector
from deimv2_tfg.evaluation import coco_metrics, jittered_results, predict, write_results


@pytest.fixture(scope="module")
def run(smoke_data, tmp_path_factory):
    "A run directory with an untrained network and predictions on val."
    path, dataset = tmp_path_factory.mktemp("runs") / "detector-1", load_dataset(smoke_data, "val")
    torch.manual_seed(0)
    save_detector(
        build_detector(DetectorConfig.tiny(num_classes=dataset.num_classes)),
        path / "best",
        dataset.classes,
        image_size=64,
    )
    write_json(path / "config.json", {"data_dir": str(smoke_data), "image_size": 64, "seed": 0})
    write_results(
        path / "predictions_val.json",
        [r | {"score": 0.01 + 0.2 * r["score"]} for r in jittered_results(dataset.coco, 0.05)],
    )
    return path


def line(folder, good, damaged):
    "A folder of photographs, every so many of them damaged in one of five ways."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(good + damaged):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(
            folder / f"{k:04d}.jpg"
        )
    broken = [folder / f"{k * (good + damaged) // damaged:04d}.jpg" for k in range(damaged)]
    for k, path in enumerate(broken):
        whole = path.read_bytes()
        path.write_bytes(
            [b"", whole[: len(whole) // 2], b"<html>not found</html>", whole[:20], b"\0" * 500][
                k % 5
            ]
        )
    return folder, {p.name for p in broken}


@pytest.mark.parametrize("good, damaged", [(38, 2), (190, 10)])
def test_a_folder_with_damaged_photographs(run, tmp_path, capsys, good, damaged):
    folder, broken = line(tmp_path / "line", good, damaged)
    (folder / "notes.txt").write_text("no photograph")
    assert (
        cli.main(
            [
                "predict",
                str(run),
                str(folder),
                "--out",
                str(tmp_path / "out"),
                "--no-pictures",
                "--batch_size",
                "16",
            ]
        )
        == 1
    )
    printed, photographs, errors = (
        capsys.readouterr().out,
        pd.read_csv(tmp_path / "out" / "photographs.csv"),
        pd.read_csv(tmp_path / "out" / "errors.csv"),
    )
    assert (
        len(photographs) == good and len(errors) == damaged and set(errors["file_name"]) == broken
    )
    assert (
        f"{good} photographs" in printed
        and f"{damaged} could not be read" in printed
        and all(name in printed for name in broken)
    )
    assert set(photographs["file_name"]) == {p.name for p in folder.glob("*.jpg")} - broken


def test_a_clean_folder_ends_well_and_its_results_are_those_of_the_evaluation(
    run, smoke_data, tmp_path, capsys
):
    source = smoke_data / "test" / "images"
    assert (
        cli.main(
            ["predict", str(run), str(source), "--out", str(tmp_path / "out"), "--threshold", "0"]
        )
        == 0
    )
    results, images = (
        json.loads((tmp_path / "out" / n).read_text()) for n in ("predictions.json", "images.json")
    )
    dataset = load_dataset(smoke_data, "test")
    from deimv2_tfg.detector import load_detector

    expected = predict(load_detector(run / "best"), dataset, 64)
    assert len(results) == len(expected)
    name = {i["id"]: i["file_name"] for i in images["images"]}
    ours = {i["file_name"]: i["id"] for i in dataset.images}
    label = dict(enumerate(dataset.category_ids))
    moved = [
        r | {"image_id": ours[name[r["image_id"]]], "category_id": label[r["category_id"]]}
        for r in results
    ]
    assert coco_metrics(dataset.coco, moved) == pytest.approx(
        coco_metrics(dataset.coco, expected), abs=1e-6, nan_ok=True
    )
    assert [c["name"] for c in images["categories"]] == dataset.classes
    for image in images["images"]:
        with Image.open(tmp_path / "out" / "pictures" / f"{image['file_name']}.jpg") as picture:
            assert picture.size == (image["width"], image["height"])


def test_csv_and_one_file(run, smoke_data, tmp_path):
    file = list_files(smoke_data / "test" / "images")[0]
    report = predict_files(
        str(run),
        str(file),
        str(tmp_path / "out"),
        threshold=0.0,
        results_format="csv",
        pictures=False,
    )
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert (
        len(report.photographs) == 1
        and len(table) == len(report.results) > 0
        and set(table["file_name"]) == {file.name}
    )
    assert (
        not (tmp_path / "out" / "pictures").exists()
        and not (tmp_path / "out" / "predictions.json").exists()
    )


def test_thresholds_come_from_val_and_travel_with_the_weights(run, smoke_data, tmp_path):
    dataset = load_dataset(smoke_data, "val")
    points = working_points(dataset.coco, json.loads((run / "predictions_val.json").read_text()))
    assert (
        run_thresholds(run) == pytest.approx(dict(zip(points["class"], points["threshold"])))
        and max(run_thresholds(run).values()) < 0.3
    )
    import shutil

    shutil.copytree(run / "best", tmp_path / "copied")
    assert run_thresholds(tmp_path / "copied") == run_thresholds(run)
    (tmp_path / "copied" / "thresholds.json").unlink()
    with pytest.raises(FileNotFoundError, match="--threshold"):
        run_thresholds(tmp_path / "copied")


def test_each_class_has_its_own_threshold(run, tmp_path):
    class Two(torch.nn.Module):
        classes = ["NORMAL", "HOLE"]

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def detections(self, pixel_values, sizes):
            return [
                {
                    "scores": torch.tensor([0.6, 0.6, 0.2]),
                    "labels": torch.tensor([0, 1, 1]),
                    "boxes": torch.tensor(
                        [[0.0, 0.0, w, h], [1.0, 2.0, 11.0, 22.0], [0.0, 0.0, 5.0, 5.0]]
                    ),
                }
                for h, w in sizes.tolist()
            ]

    from deimv2_tfg.transforms import to_pixel_values

    (found,) = deployment.predict_batch(
        Two(), [Image.new("RGB", (40, 30))], to_pixel_values(32), {"NORMAL": 0.7, "HOLE": 0.5}
    )
    assert [(f["label"], f["bbox"]) for f in found] == [(1, [1, 2, 10, 20])] and found[0][
        "score"
    ] == pytest.approx(0.6)


def test_annotate_leaves_the_photograph_as_it_was():
    photograph = Image.new("RGB", (100, 80), "white")
    picture = annotate(
        photograph,
        [
            {"label": 0, "bbox": [-3, -2, 50, 40], "score": 0.5},
            {"label": 0, "bbox": [90, 70, 40, 40], "score": 0.9},
        ],
        ["HOLE"],
    )
    assert (
        picture.size == (100, 80)
        and np.asarray(photograph).min() == 255
        and np.asarray(picture).min() < 255
    )


def test_a_video(run, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (extra `video`)")
    with av.open(str(tmp_path / "line.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(7):
            for packet in stream.encode(
                av.VideoFrame.from_image(Image.new("RGB", (64, 48), (30 * k, 90, 120)))
            ):
                film.mux(packet)
        for packet in stream.encode():
            film.mux(packet)
    report = predict_files(
        str(run), str(tmp_path / "line.mp4"), str(tmp_path / "out"), threshold=0.0, every=3
    )
    assert [p["file_name"] for p in report.photographs] == [
        f"line.mp4#{k:06d}" for k in (0, 3, 6)
    ] and not report.errors
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 300)
    assert list(
        predict_files(
            str(run), str(tmp_path / "broken.mp4"), str(tmp_path / "out"), threshold=0.0
        ).errors
    ) == ["broken.mp4"]


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
    assert cli.main([{"RUN": str(run), "DATA": str(smoke_data)}.get(a, a) for a in arguments]) == 1
    assert capsys.readouterr().err.startswith("deimv2-tfg: ")


def test_an_exported_network_is_the_same_network(run, tmp_path, capsys):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `export`)")
    from deimv2_tfg.detector import load_detector

    assert cli.main(["export", str(run), "--out", str(tmp_path / "tiny.onnx")]) == 0
    notes, model = json.loads((tmp_path / "tiny.json").read_text()), load_detector(run / "best")
    assert (
        notes["largest_difference"] < 1e-4
        and notes["classes"] == model.classes
        and notes["thresholds"] == run_thresholds(run)
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(tmp_path / "tiny.onnx"), providers=["CPUExecutionProvider"]
    )
    assert [v.shape[0] for v in (*session.get_inputs(), *session.get_outputs())] == [
        "batch"
    ] * 3 and session.get_inputs()[0].shape[1:] == [3, 64, 64]
    for n in (1, 3, 5):
        assert (
            deployment.onnx_difference(tmp_path / "tiny.onnx", model, torch.randn(n, 3, 64, 64))
            < 1e-4
        )
    pixel_values = torch.randn(2, 3, 64, 64)
    assert deployment.onnx_difference(tmp_path / "tiny.onnx", model, pixel_values) < 1e-4
    with torch.no_grad():
        model.model.decoder.class_embed[-1].bias.add_(0.1)
    assert (
        deployment.onnx_difference(tmp_path / "tiny.onnx", model, pixel_values) > 0.01
    )  # the comparison can fail


def test_swapped_queries_are_no_difference_and_a_moved_box_is_one():
    rng = np.random.default_rng(0)
    logits, boxes, order = rng.normal(size=(2, 30, 6)), rng.random((2, 30, 4)), rng.permutation(30)
    assert deployment.query_difference((logits, boxes), (logits[:, order], boxes[:, order])) == 0
    moved = boxes.copy()
    moved[1, 7, 2] += 0.05
    assert deployment.query_difference(
        (logits, boxes), (logits[:, order], moved[:, order])
    ) == pytest.approx(0.05)
    assert (
        deployment.query_difference((logits, boxes), (logits[::-1], boxes[::-1])) > 0.05
    )  # another photograph's
    with pytest.raises(ValueError):
        deployment.query_difference((logits, boxes), (logits[:1], boxes[:1]))
