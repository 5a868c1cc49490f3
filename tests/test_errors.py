"""The error budget by hand and against TIDE's own package; objects and photographs add up."""

import numpy as np
import pandas as pd
import pytest
from page_code import page_module

from deimv2_tfg.decisions import at_working_points, working_points
from deimv2_tfg.evaluation import coco_metrics, jittered_results

page = page_module("07a_errors")
NAMES = ["NORMAL", "CRACK", "HOLE"]
IDS = [2, 5, 8]
KINDS = list(page.ERROR_KINDS)


def case(seed=0, images=30):
    """Annotations, the last image empty, and results with every kind of error."""
    rng = np.random.default_rng(seed)
    annotations = []
    for i in range(images - 1):
        for _ in range(rng.integers(1, 4)):
            category = IDS[int(rng.integers(3))]
            box = [*rng.uniform(0, 60, 2).round(1), *rng.uniform(15, 40, 2).round(1)]
            about = {"id": len(annotations), "image_id": i, "category_id": category}
            annotations.append(about | {"bbox": box})
    files = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(images)]
    categories = [{"id": k, "name": n} for k, n in zip(IDS, NAMES, strict=True)]
    coco = {"images": files, "categories": categories, "annotations": annotations}
    results = [r for r in jittered_results(coco, 0.1, seed) if rng.uniform() < 0.8]
    for r in jittered_results(coco, 0.25, seed + 1):
        wrong = {"category_id": IDS[int(rng.integers(3))], "score": float(rng.uniform())}
        results.append(r | wrong)
    for _ in range(60):
        about = {"image_id": int(rng.integers(images)), "category_id": IDS[int(rng.integers(3))]}
        box = [*rng.uniform(0, 90, 2), *rng.uniform(5, 40, 2)]
        results.append(about | {"bbox": box, "score": float(rng.uniform())})
    return coco, results


def box(category, x, **more):
    return {"image_id": 1, "category_id": category, "bbox": [x, 0.0, 10.0, 10.0], **more}


@pytest.fixture
def by_hand():
    """One detection of each kind; CRACK has objects at 0, 40, 80 and 160, HOLE at 120."""
    coco = {
        "images": [{"id": 1, "file_name": "1", "width": 200, "height": 20}],
        "categories": [{"id": k, "name": n} for k, n in enumerate(NAMES)],
        "annotations": [*(box(1, x) for x in (0, 40, 80, 160)), box(2, 120)],
    }
    places = [(1, 0, 0.9), (1, 1, 0.8), (1, 45, 0.7), (2, 80, 0.6), (1, 125, 0.5), (1, 190, 0.4)]
    return coco, [box(c, x, score=s) for c, x, s in places]


def ap_of(*hits, n):
    """AP50 of detections in falling order of score, 1 where right, of n objects: plain loops."""
    points, right = [], 0
    for k, hit in enumerate(hits, start=1):
        right += hit
        points.append((right / n, right / k))
    grid = [max((p for r, p in points if r >= j / 100 - 1e-12), default=0.0) for j in range(101)]
    return sum(grid) / 101


def test_each_kind_by_hand(by_hand):
    errors, objects = page.detection_errors(*by_hand)
    expected = ["right", "duplicate", "localisation", "classification", "both", "background"]
    kinds = dict(zip(errors["score"], errors["kind"], strict=True))
    assert [kinds[s] for s in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)] == expected
    assert objects["found"].tolist() == [True, False, False, False, False]
    assert objects["missed"].tolist() == [False, False, False, True, True]


def test_each_correction_by_hand(by_hand):
    budget = page.error_budget(*by_hand).set_index("class")
    before = ap_of(1, 0, 0, 0, 0, n=4)
    assert budget["AP50"]["CRACK"] == pytest.approx(before)
    assert budget["AP50"]["HOLE"] == 0 and np.isnan(budget["AP50"]["NORMAL"])
    expected = {
        "classification": ap_of(1, 0, 0, 1, 0, 0, n=4),
        "localisation": ap_of(1, 0, 1, 0, 0, n=4),
        "both": ap_of(1, 0, 0, 0, n=4),
        "duplicate": ap_of(1, 0, 0, 0, n=4),
        "background": ap_of(1, 0, 0, 0, n=4),
        "missed": ap_of(1, 0, 0, 0, 0, n=3),
    }
    for kind, ap in expected.items():
        assert budget[kind]["CRACK"] == pytest.approx(100 * (ap - before)), kind


