"""Results as functions of run directories: compared, grouped, named, drawn, or missing."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from page_code import page_module
from PIL import Image

from deimv2_tfg import results as page
from deimv2_tfg.evaluation import (
    coco_metrics,
    jittered_results,
    judged,
    precision_recall,
)
from deimv2_tfg.runs import Run
from deimv2_tfg.statistics import interval, sign_flip_p, stratified_weights

SHEETS = page_module("07_results")
CLASSES = ["NORMAL", "ROTURA_FRACTURA", "HOLE"]
JITTERS = {"one": 0.1, "two": 0.3}
IMAGES = [{"id": 5 * i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in range(14)]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    annotations = []
    for image in IMAGES[:-1]:  # the last photograph is empty
        for _ in range(rng.integers(1, 4)):
            category = 2 + 4 * int(rng.integers(3))
            box = rng.uniform(10, 50, 4).round(1).tolist()
            about = {"id": len(annotations), "image_id": image["id"]}
            annotations.append(about | {"category_id": category, "bbox": box})
    categories = [{"id": 2 + 4 * k, "name": c} for k, c in enumerate(CLASSES)]
    coco = {"images": IMAGES, "annotations": annotations, "categories": categories}
    folder = tmp_path / "data" / "test"
    (folder / "images").mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps(coco))
    for image in IMAGES:
        Image.new("RGB", (120, 90), "grey").save(folder / "images" / image["file_name"])
    return tmp_path / "data"


def guesses(root, jitter, seed):
    """The annotations, and boxes near them with as many under a class that may be wrong."""
    coco = json.loads((root / "test" / "test.json").read_text())
    wrong = jittered_results(coco, 0.6, seed + 50)
    wrong = [r | {"category_id": 2 + 4 * (k % 3)} for k, r in enumerate(wrong)]
    return coco, jittered_results(coco, jitter, seed) + wrong


TERMS = {
    "train/loss_mal": 1.0,
    "train/loss_mal_aux_0": 0.5,
    "train/loss_mal_dn_0": 0.3,
    "train/loss_bbox_dn_pre": 0.2,
    "train/loss": 2.0,
    "train/lr": 1e-4,
}


def make_run(root, name, jitter=0.1, seed=0, **config):
    """A run with predictions and a log whose last line is only half written."""
    run = root.parent / "runs" / name
    run.mkdir(parents=True)
    config = {"data_dir": str(root), "seed": seed, "lr": 1e-4} | config
    (run / "config.json").write_text(json.dumps(config))
    Run(run).save_predictions("test", guesses(root, jitter, seed)[1])
    lines = [{"split": "train", "step": 2 * e, "epoch": e, **TERMS} for e in (1, 2)]
    lines.append({"split": "val", "step": 4, "epoch": 2, "val/AP": 0.1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"split": "tra')
    return run


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


def naive_draws(root, jitter, weights, picks):
    """AP of each draw of photographs and seeds the long way: photographs copied, pycocotools."""
    each = []
    for seed in (0, 1):
        coco, results = guesses(root, jitter, seed)
        each.append([coco_metrics(*repeated(coco, results, w))["AP"] for w in weights.T])
    return (np.array(each) * picks).sum(axis=0)


def test_compare_draws_what_the_naive_bootstrap_draws(root):
    """Both models, photographs within strata and seeds with replacement."""
    first = [make_run(root, f"a{s}", seed=s) for s in (0, 1)]
    second = [make_run(root, f"b{s}", 0.2, seed=s, lr=1) for s in (0, 1)]
    table = page.compare({"a": first, "b": second}, draws=25, seed=3)
    weights = stratified_weights(judged(first[0]).tables, 25, 3)
    picks = np.random.default_rng([3, 2]).multinomial(2, [0.5, 0.5], size=25).T / 2
    naive = {"a": naive_draws(root, 0.1, weights, picks)}
    naive["b"] = naive_draws(root, 0.2, weights, picks)
    for row in table.to_dict("records"):
        drawn = naive[row["model"]]
        ends = np.clip(interval(drawn, row["AP"], "bias-corrected"), 0, 1)
        assert (row["AP low"], row["AP high"]) == pytest.approx(ends, abs=1e-9)
    ends = np.quantile(naive["b"] - naive["a"], [0.025, 0.975])
    row = table.iloc[1]
    assert (row["difference low"], row["difference high"]) == pytest.approx(ends, abs=1e-9)
    scores = {run: judged(run).metrics["AP"] for run in (*first, *second)}
    apart = [scores[b] - scores[a] for a, b in zip(first, second, strict=True)]
    assert row["p seeds"] == sign_flip_p(apart) and row["smallest difference"] == np.inf
    spread = np.std([scores[run] for run in second], ddof=1)
    assert row["AP sd"] == pytest.approx(spread)


def test_the_good_class_can_be_left_out(root):
    run, other = make_run(root, "one"), make_run(root, "two", 0.3, lr=1)
    without = {}
    for name, jitter in JITTERS.items():
        without[name] = coco_metrics(*guesses(root, jitter, 0), CLASSES[1:])["AP"]
    table = page.compare({"one": [run], "two": [other]}, draws=50)
    assert table["AP without NORMAL"].tolist() == pytest.approx(list(without.values()))
    left = table.iloc[1]
    expected = without["two"] - without["one"]
    assert left["difference without NORMAL"] == pytest.approx(expected)
    assert left["difference without NORMAL low"] <= left["difference without NORMAL high"]
    last = page.per_class_table(run, draws=50).iloc[-1]
    assert last["class"] == "mean without NORMAL"
    assert last["AP"] == pytest.approx(without["one"])
    kept = page.compare([run], draws=50, leave_out=("NO_SUCH_CLASS",))
    assert kept.columns.tolist() == page.COMPARED


def test_what_was_not_run_is_missing_and_not_zero(root):
    run = make_run(root, "one")
    bare = root.parent / "runs" / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"data_dir": str(root), "seed": 0, "lr": 7}))
    table = page.compare({"here": [run], "never": None, "half": [bare]}, draws=20)
    assert table["note"].tolist() == ["", "not run", "1 of 1 not evaluated on test"]
    assert table["seeds"].tolist() == [1, 0, 0]
    missing = table.loc[1:, ["AP", "AP50", "difference", "p images"]]
    assert missing.isna().all(axis=None)
    listed = page.compare([run, bare, root.parent / "runs" / "gone"], draws=20)
    assert listed["AP"].notna().tolist() == [True, False, False]
    assert listed["note"].tolist()[2] == "not run"
    first_missing = page.compare({"never": None, "here": [run]}, draws=20)
    assert first_missing["AP"].notna().tolist() == [False, True]
    assert first_missing["difference"].isna().all()
    assert page.compare({"never": None})["AP"].isna().all()


def test_names_tell_configurations_apart():
    same = {"family": "detector", "model": "small", "image_size": 128, "lr": 0.1, "seed": 0}
    resnet = {"family": "faster_rcnn", "model": "resnet18", "image_size": [64, 96]}
    assert page.model_names([same, same | {"lr": 0.2}, resnet]) == [
        "DEIMv2 small, 128 px, lr 0.1",
        "DEIMv2 small, 128 px, lr 0.2",
        "Faster R-CNN resnet18, 64 x 96 px",
    ]
    fused = {"family": "fusion", "head": "cross_attention", "image_size": 64}
    assert page.model_names([fused]) == ["DEIMv2 with text, cross attention, 64 px"]


def test_compare_groups_seeds_and_pairs_differences(root):
    runs = [make_run(root, "a0", seed=0), make_run(root, "b", jitter=0.3, lr=1e-3)]
    runs.append(make_run(root, "a1", seed=1))
    table = page.compare(runs, draws=200)
    assert table["run"].tolist() == ["a0", "b"] and table["seeds"].tolist() == [2, 1]
    assert table["images"].tolist() == [14, 14]
    alone = [coco_metrics(*guesses(root, 0.1, seed))["AP"] for seed in (0, 1)]
    assert table["AP"][0] == pytest.approx(np.mean(alone))
    assert table["difference"][1] == pytest.approx(table["AP"][1] - table["AP"][0])
    assert np.isnan(table["difference"][0]) and table["difference high"][1] < 0
    copy = make_run(root, "copy", seed=0, lr=2e-4)
    same = page.compare([runs[0], copy], draws=50).iloc[1]
    assert same[["difference", "difference low", "difference high"]].tolist() == [0, 0, 0]


def test_runs_on_other_objects_are_not_compared(root):
    first, second = make_run(root, "one"), make_run(root, "two", lr=1)
    other = root.parent / "other" / "test"
    other.mkdir(parents=True)
    coco = json.loads((root / "test" / "test.json").read_text())
    fewer = coco | {"annotations": coco["annotations"][1:]}
    (other / "test.json").write_text(json.dumps(fewer))
    (second / "config.json").write_text(json.dumps({"data_dir": str(other.parent), "lr": 1}))
    with pytest.raises(ValueError, match="other objects"):
        page.compare([first, second])


def test_per_class_table(root):
    table = page.per_class_table(make_run(root, "one"), draws=100)
    metrics = coco_metrics(*guesses(root, 0.1, 0))
    assert table["class"].tolist() == [*CLASSES, "mean", "mean without NORMAL"]
    expected = [*(metrics[f"AP/{c}"] for c in CLASSES), metrics["AP"]]
    assert table["AP"].tolist()[:4] == pytest.approx(expected)
    objects = table["objects"].tolist()
    assert sum(objects[:3]) == objects[3] and sum(objects[1:3]) == objects[4]
    few = [n < 10 for n in objects[:3]]
    assert [bool(note) for note in table["note"]] == [*few, False, False]


@pytest.mark.parametrize("language", ["en", "es"])
def test_figures_draw_what_the_tables_hold(root, language):
    run = make_run(root, "one")
    table = page.per_class_table(run, draws=20)
    curve = precision_recall(*guesses(root, 0.1, 0))
    images = SHEETS.sheet_images(Run(run).annotations(), 5)
    training = page.plot_training(Run(run).metrics(), language)
    classes = page.plot_per_class(table, language)
    curves = page.plot_precision_recall(curve, language=language)
    sheet = page.prediction_sheet(run, images, threshold=0.2, language=language)
    for figure in (training, classes, curves, sheet):
        figure.canvas.draw()
    titles = [t.get_text() for t in classes.axes[0].get_yticklabels()]
    assert titles[1].startswith({"en": "fractures (", "es": "rotura o fractura ("}[language])
    assert len(curves.axes[0].get_legend().get_texts()) == len(CLASSES) + 2
    assert sum(bool(ax.images) for ax in sheet.axes) == 2 * len(images)
    plt.close("all")


def test_loss_families_add_heads_and_denoising_up(root):
    families = page.loss_families(Run(make_run(root, "one")).metrics("train"))
    assert families["loss_mal"].tolist() == [1.5, 1.5]
    assert families["denoising"].tolist() == [0.5, 0.5]
    assert "loss_fgl" not in families  # a network without distributions has no such column


def test_missing_files_say_what_to_do(root):
    run = make_run(root, "one")
    (run / "predictions_test.json").rename(run / "predictions_val.json")
    with pytest.raises(FileNotFoundError, match="evaluate"):
        judged(run, "test", root)
    with pytest.raises(FileNotFoundError, match="data_dir"):
        judged(run, "test", root.parent / "gone")
    with pytest.raises(ValueError, match="language"):
        page.plot_training(Run(run).metrics(), "fr")


def test_sheet_takes_classes_in_turn(root):
    coco = json.loads((root / "test" / "test.json").read_text())
    chosen = SHEETS.sheet_images(coco, 6, seed=0)
    assert len(set(chosen)) == 6 and SHEETS.sheet_images(coco, 6, seed=0) == chosen
    assert IMAGES[-1]["id"] in chosen  # the empty photograph is a class of its own
    assert len(SHEETS.sheet_images(coco, 100)) == 14


def test_classes_of_all_networks_are_those_of_each(root):
    runs = [make_run(root, "one"), make_run(root, "two", jitter=0.3, lr=1e-3)]
    table = page.class_comparison(runs, draws=50)
    for (_, part), run in zip(table.groupby("model", sort=False), runs, strict=True):
        alone = page.per_class_table(run, draws=50).iloc[: len(CLASSES)]
        assert part["AP"].tolist() == pytest.approx(alone["AP"].tolist())
        assert part["AP low"].tolist() == pytest.approx(alone["AP low"].tolist())
    figure = page.plot_class_comparison(table, "es")
    assert len(figure.axes[0].containers) == 2
    compared = page.compare(runs, draws=20)
    metrics = coco_metrics(*guesses(root, 0.1, 0))
    assert compared["AR100"][0] == pytest.approx(metrics["AR100"])
    plt.close("all")


def test_a_sheet_shows_other_networks_beside(root):
    runs = [make_run(root, "one"), make_run(root, "two", jitter=0.3, lr=1e-3)]
    sheet = page.prediction_sheet(runs[0], [0, 5, 10], others={"with text": runs[1]})
    titles = [ax.get_title() for ax in sheet.axes if ax.images]
    assert titles == ["annotated", "predicted", "with text"] * 3
    plt.close("all")
