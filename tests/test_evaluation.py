"""The COCO protocol against a second implementation, and its corner cases."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from deimv2_tfg import evaluation
from deimv2_tfg.cli import main
from deimv2_tfg.core import project_root
from deimv2_tfg.data import DatasetError
from deimv2_tfg.evaluation import (
    class_metrics,
    coco_metrics,
    evaluate,
    jittered_results,
    match_tables,
    precision_recall,
    predict,
    to_coco_results,
)
from deimv2_tfg.metrics import results_problems
from deimv2_tfg.splits import bind_data

THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]
CATEGORIES = [
    {"id": 3, "name": "b"},
    {"id": 11, "name": "c"},
    {"id": 1, "name": "a"},
]  # gaps, and not in id order


def random_case(seed, images=12, score_step=None):
    """Annotations without info, area, iscrowd, with ids from 0, and detections of every quality."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for category in (1, 3, 11):
            for _ in range(rng.integers(0, 4)):
                box = [*rng.uniform(0, 150, 2), *rng.uniform(8, 120, 2)]
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": image,
                        "category_id": category,
                        "bbox": box,
                    }
                )
                for _ in range(rng.integers(0, 4)):
                    moved = np.array(box) + rng.normal(size=4) * 0.12 * np.array(box[2:] * 2)
                    results.append(
                        {
                            "image_id": image,
                            "category_id": category,
                            "bbox": [*moved[:2], *np.maximum(moved[2:], 1)],
                            "score": rng.uniform(),
                        }
                    )
            for _ in range(rng.integers(0, 4)):
                results.append(
                    {
                        "image_id": image,
                        "category_id": category,
                        "bbox": [*rng.uniform(0, 150, 2), *rng.uniform(8, 120, 2)],
                        "score": rng.uniform(),
                    }
                )
    coco = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 300, "height": 280}
            for i in range(1, images + 1)
        ],
        "categories": CATEGORIES,
        "annotations": annotations,
    }
    return json.loads(json.dumps([coco, results], default=float))


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def independent(coco, results, category, threshold):
    """AP and recall of one class: greedy matching by score, 101 recall points; plain loops."""
    total, flags = 0, []
    for image in [i["id"] for i in coco["images"]]:
        truth = [
            a["bbox"]
            for a in coco["annotations"]
            if a["image_id"] == image and a["category_id"] == category
        ]
        total += len(truth)
        free = set(range(len(truth)))
        found = sorted(
            (r for r in results if r["image_id"] == image and r["category_id"] == category),
            key=lambda r: -r["score"],
        )
        for r in found[:100]:
            overlaps = {g: iou(r["bbox"], truth[g]) for g in free}
            best = max(overlaps, key=overlaps.get, default=None)
            hit = best is not None and overlaps[best] >= threshold
            if hit:
                free.discard(best)
            flags.append((r["score"], hit))
    if total == 0:
        return math.nan, math.nan
    flags.sort(key=lambda f: -f[0])
    points, tp = [], 0
    for k, (_, hit) in enumerate(flags, start=1):
        tp += hit
        points.append((tp / total, tp / k))
    grid = [max((p for r, p in points if r >= j / 100 - 1e-12), default=0.0) for j in range(101)]
    return sum(grid) / 101, tp / total


@pytest.mark.parametrize("seed", range(4))
def test_ap_against_a_second_implementation(seed):
    coco, results = random_case(seed)
    metrics = coco_metrics(coco, results)
    by_class = {
        c["name"]: [independent(coco, results, c["id"], t) for t in THRESHOLDS] for c in CATEGORIES
    }
    for name, values in by_class.items():
        assert metrics[f"AP/{name}"] == pytest.approx(np.mean([ap for ap, _ in values]), abs=1e-6)
        assert metrics[f"AP50/{name}"] == pytest.approx(values[0][0], abs=1e-6)
    assert metrics["AP"] == pytest.approx(
        np.mean([[ap for ap, _ in v] for v in by_class.values()]), abs=1e-6
    )
    assert metrics["AP75"] == pytest.approx(np.mean([v[5][0] for v in by_class.values()]), abs=1e-6)
    assert metrics["AR100"] == pytest.approx(
        np.mean([[r for _, r in v] for v in by_class.values()]), abs=1e-6
    )
    assert 0.05 < metrics["AP"] < 0.95 and metrics["AR1"] < metrics["AR10"] <= metrics["AR100"]


