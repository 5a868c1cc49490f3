"""Results as functions of run directories: intervals against the naive bootstrap, grouping of seeds, figures, index."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deimv2_tfg import results as page
from deimv2_tfg.core import open_study, save_figure, save_table
from deimv2_tfg.evaluation import coco_metrics, jittered_results, match_tables, write_results

CLASSES = ["NORMAL", "ROTURA_FRACTURA", "HOLE"]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": 5 * i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in range(14)]
    annotations = [
        {
            "id": 0,
            "image_id": i["id"],
            "category_id": 2 + 4 * int(rng.integers(3)),
            "bbox": rng.uniform(10, 50, 4).round(1).tolist(),
        }
        for i in images[:-1]
        for _ in range(rng.integers(1, 4))
    ]  # the last photograph is empty
    coco = {
        "images": images,
        "annotations": [a | {"id": k} for k, a in enumerate(annotations)],
        "categories": [{"id": 2 + 4 * k, "name": c} for k, c in enumerate(CLASSES)],
    }
    (tmp_path / "data" / "test" / "images").mkdir(parents=True)
    (tmp_path / "data" / "test" / "test.json").write_text(json.dumps(coco))
    for image in images:
        Image.new("RGB", (120, 90), "grey").save(
            tmp_path / "data" / "test" / "images" / image["file_name"]
        )
    return tmp_path / "data"


def guesses(root, jitter, seed):
    coco = json.loads((root / "test" / "test.json").read_text())
    wrong = [
        r | {"category_id": 2 + 4 * (k % 3)}
        for k, r in enumerate(jittered_results(coco, 0.6, seed + 50))
    ]
    return coco, jittered_results(coco, jitter, seed) + wrong


def make_run(root, name, jitter=0.1, seed=0, **config):
    run = root.parent / "runs" / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(
        json.dumps({"data_dir": str(root), "seed": seed, "lr": 1e-4} | config)
    )
    write_results(run / "predictions_test.json", guesses(root, jitter, seed)[1])
    terms = {
        "train/loss_mal": 1.0,
        "train/loss_mal_aux_0": 0.5,
        "train/loss_mal_dn_0": 0.3,
        "train/loss_bbox_dn_pre": 0.2,
        "train/loss": 2.0,
        "train/lr": 1e-4,
    }
    lines = [{"split": "train", "step": 2 * e, "epoch": e, **terms} for e in (1, 2)] + [
        {"split": "val", "step": 4, "epoch": 2, "val/AP": 0.1}
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tra'
    )
    return run


def repeated(coco, results, weights):
    """The data set with each image repeated, under new ids."""
    copies = [
        (image["id"], 1000 * k + c)
        for k, (image, n) in enumerate(zip(coco["images"], weights))
        for c in range(n)
    ]
    move = lambda rows: [
        r | {"image_id": new} for old, new in copies for r in rows if r["image_id"] == old
    ]
    return coco | {
        "images": [{"id": new} for _, new in copies],
        "annotations": move(coco["annotations"]),
    }, move(results)


def test_bootstrap_is_the_naive_one(root):
    coco, results = guesses(root, 0.15, 3)
    weights = page.bootstrap_weights(len(coco["images"]), 12, seed=1)
    assert (weights.sum(axis=0) == len(coco["images"])).all()
    draws = [page.weighted_ap(t, weights) for t in match_tables(coco, results)]
    fast = page.mean_over_classes(draws)
    for k, column in enumerate(weights.T):
        naive = coco_metrics(*repeated(coco, results, column))
        assert fast[:, k].mean() == pytest.approx(naive["AP"], abs=1e-9)
        assert fast[0, k] == pytest.approx(naive["AP50"], abs=1e-9)
        assert [d[:, k].mean() for d in draws] == pytest.approx(
            [naive[f"AP/{c}"] for c in CLASSES], abs=1e-9, nan_ok=True
        )


def test_compare_draws_what_the_naive_bootstrap_draws(root):
    """Both models, photographs within strata and seeds with replacement, the long way: photographs copied, pycocotools on each draw."""
    runs = {
        "a": [make_run(root, f"a{s}", seed=s) for s in (0, 1)],
        "b": [make_run(root, f"b{s}", 0.2, seed=s, lr=1) for s in (0, 1)],
    }
    draws, table = 25, page.compare(runs, draws=25, seed=3)
    judged = {name: [page.judged_run(r) for r in its] for name, its in runs.items()}
    weights = page.bootstrap_weights(14, draws, 3, page.image_strata(judged["a"][0].tables))
    picks = page._seed_picks(2, draws, 3)
    coco, naive = guesses(root, 0.1, 0)[0], {}
    for name, jitter in (("a", 0.1), ("b", 0.2)):
        each = [
            [coco_metrics(*repeated(coco, guesses(root, jitter, s)[1], w))["AP"] for w in weights.T]
            for s in (0, 1)
        ]
        naive[name] = (np.array(each) * picks).sum(axis=0)
    for row, name in zip(table.to_dict("records"), "ab"):
        assert [row["AP low"], row["AP high"]] == pytest.approx(
            np.quantile(naive[name], [0.025, 0.975]).tolist(), abs=1e-9
        )
    difference = naive["b"] - naive["a"]
    assert table[["difference low", "difference high"]].iloc[1].tolist() == pytest.approx(
        np.quantile(difference, [0.025, 0.975]).tolist(), abs=1e-9
    )
    assert table["smallest difference"][1] == pytest.approx(2.8016 * difference.std(ddof=1))
    apart = [b.metrics["AP"] - a.metrics["AP"] for a, b in zip(judged["a"], judged["b"])]
    assert table["p seeds"][1] == page.sign_flip_p(apart) and table["AP sd"][1] == pytest.approx(
        np.std([j.metrics["AP"] for j in judged["b"]], ddof=1)
    )


def test_strata_are_the_rarest_class(root):
    coco, results = guesses(root, 0.1, 0)
    strata = page.image_strata(match_tables(coco, results))
    count = {c: sum(a["category_id"] == c for a in coco["annotations"]) for c in (2, 6, 10)}
    for stratum, image in zip(strata, sorted(coco["images"], key=lambda i: i["id"])):
        shown = {a["category_id"] for a in coco["annotations"] if a["image_id"] == image["id"]}
        assert stratum == (-1 if not shown else (min(shown, key=count.get) - 2) // 4)
    weights = page.bootstrap_weights(14, 50, 0, strata)
    assert (
        all((weights[strata == s].sum(axis=0) == (strata == s).sum()).all() for s in set(strata))
        and weights.max() > 1
    )


def test_image_swap_is_the_naive_one(root):
    coco, first = guesses(root, 0.1, 0)
    second = guesses(root, 0.3, 1)[1]
    tables = match_tables(coco, second), match_tables(coco, first)
    ids, differences = sorted(i["id"] for i in coco["images"]), []
    for column in np.random.default_rng(0).integers(0, 2, size=(14, 30)).T[1:]:
        swapped = {i for i, s in zip(ids, column) if s}
        mixed = lambda one, other: (
            [r for r in one if r["image_id"] not in swapped]
            + [r for r in other if r["image_id"] in swapped]
        )
        differences.append(
            coco_metrics(coco, mixed(second, first))["AP"]
            - coco_metrics(coco, mixed(first, second))["AP"]
        )
    observed = coco_metrics(coco, second)["AP"] - coco_metrics(coco, first)["AP"]
    assert page.image_swap_p([tables], draws=30) == pytest.approx(
        (1 + (np.abs(differences) >= abs(observed) - 1e-12).sum()) / 30
    )


def test_sign_flips_and_holm():
    assert (
        page.sign_flip_p([1, 1, 1, 1, 1, 1]) == 2 / 64
        and page.sign_flip_p([1, -1]) == 1
        and np.isnan(page.sign_flip_p([0.3]))
    )
    assert 0 < page.sign_flip_p(np.full(20, 0.1)) < 0.001
    assert page.holm([0.01, 0.04, 0.03, 0.5]).tolist() == pytest.approx(
        [0.04, 0.09, 0.09, 0.5]
    ) and page.holm([0.4, 0.6]).tolist() == pytest.approx([0.8, 0.8])
    assert np.isnan(page.holm([np.nan, 0.02])[0]) and page.holm([np.nan, 0.02])[1] == 0.02


def test_what_was_not_run_is_missing_and_not_zero(root):
    run = make_run(root, "one")
    bare = root.parent / "runs" / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"data_dir": str(root), "seed": 0, "lr": 7}))
    table = page.compare({"here": [run], "never": None, "half": [bare]}, draws=20)
    assert table["note"].tolist() == ["", "not run", "1 of 1 not evaluated on test"] and table[
        "seeds"
    ].tolist() == [1, 0, 0]
    assert table.loc[1:, ["AP", "AP50", "difference", "p images"]].isna().all(axis=None)
    listed = page.compare([run, bare, root.parent / "runs" / "gone"], draws=20)
    assert (
        listed["AP"].notna().tolist() == [True, False, False]
        and listed["note"].tolist()[2] == "not run"
    )
    first_missing = page.compare({"never": None, "here": [run]}, draws=20)
    assert (
        first_missing["AP"].notna().tolist() == [False, True]
        and first_missing["difference"].isna().all()
    )
    assert page.compare({"never": None})["AP"].isna().all()


def test_names_tell_configurations_apart():
    same = {
        "family": "detector",
        "model": "small",
        "image_size": 128,
        "lr": 0.1,
        "seed": 0,
        "classes": ["a"],
    }
    assert page.model_names(
        [
            same,
            same | {"lr": 0.2},
            {"family": "faster_rcnn", "model": "resnet18", "image_size": [64, 96]},
        ]
    ) == [
        "DEIMv2 small, 128 px, lr 0.1",
        "DEIMv2 small, 128 px, lr 0.2",
        "Faster R-CNN resnet18, 64 x 96 px",
    ]
    assert page.model_names(
        [{"family": "fusion", "head": "cross_attention", "image_size": 64}]
    ) == ["DEIMv2 with text, cross attention, 64 px"]


def test_a_class_that_is_not_drawn_is_nan(root):
    table = match_tables(*guesses(root, 0.1, 0))[0]
    weights = (table.objects == 0).astype(int)[:, None]
    assert np.isnan(page.weighted_ap(table, weights)).all()
    nothing = match_tables(guesses(root, 0.1, 0)[0], [])[0]
    assert (page.weighted_ap(nothing, np.ones((len(nothing.objects), 1), dtype=int)) == 0).all()


def test_compare_groups_seeds_and_pairs_differences(root):
    runs = [
        make_run(root, "a0", seed=0),
        make_run(root, "b", jitter=0.3, lr=1e-3),
        make_run(root, "a1", seed=1),
    ]
    table = page.compare(runs, draws=200)
    assert (
        table["run"].tolist() == ["a0", "b"]
        and table["seeds"].tolist() == [2, 1]
        and table["images"].tolist() == [14, 14]
    )
    alone = [coco_metrics(*guesses(root, 0.1, seed))["AP"] for seed in (0, 1)]
    assert table["AP"][0] == pytest.approx(np.mean(alone))
    assert (table["AP low"] < table["AP"]).all() and (table["AP"] < table["AP high"]).all()
    assert table["difference"][1] == pytest.approx(table["AP"][1] - table["AP"][0]) and np.isnan(
        table["difference"][0]
    )
    assert table["difference high"][1] < 0
    same = page.compare([runs[0], make_run(root, "copy", seed=0, lr=2e-4)], draws=50)
    assert same[["difference", "difference low", "difference high"]].iloc[1].tolist() == [0, 0, 0]


def test_runs_on_other_objects_are_not_compared(root):
    first = make_run(root, "one")
    second = make_run(root, "two", lr=1)
    other = root.parent / "other" / "test"
    other.mkdir(parents=True)
    coco = json.loads((root / "test" / "test.json").read_text())
    (other / "test.json").write_text(json.dumps(coco | {"annotations": coco["annotations"][1:]}))
    (second / "config.json").write_text(json.dumps({"data_dir": str(other.parent), "lr": 1}))
    with pytest.raises(ValueError, match="other objects"):
        page.compare([first, second])


def test_per_class_table_and_figures(root):
    run = make_run(root, "one")
    table, metrics = page.per_class_table(run, draws=100), coco_metrics(*guesses(root, 0.1, 0))
    assert table["class"].tolist() == [*CLASSES, "mean"] and table["AP"].tolist() == pytest.approx(
        [*[metrics[f"AP/{c}"] for c in CLASSES], metrics["AP"]]
    )
    assert table["objects"].iloc[:-1].sum() == table["objects"].iloc[-1]
    assert [bool(note) for note in table["note"]] == [
        n < 10 for n in table["objects"].iloc[:-1]
    ] + [False]
    for figure in (
        page.plot_training(run),
        page.plot_per_class(table),
        page.plot_precision_recall(run),
        page.prediction_sheet(run, root, n=5, threshold=0.2),
    ):
        figure.canvas.draw()
        plt.close(figure)


def test_log_with_a_half_written_line_and_loss_families(root):
    run = make_run(root, "one")
    assert len(page.read_metrics(run)) == 3 and page.read_metrics(run, "val").columns.tolist() == [
        "split",
        "step",
        "epoch",
        "val/AP",
    ]
    families = page.loss_families(page.read_metrics(run, "train"))
    assert (
        families["loss_mal"].tolist() == [1.5, 1.5]
        and families["denoising"].tolist() == [0.5, 0.5]
        and families["loss_fgl"].isna().all()
    )


def test_missing_files_say_what_to_do(root):
    run = make_run(root, "one")
    with pytest.raises(FileNotFoundError, match="evaluate"):
        page.run_results(run, "val")
    with pytest.raises(FileNotFoundError, match="data_dir"):
        page.run_annotations(run, "test", root.parent / "gone")
    with pytest.raises(KeyError, match="language"):
        page.label("epoch", "fr")


def test_index_lists_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    study, frame = open_study("smoke", study="indexed"), pd.DataFrame({"AP": [0.5]})
    fig, _ = plt.subplots()
    save_figure(fig, study, "curve", frame, "A curve.", [tmp_path / "detector-1"])
    save_table(frame, study, "scores", "Scores.")
    plt.close(fig)
    text = page.write_index(study).read_text()
    assert (
        "| curve | A curve. | [png](curve.png), [pdf](curve.pdf), [csv](curve.csv) | detector-1 |"
        in text
    )
    assert "| scores | Scores. | [csv](scores.csv), [tex](scores.tex) | -- |" in text


def test_sheet_takes_classes_in_turn(root):
    coco = json.loads((root / "test" / "test.json").read_text())
    chosen = page.sheet_images(coco, 6, seed=0)
    assert (
        len(set(chosen)) == 6 and coco["images"][-1]["id"] in chosen
    )  # the empty photograph is a class of its own
    assert page.sheet_images(coco, 6, seed=0) == chosen and len(page.sheet_images(coco, 100)) == 14
