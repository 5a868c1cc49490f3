"""Averages, intervals and p values against the long way: repeated photographs and pycocotools."""

import math

import numpy as np
import pytest

from deimv2_tfg import statistics
from deimv2_tfg.evaluation import coco_metrics, jittered_results, match_tables

CLASSES = ["NORMAL", "CRACK", "HOLE"]
LEVELS = 10


@pytest.fixture(scope="module")
def coco():
    rng = np.random.default_rng(0)
    images = [{"id": 5 * i, "width": 120, "height": 90} for i in range(14)]
    categories = [{"id": 2 + 4 * k, "name": c} for k, c in enumerate(CLASSES)]
    annotations = []
    for image in images[:-1]:  # the last photograph is empty
        for _ in range(rng.integers(1, 4)):
            category = 2 + 4 * int(rng.integers(3))
            box = rng.uniform(10, 50, 4).round(1).tolist()
            annotations.append({"image_id": image["id"], "category_id": category, "bbox": box})
    return {"images": images, "categories": categories, "annotations": annotations}


def guesses(coco, jitter, seed):
    """Boxes near the annotated ones, and as many under a class that may be wrong."""
    wrong = jittered_results(coco, 0.6, seed + 50)
    wrong = [r | {"category_id": 2 + 4 * (k % 3)} for k, r in enumerate(wrong)]
    return jittered_results(coco, jitter, seed) + wrong


def repeated(coco, results, weights):
    """The data set and the results with each image repeated, under new ids."""
    copies = {}
    for k, (image, n) in enumerate(zip(coco["images"], weights, strict=True)):
        copies[image["id"]] = [1000 * k + c for c in range(n)]

    def copied(rows):
        return [r | {"image_id": new} for r in rows for new in copies[r["image_id"]]]

    images = [{"id": new} for ids in copies.values() for new in ids]
    annotations = copied(coco["annotations"])
    return coco | {"images": images, "annotations": annotations}, copied(results)


def sampled(values, spread=0.05, draws=400, seed=0):
    """Trainings of one class with these APs and draws around them."""
    rng = np.random.default_rng(seed)
    found = []
    for k, value in enumerate(values):
        observed = np.full((1, LEVELS), value)
        drawn = np.tile(rng.normal(value, spread, draws), (1, LEVELS, 1))
        found.append(statistics.Sampled(("a",), observed, drawn, k))
    return found


def test_weighted_ap_is_that_of_repeated_photographs(coco):
    results = guesses(coco, 0.15, 3)
    tables = match_tables(coco, results)
    weights = statistics.bootstrap_weights(14, 12, seed=1)
    assert (weights.sum(axis=0) == 14).all()
    found = statistics.sample_ap(tables, weights)
    for k, column in enumerate(weights.T):
        naive = coco_metrics(*repeated(coco, results, column))
        for name in ("AP", "AP50", *(f"AP/{c}" for c in CLASSES)):
            drawn = found.metric(name)[1][k]
            assert drawn == pytest.approx(naive[name], abs=1e-9, nan_ok=True), name
    alone = coco_metrics(coco, results, classes=CLASSES[1:])
    assert found.metric("AP", leave_out=("NORMAL",))[0] == pytest.approx(alone["AP"], abs=1e-9)
    with pytest.raises(KeyError, match="AP75"):
        found.metric("AP75")


def test_a_class_that_is_not_drawn_is_nan(coco):
    table = match_tables(coco, guesses(coco, 0.1, 0))[0]
    without = (table.objects == 0).astype(int)[:, None]
    assert np.isnan(statistics.weighted_ap(table, without)).all()
    nothing = match_tables(coco, [])[0]
    assert (statistics.weighted_ap(nothing, np.ones((14, 1), dtype=int)) == 0).all()


def test_strata_are_the_rarest_class(coco):
    tables = match_tables(coco, guesses(coco, 0.1, 0))
    strata = statistics.image_strata(tables)
    count = dict.fromkeys((2, 6, 10), 0)
    shown = {i["id"]: set() for i in coco["images"]}
    for a in coco["annotations"]:
        count[a["category_id"]] += 1
        shown[a["image_id"]].add(a["category_id"])
    for stratum, (_, classes) in zip(strata, sorted(shown.items()), strict=True):
        expected = (min(classes, key=count.get) - 2) // 4 if classes else -1
        assert stratum == expected
    weights = statistics.stratified_weights(tables, 50)
    for stratum in set(strata):
        inside = weights[strata == stratum]
        assert (inside.sum(axis=0) == len(inside)).all()
    assert weights.max() > 1


def test_image_swap_is_the_naive_one(coco):
    first, second = guesses(coco, 0.1, 0), guesses(coco, 0.3, 1)
    ids = np.array([i["id"] for i in coco["images"]])
    coins = np.random.default_rng(0).integers(0, 2, size=(14, 30)).T[1:]

    def mixed(one, other, swapped):
        kept = [r for r in one if r["image_id"] not in swapped]
        return kept + [r for r in other if r["image_id"] in swapped]

    def difference(swapped):
        ours = coco_metrics(coco, mixed(second, first, swapped))["AP"]
        return ours - coco_metrics(coco, mixed(first, second, swapped))["AP"]

    observed = difference(set())
    drawn = [difference(set(ids[coin == 1].tolist())) for coin in coins]
    larger = (np.abs(drawn) >= abs(observed) - 1e-12).sum()
    pair = (match_tables(coco, second), match_tables(coco, first))
    assert statistics.image_swap_p([pair], draws=30) == pytest.approx((1 + larger) / 30)


