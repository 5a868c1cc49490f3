"""The old protocol's mistakes move the number as they must; what was not run has no numbers."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from page_code import page_module

from deimv2_tfg.core import open_study
from deimv2_tfg.detector import DetectorOutput
from deimv2_tfg.evaluation import detections, evaluate
from deimv2_tfg.figures import read_provenance, save_figure, save_table
from deimv2_tfg.runs import Run
from deimv2_tfg.synthetic import study_data
from deimv2_tfg.training import phase1_run

thesis = page_module("07c_thesis")

STORED = Path(__file__).resolve().parents[1] / "thesis_figures" / "industrial6_compact"


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    return open_study("smoke", study="figures", chapter="07c_thesis")


def test_softmax_scores_are_shares_of_a_query():
    logits = torch.tensor([[[-4.0, -4.0, -4.0], [2.0, -4.0, -4.0]]])

    class Network(torch.nn.Module):
        def forward(self, pixel_values):
            return DetectorOutput(logits=logits.clone(), pred_boxes=torch.full((1, 2, 4), 0.5))

    image = torch.zeros(1, 3, 32, 32)
    size = torch.tensor([[32, 32]])
    softmax = detections(thesis.Softmaxed(Network()), image, size)[0]["scores"]
    sigmoid = detections(Network(), image, size)[0]["scores"]
    shares = logits.softmax(-1).flatten().tolist()
    assert softmax.tolist() == pytest.approx(sorted(shares, reverse=True), abs=1e-5)
    # a query that sees nothing stands above a threshold
    assert (softmax > 0.3).sum() == 4
    assert (sigmoid > 0.3).sum() == 1


def test_one_run_under_the_old_protocol_and_among_kinds_that_were_not_run(study):
    run = phase1_run(study)
    for split in ("val", "test"):
        evaluate(run, study_data(study), split)
    table = thesis.results_table(study, draws=20)
    assert table["seeds"].tolist() == [1, 0, 0]
    assert table["AP"].isna().tolist() == [False, True, True]
    assert set(table["note"]) == {"", "not run"}
    old = thesis.old_protocol(run, study_data(study)).set_index("variant")
    assert old["AP moved"]["this protocol"] == 0
    assert old["detections"]["this protocol"] > old["detections"]["only scores of 0.5 and more"]


@pytest.fixture
def make_run(study, smoke_data):
    """A function that writes a finished run whose predictions are the first of the true boxes."""
    coco = json.loads((smoke_data / "test" / "test.json").read_text())
    kept_keys = ("image_id", "category_id", "bbox")
    truth = [{k: a[k] for k in kept_keys} for a in coco["annotations"]]
    truth = [box | {"score": 0.5 + k / 1000} for k, box in enumerate(truth)]
    config = {"data_dir": str(smoke_data), "image_size": 64, "seed": 0}

    def make(name, kept, result, **fields):
        run = Run(study.runs / name)
        run.path.mkdir(parents=True)
        run.write("config.json", config | {"family": name.rpartition("-")[0]} | fields)
        run.write("result.json", result)
        run.save_predictions("test", truth[:kept])
        return run

    return make


def test_results_are_compared_among_runs_that_saw_as_many_images(study, make_run):
    """Two budgets, four fusion heads: the best head on val with the most seeds is compared."""
    long = make_run("detector-a", 40, {"images_seen": 900}, model="small", epochs=9)
    make_run("detector-b", 30, {"images_seen": 300}, model="small", epochs=3)
    make_run("faster_rcnn-a", 20, {"images_seen": 300}, model="resnet18", epochs=3)
    fused = {"run": str(long.path), "head": "residual", "text": "true", "held_out": ""}
    for seed in (0, 1):
        good = fused | {"head": "concat", "seed": seed}
        make_run(f"fusion-good{seed}", 35, {"val_AP": 0.4}, **good)
        make_run(f"fusion-less{seed}", 36, {"val_AP": 0.3}, **fused | {"seed": seed})
        held = fused | {"seed": seed, "held_out": "NORMAL"}
        make_run(f"fusion-held{seed}", 36, {"val_AP": 0.9}, **held)
        permuted = fused | {"seed": seed, "text": "permuted"}
        make_run(f"fusion-perm{seed}", 36, {"val_AP": 0.9}, **permuted)
    make_run("fusion-once", 36, {"val_AP": 0.9}, **fused | {"language": "es"})
    table = thesis.results_table(study, draws=20)
    assert table["images seen"].tolist() == [900, 900, 300, 300]
    assert table["seeds"].tolist() == [1, 2, 1, 1]
    models = [m.split(",")[0] for m in table["model"]]
    assert models[0] == models[2] == "DEIMv2 small"
    assert models[1] == "DEIMv2 with text" and "concat" in table["model"][1]
    assert models[3] == "Faster R-CNN resnet18"
    assert table["difference"].isna().tolist() == [True, False, True, False]
    assert table["difference"][3] == pytest.approx(table["AP"][3] - table["AP"][2])


def test_of_equal_configurations_the_newest_counts(study, make_run):
    make_run("detector-old", 40, {"images_seen": 9}, model="small")
    newest = make_run("detector-new", 30, {"images_seen": 9}, model="small")
    assert thesis.study_runs(study) == [newest]


def test_what_was_trained_as_an_example_is_no_run_of_the_study(study, make_run):
    """Chapter 5 shows heads of two epochs; neither tables nor curves may count them."""
    true_text = {"head": "residual", "text": "true", "held_out": ""}
    run = make_run("fusion-a", 40, {"val_AP": 0.4}, **true_text | {"epochs": 20})
    make_run("examples/fusion-b", 40, {"val_AP": 0.9}, **true_text | {"epochs": 2})
    assert thesis.study_runs(study) == [run]


def test_a_study_is_written_in_spanish_from_its_data(study, tmp_path):
    effects = pd.DataFrame({"head": ["residual"], "effect": [0.01], "low": [-0.01], "high": [0.02]})
    save_table(effects, study, "text_effect", "What is said of each class.")
    budget = pd.DataFrame({"class": ["NORMAL"], "classification": [1.0]})
    figure = thesis.plt.figure()
    save_figure(figure, study, "unknown_plot", budget, "Files of the data set, by split.")
    written = thesis.render(study.figures, tmp_path / "es").set_index("name")["written"]
    assert written["07c_thesis/text_effect"] and not written["07c_thesis/unknown_plot"]
    latex = (tmp_path / "es" / "07c_thesis" / "text_effect.tex").read_text()
    assert "efecto (puntos)" in latex and "+1,00 [-1,00; +2,00]" in latex
    assert r"\caption{Lo que se dice de cada clase.}" in latex


def test_what_is_stored_is_drawn_in_spanish(tmp_path):
    """Every table fits: eight columns; every known plot draws, without an English axis."""
    written = thesis.render(STORED, tmp_path).set_index("name")["written"]
    kinds = {r["name"]: r["kind"] for r in read_provenance(STORED)}
    assert all(written[name] for name, kind in kinds.items() if kind == "table")
    drawn = {name.rpartition("/")[2] for name in written[written].index}
    assert drawn >= {"confusion", "class_gains", "error_budget", "text_effect_plot", "verdicts"}
    for path in tmp_path.rglob("*.tex"):
        head = re.search(r"\\toprule\n(.*?)\\\\", path.read_text(), re.S).group(1)
        assert head.count("&") <= 7, path.name


def test_networks_are_drawn_by_the_images_that_they_saw(study, make_run):
    run = make_run("detector-a", 40, {}, model="small", batch_size=8)
    make_run("detector-b", 40, {}, model="tiny", batch_size=8)  # without a log
    rows = [{"split": "val", "step": 10 * e, "epoch": e, "val/AP": e / 10} for e in (1, 2)]
    lines = [json.dumps(r) for r in [{"split": "train", "step": 10, "epoch": 1}, *rows]]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    curves = thesis.learning_curves([run.path, study.runs / "detector-b"])
    assert curves["images seen"].tolist() == [80, 160] and curves["val/AP"].tolist() == [0.1, 0.2]
    assert curves.columns[-1] == "val/AP" and set(curves["run"]) == {"detector-a"}
    (line,) = thesis.plot_curves(curves, "es").axes[0].lines
    assert line.get_xdata().tolist() == [80, 160]


def test_examples_are_the_best_and_the_worst_photograph_of_each_class(study, make_run, smoke_data):
    run = make_run("detector-a", 8, {}, model="small")
    table = thesis.telling_photographs(run)
    coco = json.loads((smoke_data / "test" / "test.json").read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    shown = {(names[a["category_id"]], a["image_id"]) for a in coco["annotations"]}
    assert set(zip(table["class"], table["image_id"], strict=True)) <= shown
    bad = table.pivot(index="class", columns="which", values="bad")
    assert (bad["best"] <= bad["worst"]).all() and len(bad) == len({name for name, _ in shown})


def test_materials_are_told_by_the_name_of_the_source(tmp_path):
    sources = ("exp1_num_7.jpg", "exp6_num_12.jpg", "scratches_3.jpg", "weld-9.png", None)
    images = [{"id": k, "source": s} for k, s in enumerate(sources) if s] + [{"id": 4}]
    boxes = [{"image_id": k, "category_id": 5} for k in (0, 1, 2, 3, 4)]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "CRACK"}]}
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.json").write_text(json.dumps(coco))
    table = thesis.class_sources(tmp_path).set_index("material")
    assert table["test"].to_dict() == {
        "magnetic tile": 2,
        "not told": 1,
        "rolled steel (NEU)": 1,
        "weld-": 1,
    }
