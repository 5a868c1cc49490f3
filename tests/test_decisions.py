"""Working points, confusions, verdicts and calibration against plain loops and hand-made cases."""

import numpy as np
import pandas as pd
import pytest

from deimv2_tfg.decisions import (
    at_working_points,
    calibration,
    calibration_error,
    confusion,
    f1_curve,
    image_verdicts,
    kept_results,
    plot_confusion,
    plot_reliability,
    plot_verdicts,
    verdict_metrics,
    working_points,
)
from deimv2_tfg.evaluation import jittered_results, match_tables

NAMES = ["NORMAL", "CRACK", "HOLE"]
IDS = [2, 5, 8]


def case(seed=0, images=40):
    """Annotations, the last image empty, and results of every quality with many equal scores."""
    rng = np.random.default_rng(seed)
    annotations = []
    for i in range(images - 1):
        for _ in range(rng.integers(1, 4)):
            category = IDS[int(rng.integers(3) if i % 3 else 0)]
            box = [*rng.uniform(0, 60, 2).round(1), *rng.uniform(15, 40, 2).round(1)]
            annotations.append({"image_id": i, "category_id": category, "bbox": box})
    coco = {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "categories": [{"id": k, "name": n} for k, n in zip(IDS, NAMES, strict=True)],
        "annotations": annotations,
    }
    results = []
    for r in jittered_results(coco, 0.1, seed):
        results.append(r | {"score": round(rng.beta(4, 2), 2)})
    for r in jittered_results(coco, 0.2, seed + 1):
        wrong = {"category_id": IDS[int(rng.integers(3))], "score": round(rng.beta(2, 3), 2)}
        results.append(r | wrong)
    return coco, results


def thresholds(value, name=None):
    """Working points with one threshold; of the other classes nothing is kept where `name`."""
    values = [value if name in (None, n) else 2.0 for n in NAMES]
    return pd.DataFrame({"class": NAMES, "threshold": values})


def row_at(coco, results, name, threshold):
    """Counts and rates of one class at a threshold: COCO's matching of what reaches it."""
    points = thresholds(threshold, name)
    return at_working_points(coco, results, points).set_index("class").loc[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_other_threshold_has_a_higher_f1(name):
    coco, results = case()
    chosen = working_points(coco, results).set_index("class").loc[name]
    between = np.arange(0.005, 1, 0.02)
    best = max(row_at(coco, results, name, t).F1 for t in between)
    at = row_at(coco, results, name, chosen.threshold)
    assert chosen.F1 == pytest.approx(at.F1) and at.F1 >= best
    assert chosen.F1 == pytest.approx(2 * at.TP / (2 * at.TP + at.FP + at.FN))
    assert chosen.precision == pytest.approx(at.TP / (at.TP + at.FP))
    assert chosen.recall == pytest.approx(at.TP / (at.TP + at.FN))


def test_curve_on_some_images_is_the_curve_of_those_images():
    coco, results = case(1)
    used = np.arange(40) % 2 == 0
    part = dict(coco)
    part["images"] = [i for i in coco["images"] if i["id"] % 2 == 0]
    part["annotations"] = [a for a in coco["annotations"] if a["image_id"] % 2 == 0]
    alone = match_tables(part, [r for r in results if r["image_id"] % 2 == 0])
    for whole, those in zip(match_tables(coco, results), alone, strict=True):
        pd.testing.assert_frame_equal(f1_curve(whole, images=used), f1_curve(those))


def test_a_class_that_cannot_choose_says_so():
    coco, results = case()
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 8]
    points = working_points(coco, results)
    assert points["note"].tolist()[:2] == ["", ""] and "median" in points["note"][2]
    assert np.isnan(points["F1"][2])
    assert points["threshold"][2] == pytest.approx(points["threshold"][:2].median())
    assert (working_points(coco, [])["threshold"] == 1).all()
    nothing = at_working_points(coco, [], working_points(coco, []))
    assert nothing["precision"].isna().all() and np.isnan(nothing["recall"][2])
    assert (nothing["recall"].iloc[:2] == 0).all()


def box(image, category, x, **more):
    return {"image_id": image, "category_id": category, "bbox": [x, x, 10, 10], **more}