def test_classes_come_in_id_order_and_can_be_chosen():
    coco, results = random_case(0)
    metrics = coco_metrics(coco, results)
    assert [k for k in metrics if k.startswith("AP/")] == ["AP/a", "AP/b", "AP/c"]
    chosen = coco_metrics(coco, results, classes=["c", "a"])
    assert (
        chosen["AP"] == pytest.approx((metrics["AP/a"] + metrics["AP/c"]) / 2)
        and "AP/b" not in chosen
    )
    with pytest.raises(ValueError, match="no such class"):
        coco_metrics(coco, results, classes=["z"])


def test_inputs_stay_as_they_were_and_a_path_does_as_well(tmp_path):
    coco, results = random_case(1)
    before = copy.deepcopy((coco, results))
    metrics = coco_metrics(coco, results)
    assert (coco, results) == before
    (tmp_path / "test.json").write_text(json.dumps(coco))
    assert (
        coco_metrics(tmp_path / "test.json", results)
        == coco_metrics(str(tmp_path / "test.json"), results)
        == metrics
    )


def test_perfect_results_score_one():
    coco, _ = random_case(2)
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.5,
        }
        for a in coco["annotations"]
    ]
    metrics = coco_metrics(coco, perfect)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1)


def test_empty_results_score_zero():
    coco, _ = random_case(3)
    metrics = coco_metrics(coco, [])
    assert metrics["AP"] == metrics["AP50/a"] == metrics["AR100"] == 0


def test_what_cannot_be_computed_is_nan(capsys):
    coco, results = random_case(4)
    coco["annotations"] = [
        a
        for a in coco["annotations"]
        if a["category_id"] != 3 and a["bbox"][2] * a["bbox"][3] >= 96**2
    ]
    metrics = coco_metrics(coco, results)
    assert (
        math.isnan(metrics["AP/b"])
        and math.isnan(metrics["AP50/b"])
        and math.isnan(metrics["AP_small"])
    )
    assert metrics["AP"] == pytest.approx((metrics["AP/a"] + metrics["AP/c"]) / 2)
    nothing = coco_metrics(coco | {"annotations": []}, results)
    assert all(math.isnan(v) for v in nothing.values())
    assert capsys.readouterr().out == ""


def test_mixed_up_ids_and_broken_numbers_are_refused():
    coco, results = random_case(5)
    with pytest.raises(ValueError, match="category_id"):
        coco_metrics(coco, [{**results[0], "category_id": 0}])
    with pytest.raises(ValueError, match="image_id"):
        coco_metrics(coco, [{**results[0], "image_id": 99}])
    with pytest.raises(ValueError, match="finite"):
        coco_metrics(coco, [{**results[0], "score": math.nan}])


def test_curve_and_matches_are_those_of_ap():
    coco, results = random_case(6)
    metrics, curve = coco_metrics(coco, results), precision_recall(coco, results)
    assert curve.groupby("class")["precision"].mean().to_dict() == pytest.approx(
        {c: metrics[f"AP50/{c}"] for c in "abc"}
    )
    assert (curve.groupby("class").size() == 101).all()
    for table in match_tables(coco, results):
        category = next(c["id"] for c in CATEGORIES if c["name"] == table.name)
        assert table.objects.sum() == sum(a["category_id"] == category for a in coco["annotations"])
        assert table.matched.shape == (10, len(table.scores)) and (np.diff(table.scores) <= 0).all()
        assert table.matched[0].sum() / table.objects.sum() == pytest.approx(
            independent(coco, results, category, 0.5)[1]
        )


