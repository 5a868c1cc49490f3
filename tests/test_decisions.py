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


def case(seed=0, images=40):
    rng = np.random.default_rng(seed)
    coco = {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "categories": [{"id": 3 * k + 2, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [],
    }
    for i in range(images - 1):
        for k in range(rng.integers(1, 4)):
            coco["annotations"].append(
                {
                    "image_id": i,
                    "category_id": 3 * int(rng.integers(3) if i % 3 else 0) + 2,
                    "bbox": [*rng.uniform(0, 60, 2).round(1), *rng.uniform(15, 40, 2).round(1)],
                }
            )
    right = [
        r | {"score": round(rng.beta(4, 2), 2)} for r in jittered_results(coco, 0.1, seed)
    ]  # rounded: many equal scores
    wrong = [
        r | {"category_id": 3 * int(rng.integers(3)) + 2, "score": round(rng.beta(2, 3), 2)}
        for r in jittered_results(coco, 0.2, seed + 1)
    ]
    return coco, right + wrong


def counts_at(coco, results, name, threshold):
    "TP, FP, FN of one class at a threshold: the judge on the results that reach it."
    points = pd.DataFrame(
        {"class": NAMES, "threshold": [threshold if n == name else 2.0 for n in NAMES]}
    )
    row = at_working_points(coco, results, points).set_index("class").loc[name]
    return row.TP, row.FP, row.FN


@pytest.mark.parametrize("name", NAMES)
def test_no_other_threshold_has_a_higher_f1(name):
    coco, results = case()
    chosen = working_points(coco, results).set_index("class").loc[name]
    f1 = lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn)
    every = [
        f1(*counts_at(coco, results, name, t)) for t in np.arange(0.005, 1, 0.01)
    ]  # between all scores there are
    assert (
        chosen.F1
        == pytest.approx(max(every))
        == pytest.approx(f1(*counts_at(coco, results, name, chosen.threshold)))
    )
    tp, fp, fn = counts_at(coco, results, name, chosen.threshold)
    assert chosen.precision == pytest.approx(tp / (tp + fp)) and chosen.recall == pytest.approx(
        tp / (tp + fn)
    )


def test_curve_on_some_images_is_the_curve_of_those_images():
    coco, results = case(1)
    used = np.arange(40) % 2 == 0
    part = coco | {
        "images": [i for i in coco["images"] if i["id"] % 2 == 0],
        "annotations": [a for a in coco["annotations"] if a["image_id"] % 2 == 0],
    }
    alone = match_tables(part, [r for r in results if r["image_id"] % 2 == 0])
    for whole, those in zip(match_tables(coco, results), alone):
        pd.testing.assert_frame_equal(f1_curve(whole, images=used), f1_curve(those))


def test_a_class_that_cannot_choose_says_so():
    coco, results = case()
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 8]
    points = working_points(coco, results)
    assert (
        points["note"].tolist()[:2] == ["", ""]
        and "median" in points["note"][2]
        and np.isnan(points["F1"][2])
    )
    assert points["threshold"][2] == pytest.approx(points["threshold"][:2].median())
    assert (working_points(coco, [])["threshold"] == 1).all()
    nothing = at_working_points(coco, [], working_points(coco, []))
    assert (
        nothing["precision"].isna().all()
        and (nothing["recall"].iloc[:2] == 0).all()
        and np.isnan(nothing["recall"][2])
    )


def test_confusion_of_a_case_by_hand():
    coco = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": k, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "category_id": 2, "bbox": [50, 50, 10, 10]},
            {"image_id": 2, "category_id": 1, "bbox": [0, 0, 10, 10]},
        ],
    }
    det = lambda image, c, x, score: {
        "image_id": image,
        "category_id": c,
        "bbox": [x, x, 10, 10],
        "score": score,
    }
    results = [
        det(1, 1, 0, 0.9),
        det(1, 2, 0, 0.95),  # CRACK found, and a HOLE claimed on the same object: a false alarm
        det(1, 1, 50, 0.8),  # HOLE taken for CRACK
        det(2, 2, 80, 0.7),
        det(2, 1, 0, 0.2),
    ]  # a false alarm, and a CRACK under its threshold
    matrix = confusion(coco, results, pd.DataFrame({"class": NAMES, "threshold": [0.5] * 3}))
    assert (
        matrix.loc["CRACK"].tolist() == [0, 1, 0, 1]
        and matrix.loc["HOLE"].tolist() == [0, 1, 0, 0]
        and matrix.loc["background"].tolist() == [0, 0, 2, 0]
    )
    assert matrix.loc["NORMAL"].sum() == 0