def test_confusion_of_a_case_by_hand():
    coco = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": k, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [box(1, 1, 0), box(1, 2, 50), box(2, 1, 0)],
    }
    results = [
        box(1, 1, 0, score=0.9),  # CRACK found
        box(1, 2, 0, score=0.95),  # a HOLE claimed on the same object: a false alarm
        box(1, 1, 50, score=0.8),  # HOLE taken for CRACK
        box(2, 2, 80, score=0.7),  # a false alarm
        box(2, 1, 0, score=0.2),  # a CRACK under its threshold
    ]
    matrix = confusion(coco, results, thresholds(0.5))
    assert matrix.loc["CRACK"].tolist() == [0, 1, 0, 1]
    assert matrix.loc["HOLE"].tolist() == [0, 1, 0, 0]
    assert matrix.loc["background"].tolist() == [0, 0, 2, 0]
    assert matrix.loc["NORMAL"].sum() == 0


def test_confusion_adds_up():
    coco, results = case(2)
    points = working_points(coco, results)
    matrix, applied = confusion(coco, results, points), at_working_points(coco, results, points)
    inside = matrix.iloc[:-1]
    assert np.diag(inside).tolist() == applied["TP"].tolist()[:-1]
    assert inside.sum(axis=1).tolist() == applied["objects"].tolist()[:-1]
    assert inside.to_numpy().sum() == len(coco["annotations"])
    assert matrix.iloc[:, :-1].to_numpy().sum() == len(kept_results(coco, results, points))
    assert inside.iloc[:, :-1].to_numpy().sum() > applied["TP"].iloc[-1]


def test_verdicts():
    coco, results = case(3)
    verdicts = image_verdicts(coco, results)
    defect = {a["image_id"] for a in coco["annotations"] if a["category_id"] != 2}
    assert verdicts["defective"].tolist() == [i["id"] in defect for i in coco["images"]]
    assert not verdicts["defective"].iloc[-1]  # no box at all: good
    first = [r["score"] for r in results if r["image_id"] == 0 and r["category_id"] != 2]
    assert verdicts["score"][0] == max(first)


def test_verdict_metrics():
    verdicts = image_verdicts(*case(3))
    metrics = verdict_metrics(verdicts, val=verdicts, draws=200)
    bad, good = (verdicts["score"][verdicts["defective"] == kind] for kind in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in bad for b in good]
    assert metrics["AUROC"] == pytest.approx(np.mean(pairs))
    assert metrics["AUROC low"] < metrics["AUROC"] < metrics["AUROC high"]
    assert metrics["defective"] + metrics["good"] == 40
    alarms = "false alarms at 95%"
    assert metrics["val_recall"] >= 0.95 and metrics["val_false_alarms"] == metrics[alarms]
    assert metrics[f"{alarms} low"] < metrics[alarms] < metrics[f"{alarms} high"]
    higher = np.nextafter(metrics["val_threshold"], 2)
    assert (bad >= higher).mean() < 0.95  # no higher threshold would do
    only = verdict_metrics(verdicts[verdicts["defective"]], draws=20)
    assert np.isnan(only["AUROC"]) and np.isnan(only[alarms]) and only["good"] == 0


def test_calibration():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=300)
    honest = []
    for i, score in enumerate(scores):
        place = [0, 0, 10, 10] if rng.uniform() < score else [50, 50, 5, 5]
        result = {"image_id": i, "category_id": 1, "bbox": place, "score": float(score)}
        honest.append(result)
    objects = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 10, 10]} for i in range(300)]
    images, categories = [{"id": i} for i in range(300)], [{"id": 1, "name": "HOLE"}]
    coco = {"images": images, "categories": categories, "annotations": objects}
    table = calibration(coco, honest)
    assert table["n"].sum() == (scores >= 0.05).sum() and calibration_error(table) < 0.1
    boastful = calibration(coco, [r | {"score": 0.95} for r in honest])
    share = np.mean([r["bbox"][0] == 0 for r in honest])
    assert calibration_error(boastful) == pytest.approx(abs(0.95 - share))
    assert boastful["mean score"].isna().sum() == 9
    assert np.isnan(calibration_error(calibration(coco, [])))


@pytest.mark.parametrize("language, word", [("en", "background"), ("es", "fondo")])
def test_figures_in_both_languages(language, word):
    coco, results = case(4)
    matrix = confusion(coco, results, working_points(coco, results))
    drawn = plot_confusion(matrix, language)
    assert word in [t.get_text() for t in drawn.axes[0].get_yticklabels()]
    verdicts = plot_verdicts(image_verdicts(coco, results), language=language)
    reliability = plot_reliability(calibration(coco, results), language)
    for figure in (drawn, verdicts, reliability):
        figure.canvas.draw()
    assert "AUROC" in verdicts.axes[0].get_legend().get_texts()[0].get_text()