class Fixed(torch.nn.Module):
    """A detector whose 40 queries always give the same boxes, with low scores of three classes."""

    def __init__(self, classes=("a", "b", "c")):
        super().__init__()
        self.classes, self.weight = list(classes), torch.nn.Parameter(torch.zeros(1))
        generator = torch.Generator().manual_seed(0)
        self.logits = -6 + torch.randn(40, 3, generator=generator)
        self.boxes = torch.rand(40, 4, generator=generator) * 0.4 + 0.1

    def forward(self, pixel_values, targets=None):
        n = len(pixel_values)
        return SimpleNamespace(
            logits=self.logits.expand(n, -1, -1), pred_boxes=self.boxes.expand(n, -1, -1)
        )


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val", "test"):
        coco, _ = random_case(7, images=3)
        (tmp_path / split / "images").mkdir(parents=True)
        for image in coco["images"]:
            image["width"], image["height"] = 200 + 50 * image["id"], 280
            Image.new("RGB", (image["width"], image["height"])).save(
                tmp_path / split / "images" / image["file_name"]
            )
        (tmp_path / split / f"{split}.json").write_text(json.dumps(coco))
    return tmp_path


def test_predict_keeps_every_pair_and_maps_back(root):
    def augment(*_):
        raise AssertionError("the data set's own transform was used")

    model, dataset = Fixed().train(), evaluation.load_dataset(root, "test", transform=augment)
    results = predict(model, dataset, 64, batch_size=2)
    assert model.training and dataset.transform is augment
    assert (
        len(results) == 3 * 120 and max(r["score"] for r in results) < 0.1
    )  # 40 queries x 3 classes, no threshold
    assert {r["category_id"] for r in results} == {1, 3, 11} and {
        r["image_id"] for r in results
    } == {1, 2, 3}
    query, label = divmod(int(model.logits.flatten().argmax()), 3)
    cx, cy, w, h = model.boxes[query].tolist()
    for image in dataset.images:
        best = max((r for r in results if r["image_id"] == image["id"]), key=lambda r: r["score"])
        width, height = image["width"], image["height"]
        assert best["category_id"] == [1, 3, 11][label]
        assert best["bbox"] == pytest.approx(
            [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height], abs=0.02
        )


def test_to_coco_results_of_nothing_and_of_unequal_lists():
    nothing = {
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
    }
    assert to_coco_results([nothing], [4], [1, 3, 11]) == []
    with pytest.raises(ValueError):
        to_coco_results([nothing], [4, 5], [1, 3, 11])


def make_run(path, **config):
    (path / "best").mkdir(parents=True)
    (path / "best" / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_evaluate_writes_beside_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "open_detector", lambda directory: Fixed())
    run = make_run(tmp_path / "runs" / "one", image_size=64)
    metrics = evaluate(run, root, "test")
    results = json.loads((run / "predictions_test.json").read_text())
    assert coco_metrics(root / "test" / "test.json", results) == pytest.approx(metrics, nan_ok=True)
    kept = json.loads((run / "metrics_test.json").read_text())
    assert kept == {k: None if math.isnan(v) else v for k, v in metrics.items()}
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    before = sorted(run.rglob("*"))
    evaluate(run / "best", root, "val", image_size=64)
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ValueError, match="image_size"):
        evaluate(run / "best", root, "val")


def test_evaluate_names_both_lists_of_classes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluation, "open_detector", lambda directory: Fixed(classes=("a", "x", "c"))
    )
    run = make_run(tmp_path / "runs" / "two", image_size=64)
    with pytest.raises(ValueError, match=r"\['a', 'x', 'c'\].*\['a', 'b', 'c'\]"):
        evaluate(run, root)
    with pytest.raises(FileNotFoundError, match="neither a run"):
        evaluate(tmp_path / "nowhere", root)


def second_evaluator(coco, results):
    """The same protocol by faster-coco-eval, another implementation: AP, AP by size, AR."""
    from faster_coco_eval import COCO, COCOeval_faster

    boxes = [
        a
        | {
            "id": k,
            "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            "iscrowd": a.get("iscrowd", 0),
        }
        for k, a in enumerate(coco["annotations"], 1)
    ]
    truth = COCO({"info": {}} | coco | {"annotations": boxes})
    judge = COCOeval_faster(
        truth, truth.loadRes(copy.deepcopy(results)), "bbox", print_function=lambda *a: None
    )
    judge.evaluate(), judge.accumulate(), judge.summarize()
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100"]
    return dict(zip(names, judge.stats.tolist(), strict=False))


