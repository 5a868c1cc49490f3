"""The error budget against a case by hand and against TIDE's own package; tables of objects and photographs add up."""

import numpy as np
import pandas as pd
import pytest

from deimv2_tfg import errors as page
from deimv2_tfg.decisions import at_working_points, kept_results, working_points
from deimv2_tfg.evaluation import coco_metrics, jittered_results

NAMES = ["NORMAL", "CRACK", "HOLE"]


def case(seed=0, images=30):
    rng = np.random.default_rng(seed)
    coco = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(images)
        ],
        "categories": [{"id": 3 * k + 2, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [],
    }
    for i in range(images - 1):
        for _ in range(rng.integers(1, 4)):
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]),
                    "image_id": i,
                    "category_id": 3 * int(rng.integers(3)) + 2,
                    "bbox": [*rng.uniform(0, 60, 2).round(1), *rng.uniform(15, 40, 2).round(1)],
                }
            )
    kept = [r for r in jittered_results(coco, 0.1, seed) if rng.uniform() < 0.8]
    wrong = [
        r | {"category_id": 3 * int(rng.integers(3)) + 2, "score": float(rng.uniform())}
        for r in jittered_results(coco, 0.25, seed + 1)
    ]
    noise = [
        {
            "image_id": int(rng.integers(images)),
            "category_id": 3 * int(rng.integers(3)) + 2,
            "bbox": [*rng.uniform(0, 90, 2), *rng.uniform(5, 40, 2)],
            "score": float(rng.uniform()),
        }
        for _ in range(60)
    ]
    return coco, kept + wrong + noise


def test_each_kind_by_hand():
    box = lambda x: [x, 0.0, 10.0, 10.0]
    coco = {
        "images": [{"id": 1, "file_name": "1", "width": 200, "height": 20}],
        "categories": [{"id": k, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box(x)} for x in (0, 40, 80, 160)]
        + [{"image_id": 1, "category_id": 2, "bbox": box(120)}],
    }
    det = lambda c, x, s: {"image_id": 1, "category_id": c, "bbox": box(x), "score": s}
    results = [
        det(1, 0, 0.9),
        det(1, 1, 0.8),
        det(1, 45, 0.7),
        det(2, 80, 0.6),
        det(1, 125, 0.5),
        det(1, 190, 0.4),
    ]
    errors, objects = page.detection_errors(coco, results)
    assert dict(zip(errors["score"], errors["kind"])) == {
        0.9: "right",
        0.8: "duplicate",
        0.7: "localisation",
        0.6: "classification",
        0.5: "both",
        0.4: "background",
    }
    assert objects["found"].tolist() == [True, False, False, False, False] and objects[
        "missed"
    ].tolist() == [False, False, False, True, True]
    budget = page.error_budget(coco, results).set_index("class")
    at = lambda *hits, n: page._ap(
        -np.arange(len(hits), dtype=float), np.array(hits, dtype=bool), n
    )
    before = at(1, 0, 0, 0, 0, n=4)
    assert (
        budget["AP50"]["CRACK"] == pytest.approx(before)
        and budget["AP50"]["HOLE"] == 0
        and np.isnan(budget["AP50"]["NORMAL"])
    )
    expected = {
        "classification": at(1, 0, 0, 1, 0, 0, n=4),
        "localisation": at(1, 0, 1, 0, 0, n=4),
        "both": at(1, 0, 0, 0, n=4),
        "duplicate": at(1, 0, 0, 0, n=4),
        "background": at(1, 0, 0, 0, n=4),
        "missed": at(1, 0, 0, 0, 0, n=3),
    }
    for kind, ap in expected.items():
        assert budget[kind]["CRACK"] == pytest.approx(100 * (ap - before)), kind


@pytest.mark.parametrize("seed", range(3))
def test_means_are_tide_s(seed):
    tidecv = pytest.importorskip("tidecv", reason="tidecv is not installed (it is no requirement)")
    coco, results = case(seed)
    truth, found = tidecv.Data("truth", max_dets=600), tidecv.Data("found", max_dets=600)
    for c in coco["categories"]:
        truth.add_class(c["id"], c["name"]), found.add_class(c["id"], c["name"])
    for i in coco["images"]:
        truth.add_image(i["id"], i["file_name"]), found.add_image(i["id"], i["file_name"])
    for a in coco["annotations"]:
        truth.add_ground_truth(a["image_id"], a["category_id"], a["bbox"])
    for r in results:
        found.add_detection(r["image_id"], r["category_id"], r["score"], r["bbox"])
    tide = tidecv.TIDE()
    run, mean = (
        tide.evaluate(truth, found, pos_threshold=0.5, mode=tidecv.TIDE.BOX),
        page.error_budget(coco, results).iloc[-1],
    )
    assert run.ap == pytest.approx(100 * mean["AP50"], abs=1e-6)
    theirs = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), page.KINDS))
    for name, value in tide.get_main_errors()["found"].items():
        assert mean[theirs[name]] == pytest.approx(value, abs=1e-6), name


def test_budget_starts_from_the_judge_s_ap():
    coco, results = case(5)
    budget, metrics = (
        page.error_budget(coco, results).set_index("class"),
        coco_metrics(coco, results),
    )
    assert budget["AP50"]["mean"] == pytest.approx(metrics["AP50"]) and all(
        budget["AP50"][n] == pytest.approx(metrics[f"AP50/{n}"]) for n in NAMES
    )
    assert (budget[list(page.KINDS)] >= -1e-9).all(axis=None) and budget[list(page.KINDS)].loc[
        "mean"
    ].max() > 1
    nothing = page.error_budget(coco, []).set_index("class")
    assert (nothing["AP50"] == 0).all() and (nothing[["classification", "background"]] == 0).all(
        axis=None
    )


def test_objects_and_photographs_add_up_to_the_working_points():
    coco, results = case(6)
    points = working_points(coco, results)
    objects, photographs, total = (
        page.object_table(coco, results, points),
        page.photograph_table(coco, results, points),
        at_working_points(coco, results, points).iloc[-1],
    )
    assert (
        objects["found"].sum() == photographs["right"].sum() == total.TP
        and photographs["wrong"].sum() == total.FP
        and photographs["lost"].sum() == total.FN
    )
    assert photographs["bad"].is_monotonic_decreasing and len(photographs) == 30
    sides = page.effect(objects, "relative side", [0, 0.2, 0.3, np.inf])
    assert (
        sides["n"].sum() == len(objects)
        and ((sides["low"] <= sides["found"]) & (sides["found"] <= sides["high"])).all()
    )
    assert page.effect(objects, "objects in image", [90, np.inf])["found"].isna().all()
    for figure in (
        page.plot_budget(page.error_budget(coco, results), "es"),
        page.plot_effects(sides, language="es"),
    ):
        figure.canvas.draw()


def test_a_wrong_label_is_suspected_first():
    coco, _ = case(7)
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.6 + 0.3 * (k == 4),
        }
        for k, a in enumerate(coco["annotations"])
    ]
    right = coco["annotations"][4]["category_id"]
    coco["annotations"][4]["category_id"] = wrong = 2 if right != 2 else 5
    points = pd.DataFrame({"class": NAMES, "threshold": [0.5] * 3})
    first = page.likely_label_errors(coco, results, points).iloc[0]
    name = {c["id"]: c["name"] for c in coco["categories"]}
    assert (first.file_name, first.suspicion, first.annotated, first.predicted) == (
        f"{coco['annotations'][4]['image_id']}.png",
        "another class?",
        name[wrong],
        name[right],
    )
    assert page.likely_label_errors(coco, [], points).empty