@pytest.mark.parametrize("seed", range(3))
def test_means_are_tide_s(seed):
    tidecv = pytest.importorskip("tidecv", reason="tidecv is not installed (it is no requirement)")
    coco, results = case(seed)
    truth, found = tidecv.Data("truth", max_dets=600), tidecv.Data("found", max_dets=600)
    for data in (truth, found):
        for c in coco["categories"]:
            data.add_class(c["id"], c["name"])
        for i in coco["images"]:
            data.add_image(i["id"], i["file_name"])
    for a in coco["annotations"]:
        truth.add_ground_truth(a["image_id"], a["category_id"], a["bbox"])
    for r in results:
        found.add_detection(r["image_id"], r["category_id"], r["score"], r["bbox"])
    tide = tidecv.TIDE()
    run = tide.evaluate(truth, found, pos_threshold=0.5, mode=tidecv.TIDE.BOX)
    mean = page.error_budget(coco, results).iloc[-1]
    assert run.ap == pytest.approx(100 * mean["AP50"], abs=1e-6)
    theirs = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), KINDS, strict=True))
    for name, value in tide.get_main_errors()["found"].items():
        assert mean[theirs[name]] == pytest.approx(value, abs=1e-6), name


def test_budget_starts_from_coco_s_ap():
    coco, results = case(5)
    budget, metrics = page.error_budget(coco, results).set_index("class"), coco_metrics(*case(5))
    assert budget["AP50"]["mean"] == pytest.approx(metrics["AP50"])
    for name in NAMES:
        assert budget["AP50"][name] == pytest.approx(metrics[f"AP50/{name}"])
    assert (budget[KINDS] >= -1e-9).all(axis=None) and budget.loc["mean", KINDS].max() > 1
    nothing = page.error_budget(coco, []).set_index("class")
    assert (nothing["AP50"] == 0).all()
    assert (nothing[["classification", "background"]] == 0).all(axis=None)
    for language, word in (("en", "wrong class"), ("es", "clase errónea")):
        drawn = page.plot_budget(budget.reset_index(), language)
        assert word in [t.get_text() for t in drawn.axes[0].get_legend().get_texts()]


def test_objects_and_photographs_add_up_to_the_working_points():
    coco, results = case(6)
    points = working_points(coco, results)
    objects = page.object_table(coco, results, points)
    photographs = page.worst_photographs(coco, results, points)
    total = at_working_points(coco, results, points).iloc[-1]
    assert objects["found"].sum() == photographs["right"].sum() == total.TP
    assert photographs["wrong"].sum() == total.FP and photographs["lost"].sum() == total.FN
    assert photographs["bad"].is_monotonic_decreasing and len(photographs) == 30


def test_shares_found_by_size():
    coco, results = case(6)
    objects = page.object_table(coco, results, working_points(coco, results))
    sides = page.found_by(objects, "relative side", [0, 0.2, 0.3, np.inf])
    assert sides["n"].sum() == len(objects)
    assert ((sides["low"] <= sides["found"]) & (sides["found"] <= sides["high"])).all()
    crowds = page.found_by(objects, "objects in image", [1, 2, 4, 90, np.inf])
    assert crowds["bin"].tolist() == ["1", "2 to 3"]  # bins without an object are left out
    drawn = page.plot_found(pd.concat([sides, crowds]), language="es")
    assert drawn.axes[0].get_xlabel().startswith("lado de la caja")


def test_a_wrong_label_is_suspected_first():
    coco, _ = case(7)
    results = []
    for k, a in enumerate(coco["annotations"]):
        result = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        results.append(result | {"score": 0.6 + 0.3 * (k == 4)})
    mislabelled = coco["annotations"][4]
    right = mislabelled["category_id"]
    mislabelled["category_id"] = wrong = 2 if right != 2 else 5
    points = pd.DataFrame({"class": NAMES, "threshold": [0.5] * 3})
    first = page.likely_label_errors(coco, results, points).iloc[0]
    name = dict(zip(IDS, NAMES, strict=True))
    assert first.file_name == f"{mislabelled['image_id']}.png"
    assert first.suspicion == "another class?"
    assert (first.annotated, first.predicted) == (name[wrong], name[right])
    assert page.likely_label_errors(coco, [], points).empty


def test_a_good_part_claimed_in_vain_is_no_label_error():
    coco, _ = case(7)
    empty = coco["images"][-1]["id"]
    claim = {"image_id": empty, "bbox": [10.0, 10.0, 30.0, 30.0], "score": 0.9}
    results = [claim | {"category_id": category} for category in IDS]
    points = pd.DataFrame({"class": NAMES, "threshold": [0.5] * 3})
    suspects = page.likely_label_errors(coco, results, points)
    assert suspects["predicted"].tolist() == ["CRACK", "HOLE"]