def assert_same(coco, results):
    ours, theirs = coco_metrics(coco, results), second_evaluator(coco, results)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(
            math.nan if value == -1 else value, abs=1e-9, nan_ok=True
        ), name
    return ours


@pytest.mark.parametrize("seed", range(4))
def test_random_results_by_faster_coco_eval(seed):
    coco, results = random_case(seed, images=30)
    if seed == 3:
        for a in coco["annotations"][::7]:
            a["iscrowd"] = 1
    assert 0.05 < assert_same(coco, results)["AP"] < 0.95


def test_predictions_of_a_network_by_faster_coco_eval(smoke_data):
    from deimv2_tfg.core import open_study
    from deimv2_tfg.data import load_dataset
    from deimv2_tfg.detector import DetectorConfig, build_detector

    dataset = load_dataset(smoke_data, "val")
    results = predict(
        build_detector(DetectorConfig.tiny(num_classes=dataset.num_classes)),
        dataset,
        open_study("smoke").profile.image_size,
    )
    assert len(results) > 100
    assert_same(dataset.coco, results)


def stored_predictions():
    """Predictions of trainings beside data sets of real photographs, where both are there."""
    for data in (Path(__file__).resolve().parents[2] / "shared" / "data").glob("*/val/val.json"):
        root = data.parents[1]
        yield from (
            (data, p)
            for p in (project_root() / "runs").glob(f"{root.name}_*/*/predictions_val.json")
        )


def test_real_predictions_by_faster_coco_eval():
    found = list(stored_predictions())
    if not found:
        pytest.skip(
            "no data set beside runs/<data>_*/*/predictions_val.json: nothing real to compare"
        )
    for data, predictions in found[:3]:
        assert_same(json.loads(data.read_text()), json.loads(predictions.read_text()))


def test_class_metrics_are_the_flat_ones_with_counts():
    coco, results = random_case(6)
    table, metrics = class_metrics(coco, results).set_index("class"), coco_metrics(coco, results)
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_large", "AR1", "AR100"):
        assert table[name]["mean"] == pytest.approx(metrics[name], nan_ok=True)
    for c in CATEGORIES:
        assert table["AP"][c["name"]] == metrics[f"AP/{c['name']}"]
        assert table["objects"][c["name"]] == sum(
            a["category_id"] == c["id"] for a in coco["annotations"]
        )
    assert table["objects"]["mean"] == len(coco["annotations"]) and table["images"]["mean"] == len(
        coco["images"]
    )


def test_evaluate_refuses_changed_data_unless_told(smoke_data, tmp_path, monkeypatch):
    data, run = (
        Path(shutil.copytree(smoke_data, tmp_path / "set")),
        make_run(tmp_path / "run", image_size=64),
    )
    classes = [
        c["name"]
        for c in sorted(
            json.loads((data / "val" / "val.json").read_text())["categories"], key=lambda c: c["id"]
        )
    ]
    monkeypatch.setattr(
        evaluation, "open_detector", lambda directory: Fixed(classes=tuple(classes))
    )
    bind_data(run, data)
    first = evaluate(run, data, "val")
    coco = json.loads((data / "test" / "test.json").read_text())
    coco["annotations"].pop()
    (data / "test" / "test.json").write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match="changed: test/test.json"):
        evaluate(run, data, "val")
    assert (
        main(["evaluate", str(run), str(data), "--split", "val"]) == 2
        and not (run / "data_changes.jsonl").exists()
    )
    record = (run / "metrics_val.json").read_bytes()
    assert evaluate(run, data, "val", allow_changed=True) == pytest.approx(first, nan_ok=True)
    assert (run / "metrics_val.json").read_bytes() == record
    assert len(list(run.glob("metrics_val-data*.json"))) == 1
    assert json.loads((run / "data_changes.jsonl").read_text())["differences"] == 1
    assert main(["evaluate", str(run), str(data), "--split", "val", "--allow_changed"]) == 0