def test_sign_flips():
    assert statistics.sign_flip_p([1] * 6) == 2 / 64
    assert statistics.sign_flip_p([1, -1]) == 1
    assert statistics.sign_flip_p([1, 2, -1]) == 6 / 8  # sums of signs: two are 0
    assert math.isnan(statistics.sign_flip_p([0.3]))
    assert math.isnan(statistics.sign_flip_p([0.3, math.nan]))
    assert 0 < statistics.sign_flip_p(np.full(20, 0.1)) < 0.001


def test_holm():
    found = statistics.holm([0.01, 0.04, 0.03, 0.5])
    assert found == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert statistics.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert statistics.holm([np.nan, 0.02]) == pytest.approx([np.nan, 0.02], nan_ok=True)
    assert np.isnan(statistics.holm([np.nan, np.nan])).all()


def test_the_smallest_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(1)
    for pairs, expected in ((6, 4.39), (8, 3.3)):
        needed = statistics.smallest_difference([1.0] * pairs)
        assert needed == 0  # no spread: any difference is found
        spread = np.linspace(-1, 1, pairs)
        error = spread.std(ddof=1) / math.sqrt(pairs)
        needed = statistics.smallest_difference(spread) / error
        assert needed == pytest.approx(expected, abs=0.15)
        samples = rng.normal(needed / math.sqrt(pairs), 1, size=(400, pairs))
        found = [statistics.sign_flip_p(s) < 0.05 for s in samples]
        assert np.mean(found) == pytest.approx(0.8, abs=0.07)
    assert statistics.smallest_difference([0.1, 0.2, 0.3]) == math.inf
    assert math.isnan(statistics.smallest_difference([0.1]))


def test_effects_are_paired_by_seed_and_one_number_for_one_fixed_network():
    ours = sampled([0.50, 0.52, 0.51])
    theirs = sampled([0.40, 0.42, 0.41])  # the same draws, .1 lower
    effect = statistics.paired_effect(ours, theirs[::-1])
    ends = (effect.difference, effect.low, effect.high)
    assert ends == pytest.approx((0.1, 0.1, 0.1)) and effect.pairs == 3
    assert effect.p == 0.25
    one = sampled([0.45], seed=5)
    apart = statistics.paired_effect(ours, one)
    fixed = statistics.paired_effect(ours, one, fixed=True)
    assert (apart.low, apart.high) == pytest.approx((fixed.low, fixed.high))
    assert (apart.pairs, fixed.pairs) == (1, 3) and math.isnan(apart.p) and fixed.p == 0.25
    with pytest.raises(ValueError, match="one network"):
        statistics.paired_effect(ours, theirs, fixed=True)


def test_estimates_draw_seeds_as_well_as_photographs():
    group = sampled([0.3, 0.7], spread=1e-9)
    found = statistics.estimate(group)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.3, 0.7))
    alone = statistics.estimate(group[:1])
    assert (alone.low, alone.high) == pytest.approx((0.3, 0.3))


def test_kinds_of_interval():
    draws = np.array([0.1, 0.2, 0.3, 0.4, 0.9, math.nan])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    bias = np.nanmean(draws) - 0.3
    assert statistics.interval(draws) == pytest.approx((low, high))
    assert statistics.interval(draws, 0.3, "basic") == pytest.approx((0.6 - high, 0.6 - low))
    centre, half = 0.3 - 2 * bias, 1.1 * 1.959964 * np.nanstd(draws)
    low, high = statistics.interval(draws, 0.3, "bias-corrected")
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert np.isnan(statistics.interval(np.array([math.nan]), 0.3)).all()
    with pytest.raises(ValueError, match="kind='bca'"):
        statistics.interval(draws, 0.3, "bca")


def test_shares_and_areas():
    low, high = statistics.wilson(0, 28)
    assert low == 0 and high == pytest.approx(0.1206, abs=1e-4)
    assert np.isnan(statistics.wilson(0, 0)).all()
    rng = np.random.default_rng(0)
    positive, score = rng.uniform(size=40) < 0.4, rng.integers(0, 10, 40)
    pairs = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert statistics.auroc(positive, score) == pytest.approx(np.mean(pairs))
    assert math.isnan(statistics.auroc(positive[positive], score[positive]))


def test_bias_corrected_intervals_hold_the_truth_where_percentiles_do_not():
    """A small version of the table that chapter 7 saves; 90 % is promised, 120 sets resolve 3 %."""
    table = statistics.interval_coverage(repeats=120, draws=200).set_index("kind")
    assert table["covered"]["bias-corrected"] > 0.87
    assert table["covered"]["percentile"] < table["covered"]["bias-corrected"] - 0.03
    sides = table.loc["percentile"]
    assert sides["below"] > 5 * sides["above"]  # nearly all misses lie below the interval
    assert (table["covered"] + table["below"] + table["above"]).tolist() == pytest.approx([1] * 3)