def test_confusion_adds_up():
    coco, results = case(2)
    points = working_points(coco, results)
    matrix, applied = confusion(coco, results, points), at_working_points(coco, results, points)
    assert np.diag(matrix)[:-1].tolist() == applied["TP"].tolist()[:-1]
    assert matrix.iloc[:-1].sum(axis=1).tolist() == applied["objects"].tolist()[
        :-1
    ] and matrix.to_numpy().sum() - matrix.loc["background"].sum() == len(coco["annotations"])
    assert (
        matrix.iloc[:, :-1].sum().sum() == len(kept_results(coco, results, points))
        and matrix.iloc[:-1, :-1].to_numpy().sum() > applied["TP"].iloc[-1]
    )


def test_verdicts():
    coco, results = case(3)
    verdicts = image_verdicts(coco, results)
    defect = {a["image_id"] for a in coco["annotations"] if a["category_id"] != 2}
    assert (
        verdicts["defective"].tolist() == [i["id"] in defect for i in coco["images"]]
        and not verdicts["defective"].iloc[-1]
    )  # no box at all: good
    assert verdicts["score"][0] == max(
        r["score"] for r in results if r["image_id"] == 0 and r["category_id"] != 2
    )
    metrics = verdict_metrics(verdicts, val=verdicts, draws=200)
    pairs = [
        (a > b) + (a == b) / 2
        for a in verdicts["score"][verdicts["defective"]]
        for b in verdicts["score"][~verdicts["defective"]]
    ]
    assert metrics["AUROC"] == pytest.approx(np.mean(pairs))
    assert (
        metrics["AUROC low"] < metrics["AUROC"] < metrics["AUROC high"]
        and metrics["defective"] + metrics["good"] == 40
    )
    assert (
        metrics["val_recall"] >= 0.95
        and metrics["val_false_alarms"] == metrics["false alarms at 95%"]
    )
    higher = np.nextafter(metrics["val_threshold"], 2)
    assert (
        verdicts["score"][verdicts["defective"]] >= higher
    ).mean() < 0.95  # no higher threshold would do
    only = verdict_metrics(verdicts[verdicts["defective"]], draws=20)
    assert np.isnan(only["AUROC"]) and np.isnan(only["false alarms at 95%"]) and only["good"] == 0


def test_calibration():
    rng = np.random.default_rng(0)
    coco = {
        "images": [{"id": i} for i in range(300)],
        "categories": [{"id": 1, "name": "HOLE"}],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [0, 0, 10, 10]} for i in range(300)
        ],
    }
    scores = rng.uniform(size=300)
    honest = [
        {
            "image_id": i,
            "category_id": 1,
            "bbox": [0, 0, 10, 10] if rng.uniform() < s else [50, 50, 5, 5],
            "score": float(s),
        }
        for i, s in enumerate(scores)
    ]
    table = calibration(coco, honest)
    assert table["n"].sum() == (scores >= 0.05).sum() and calibration_error(table) < 0.1
    boastful = calibration(coco, [r | {"score": 0.95} for r in honest])
    share = np.mean([r["bbox"][0] == 0 for r in honest])
    assert calibration_error(boastful) == pytest.approx(abs(0.95 - share)) and np.isnan(
        calibration_error(calibration(coco, []))
    )


def test_figures_in_both_languages():
    coco, results = case(4)
    verdicts, table, matrix = (
        image_verdicts(coco, results),
        calibration(coco, results),
        confusion(coco, results, working_points(coco, results)),
    )
    for language, word in (("en", "background"), ("es", "fondo")):
        assert word in [
            t.get_text() for t in plot_confusion(matrix, language).axes[0].get_yticklabels()
        ]
        for figure in (
            plot_verdicts(verdicts, language=language),
            plot_reliability(table, language),
        ):
            figure.canvas.draw()
    with pytest.raises(KeyError, match="language"):
        plot_reliability(table, "fr")