# Another tool's results ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(smoke_data):
    """Annotations of test and results that are right, as another tool would write them."""
    coco = json.loads((smoke_data / "test" / "test.json").read_text())
    return coco, jittered_results(coco, 0.05)


def corners(box, width, height):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def fractions(box, width, height):
    x, y, w, h = box
    return [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]


BOXES = {
    "these are two corners": corners,
    "centre, width, height, as fractions": fractions,
    "these are centre, width, height": lambda b, *_: [b[0] + b[2] / 2, b[1] + b[3] / 2, *b[2:]],
    "negative side": lambda b, *_: [b[0], b[1], -b[2], b[3]],
    "lies outside": lambda b, *_: [b[0] + 9000, *b[1:]],
    "not four numbers": lambda b, *_: b[:3],
    "not four finite numbers": lambda b, *_: [math.nan, *b[1:]],
}


@pytest.mark.finding("training.md:29")
@pytest.mark.parametrize("words", BOXES)
def test_boxes_of_another_tool_are_looked_at(theirs, words):
    coco, results = theirs
    sizes = {i["id"]: (i["width"], i["height"]) for i in coco["images"]}
    changed = [r | {"bbox": BOXES[words](r["bbox"], *sizes[r["image_id"]])} for r in results]
    assert results_problems(coco, results) == []
    assert words in "\n".join(results_problems(coco, changed))


FIELDS = {
    "score is no number from 0 to 1": lambda r: r | {"score": 100 * r["score"] + 1},
    "score is no number": lambda r: r | {"score": str(r["score"])},
    "fields are missing": lambda r: {k: v for k, v in r.items() if k != "score"},
    "image_id is no number": lambda r: r | {"image_id": str(r["image_id"])},
    "image_id is not in the data": lambda r: r | {"image_id": r["image_id"] + 1000},
    "category_id is not in the data": lambda r: r | {"category_id": r["category_id"] + 1000},
    "places in the list of classes, from 1": lambda r: r | {"category_id": r["category_id"] + 1},
}


@pytest.mark.finding("training.md:29")
@pytest.mark.parametrize("words", FIELDS)
def test_ids_and_scores_of_another_tool_are_looked_at(theirs, words):
    coco, results = theirs
    assert words in "\n".join(results_problems(coco, [FIELDS[words](r) for r in results]))


def test_what_detectors_do_write_is_no_problem(theirs):
    coco, results = theirs
    first = results[0]["image_id"]
    image = next(i for i in coco["images"] if i["id"] == first)
    odd = [results[0] | {"bbox": box} for box in ([-3, -2, 30, 40], [5, 5, 0, 3], [4, 4, 0.5, 0.2])]
    wide = results[0] | {"bbox": [1, 1, image["width"] + 20, image["height"] + 9]}
    assert results_problems(coco, [*results, *odd, wide]) == []
    assert results_problems(coco, []) == []


@pytest.mark.finding("training.md:29")
def test_a_file_of_results_is_judged_from_the_command_line(theirs, smoke_data, tmp_path, capsys):
    coco, results = theirs
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(results))
    assert main(["evaluate", str(file), str(smoke_data)]) == 0
    assert json.loads(capsys.readouterr().out)["AP"] == coco_metrics(coco, results)["AP"]
    wrong = [results[0] | {"image_id": "a", "score": 7}, results[1] | {"bbox": [1, 2]}, 5]
    file.write_text(json.dumps(wrong))
    assert main(["evaluate", str(file), str(smoke_data)]) != 0
    said = capsys.readouterr().err
    words = ("theirs.json", "image_id is no number", "score is no", "box-malformed", "are missing")
    for word in words:
        assert word in said
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="a list of results is needed.*images"):
        evaluate(file, smoke_data)


def test_a_poor_detector_is_no_wrong_file(theirs):
    coco, results = theirs
    ids = sorted(c["id"] for c in coco["categories"])
    assert results_problems(coco, [r | {"category_id": ids[0]} for r in results]) == []
    assert results_problems(coco, [r | {"category_id": ids[-1]} for r in results]) == []
    shifted = [r | {"bbox": [b / 2 for b in r["bbox"]]} for r in results]
    assert results_problems(coco, shifted) == []


def test_a_class_without_a_result_is_said(theirs, smoke_data, tmp_path):
    coco, results = theirs
    file = tmp_path / "theirs.json"
    gone = coco["annotations"][0]["category_id"]
    file.write_text(json.dumps([r for r in results if r["category_id"] != gone]))
    name = next(c["name"] for c in coco["categories"] if c["id"] == gone)
    with pytest.warns(UserWarning, match=f"no result of {name}"):
        evaluate(file, smoke_data)


# The record ------------------------------------------------------------------------------------


@pytest.mark.finding("training.md:21")
def test_another_size_does_not_touch_the_record(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "open_detector", lambda directory: Fixed())
    run = make_run(tmp_path / "runs" / "one", image_size=64)
    evaluate(run, root)
    record = {p: p.read_bytes() for p in run.glob("*_test.json")}
    evaluate(run, root, image_size=32)
    evaluate(run, root, image_size=(32, 64))
    assert len(record) == 2 and {p: p.read_bytes() for p in record} == record
    others = {"metrics_test-32px.json", "metrics_test-32x64px.json"}
    assert {p.name for p in run.glob("metrics_test-*")} == others


@pytest.mark.parametrize(
    "options, name",
    [
        ({"precision": "bf16"}, "test-bf16"),
        ({"score_threshold": 0.5}, "test-from0.5"),
        ({"precision": "bf16", "score_threshold": 0.5, "image_size": 32}, "test-32px-bf16-from0.5"),
    ],
)
def test_another_precision_or_threshold_is_a_record_of_its_own(
    root, tmp_path, monkeypatch, options, name
):
    seen = []

    def predict(model, dataset, *_):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        boxes = [0, 0, 9, 9], [0, 0, 5, 5]
        about = {"image_id": dataset.coco["images"][0]["id"], "category_id": 1}
        pairs = zip(boxes, (0.5, 0.49), strict=True)
        return [about | {"bbox": box, "score": score} for box, score in pairs]

    monkeypatch.setattr(evaluation, "open_detector", lambda directory: Fixed())
    monkeypatch.setattr(evaluation, "predict", predict)
    run = make_run(tmp_path / "runs" / "one", image_size=64)
    evaluate(run, root)
    record = {p: p.read_bytes() for p in run.glob("*_test.json")}
    evaluate(run, root, **options)
    assert {p: p.read_bytes() for p in record} == record and len(record) == 2
    assert {p.stem for p in run.glob("metrics_test-*")} == {f"metrics_{name}"}
    assert seen == [None, torch.bfloat16 if "precision" in options else None]
    stored = json.loads((run / f"predictions_{name}.json").read_text())
    assert len(stored) == (1 if "score_threshold" in options else 2)


@pytest.mark.parametrize("asked, used", [(None, "cuda"), ("cpu", "cpu")])
def test_a_card_evaluates_where_there_is_one(root, tmp_path, monkeypatch, asked, used):
    seen = []

    def predict(model, dataset, size, batch_size, device, progress):
        seen.append(device.type)
        return []

    monkeypatch.setattr(evaluation, "default_device", lambda: "cuda")
    monkeypatch.setattr(evaluation, "open_detector", lambda directory: Fixed())
    monkeypatch.setattr(evaluation, "predict", predict)
    evaluate(make_run(tmp_path / "runs" / "one", image_size=64), root, device=asked)
    assert seen == [used]


@pytest.mark.finding("training.md:33")
def test_a_run_on_a_read_only_disk_is_judged(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "open_detector", lambda directory: Fixed())
    run = make_run(tmp_path / "runs" / "one", image_size=64)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evaluation.Run, "save_predictions", refuse)
    with pytest.warns(UserWarning, match="nothing is stored there .Read-only file system"):
        assert evaluate(run, root)["AP"] >= 0
