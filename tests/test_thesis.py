"""The old protocol's mistakes move the number as they must; stale figures are found; what was not run has no numbers."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from deimv2_tfg import thesis
from deimv2_tfg.core import open_study, save_figure, save_table
from deimv2_tfg.detector import DetectorOutput
from deimv2_tfg.evaluation import LABELS, detections
from deimv2_tfg.training import phase1_run


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    return open_study("smoke", study="figures")


def test_softmax_scores_are_shares_of_a_query():
    logits = torch.tensor([[[-4.0, -4.0, -4.0], [2.0, -4.0, -4.0]]])

    class Network(torch.nn.Module):
        def forward(self, pixel_values):
            return DetectorOutput(logits=logits.clone(), pred_boxes=torch.full((1, 2, 4), 0.5))

    image = torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]])
    softmax, sigmoid = (
        thesis.Softmaxed(Network()).detections(*image)[0]["scores"],
        detections(Network(), *image)[0]["scores"],
    )
    assert softmax.tolist() == pytest.approx(
        sorted(logits.softmax(-1).flatten().tolist(), reverse=True), abs=1e-5
    )
    assert (softmax > 0.3).sum() == 4 and (
        sigmoid > 0.3
    ).sum() == 1  # a query that sees nothing stands above a threshold


def test_stale_figures(study):
    run = study.runs / "detector-1"
    run.mkdir(parents=True)
    from deimv2_tfg.runs import data_hash
    from deimv2_tfg.synthetic import study_data

    (run / "env.json").write_text(json.dumps({"data_hash": data_hash(study_data(study))}))
    (run / "result.json").write_text("{}")
    os.utime(run / "result.json", (1e9, 1e9))
    save_table(pd.DataFrame({"AP": [0.5]}), study, "scores", "Scores.", [run])
    about_runs = lambda: [r for r in thesis.stale_figures(study)["reason"] if r.startswith("run")]
    assert about_runs() == []
    os.utime(run / "result.json", (4e9, 4e9))
    assert about_runs() == ["run detector-1 was finished after it was drawn"]
    (run / "env.json").write_text(json.dumps({"data_hash": "other"}))
    os.utime(run / "result.json", (1e9, 1e9))
    assert about_runs() == ["run detector-1 was made from other data"]
    (run / "env.json").unlink()
    assert about_runs() == ["run detector-1 is gone"]


def test_changed_code_is_found(study, monkeypatch):
    save_table(pd.DataFrame({"AP": [0.5]}), study, "scores", "Scores.")
    monkeypatch.setattr(thesis, "_code_changed", lambda commit: "code has changed")
    assert "code has changed" in thesis.stale_figures(study)["reason"].tolist()
    monkeypatch.setattr(thesis, "_code_changed", lambda commit: None)
    assert "code has changed" not in thesis.stale_figures(study)["reason"].tolist()


def test_both_languages_have_every_word():
    assert LABELS["en"].keys() == LABELS["es"].keys() and all(LABELS["es"].values())


def test_everything_is_written_once_a_language_and_the_table_has_empty_rows(study):
    run = phase1_run(study)
    for split in ("val", "test"):
        thesis.evaluate(run, thesis.study_data(study), split)
    names = thesis.write_thesis(study, run)
    for name in names:
        assert (study.figures / f"{name}.csv").is_file() and (
            (study.figures / f"{name}.pdf").is_file() or (study.figures / f"{name}.tex").is_file()
        )
    assert {n[:-3] for n in names if n.endswith("_es")} == {
        n[:-3] for n in names if n.endswith("_en")
    } and f"| {names[0]} |" in (study.figures / "index.md").read_text()
    measured = thesis.measure(run)  # measured once or anew: the same tables
    for name, (once, _) in thesis.run_tables(run, measured=measured).items():
        pd.testing.assert_frame_equal(
            once, pd.read_csv(study.figures / f"{name}.csv"), check_dtype=False
        )
    table = thesis.results_table(study, draws=20)
    assert (
        table["seeds"].tolist() == [1, 0, 0]
        and table["AP"].isna().tolist() == [False, True, True]
        and set(table["note"]) == {"", "not run"}
    )
    old = thesis.old_protocol(run, thesis.study_data(study)).set_index("variant")
    assert (
        old["AP moved"]["this protocol"] == 0
        and old["detections"]["this protocol"] > old["detections"]["only scores of 0.5 and more"]
    )


def test_results_are_compared_among_runs_that_saw_as_many_images(tmp_path, study, smoke_data):
    """Two budgets, two fusion heads and a held-out class: the best head on val with the most seeds, differences within a budget only."""
    coco = json.loads((smoke_data / "test" / "test.json").read_text())
    truth = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.5 + k / 1000,
        }
        for k, a in enumerate(coco["annotations"])
    ]

    def make(name, seen, kept, result=None, **config):
        run = study.runs / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(
            json.dumps({"data_dir": str(smoke_data), "image_size": 64, "seed": 0} | config)
        )
        (run / "result.json").write_text(json.dumps({"images_seen": seen} if seen else result))
        (run / "predictions_test.json").write_text(json.dumps(truth[:kept]))
        return run

    long, short = (
        make("detector-a", 900, 40, model="small", epochs=9, family="detector"),
        make("detector-b", 300, 30, model="small", epochs=3, family="detector"),
    )
    make("faster_rcnn-a", 300, 20, model="resnet18", epochs=3, family="faster_rcnn")
    for seed in (0, 1):
        make(
            f"fusion-good{seed}",
            None,
            35,
            {"val_AP": 0.4},
            run=str(long),
            head="concat",
            text="true",
            held_out="",
            seed=seed,
            family="fusion",
        )
        make(
            f"fusion-less{seed}",
            None,
            36,
            {"val_AP": 0.3},
            run=str(long),
            head="residual",
            text="true",
            held_out="",
            seed=seed,
            family="fusion",
        )
        make(
            f"fusion-held{seed}",
            None,
            36,
            {"val_AP": 0.9},
            run=str(long),
            head="residual",
            text="true",
            held_out="NORMAL",
            seed=seed,
            family="fusion",
        )
        make(
            f"fusion-perm{seed}",
            None,
            36,
            {"val_AP": 0.9},
            run=str(long),
            head="residual",
            text="permuted",
            held_out="",
            seed=seed,
            family="fusion",
        )
    make(
        "fusion-once",
        None,
        36,
        {"val_AP": 0.9},
        run=str(long),
        head="residual",
        text="true",
        held_out="",
        language="es",
        seed=0,
        family="fusion",
    )
    table = thesis.results_table(study, draws=20)
    assert table["images seen"].tolist() == [900, 900, 300, 300] and table["seeds"].tolist() == [
        1,
        2,
        1,
        1,
    ]
    assert [m.split(",")[0] for m in table["model"]] == [
        "DEIMv2 small",
        "DEIMv2 with text",
        "DEIMv2 small",
        "Faster R-CNN resnet18",
    ] and "concat" in table["model"][1]
    assert table["difference"].isna().tolist() == [True, False, True, False] and table[
        "difference"
    ][3] == pytest.approx(table["AP"][3] - table["AP"][2])


def test_chapters_are_written_in_both_languages(study):
    table = pd.DataFrame(
        {
            "class": ["NORMAL", "all"],
            "train images": [3, 3],
            "train objects": [3, 3],
            "test objects": [1, 1],
        }
    )
    save_table(table, study, "classes", "Classes.")
    effects = pd.DataFrame(
        {
            "head": ["residual"],
            "true text against": ["permuted"],
            "effect": [0.01],
            "low": [-0.01],
            "high": [0.02],
            "p": [0.5],
            "seeds": [6],
            "in words": ["no effect to be seen: between -1.0 and +2.0 points"],
        }
    )
    save_table(effects, study, "text_effect", "Effects.")
    names = thesis.write_chapters(study)
    assert (
        {n[:-3] for n in names if n.endswith("_es")}
        == {n[:-3] for n in names if n.endswith("_en")}
        == {"classes", "text_effect"}
    )
    assert {
        "class_distribution_es_plot",
        "text_effect_es_plot",
        "class_distribution_en_plot",
        "text_effect_en_plot",
    } <= set(names)
    spanish, english = (
        pd.read_csv(study.figures / f"text_effect_{language}.csv") for language in ("es", "en")
    )
    assert (
        list(english) == list(effects)
        and spanish["en palabras"][0] == "sin efecto apreciable: entre -1.0 y +2.0 puntos"
        and spanish["efecto"][0] == 0.01
    )
    source, copy = (
        json.loads((study.figures / f"{name}.json").read_text())
        for name in ("text_effect", "text_effect_es")
    )
    assert copy == source | {"copy_of": "text_effect"}
    (study.figures / "text_effect.json").write_text(
        json.dumps(source | {"runs": ["fusion-gone"], "dirty": False})
    )
    thesis.write_chapters(study)
    stale = thesis.stale_figures(study)
    assert {"text_effect", "text_effect_es", "text_effect_en_plot"} <= set(
        stale["name"][stale["reason"] == "run fusion-gone is gone"]
    )
    assert (
        thesis.in_spanish("localisation") == LABELS["es"]["localisation"]
    )  # one word for one thing, in figures and tables
    with pytest.raises(KeyError, match="colour, weight"):
        thesis.worded_table(table.assign(colour=1, weight=2), "es")


def test_figures_change_their_words_where_a_reader_sees_them():
    figure = thesis.worded_figure(
        thesis.plot_classes(
            pd.DataFrame(
                {"class": ["NORMAL", "all"], "train objects": [3, 3], "test objects": [1, 1]}
            ).set_index("class")
        ),
        "es",
    )
    figure.canvas.draw()
    axes = figure.axes[0]
    assert (
        axes.get_xlabel() == "objetos"
        and [t.get_text() for t in axes.get_legend().get_texts()] == ["entrenamiento", "prueba"]
        and axes.get_legend().get_title().get_text() == "partición"
    )
    assert [t.get_text() for t in axes.get_yticklabels()] == ["NORMAL"]
    effects = pd.DataFrame(
        {
            "head": ["residual"],
            "true text against": ["permuted"],
            "effect": [0.01],
            "low": [-0.01],
            "high": [0.02],
            "in words": ["text helps, by 1.0 points"],
        }
    )
    figure = thesis.worded_figure(thesis.plot_text_effects(effects), "es")
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "residual: verdadero - permutado"
    ] and figure.axes[0].get_xlabel().startswith("puntos de AP")


def test_names_that_are_looked_up_are_no_words():
    """Runs, commits and fields stay as they are, and no cell is left half in English."""
    table = pd.DataFrame(
        {
            "run": ["fusion-0b27264cd1"],
            "recipe": ["thesis, second run, at batch 32"],
            "part": ["decoder and heads"],
            "cannot be run": ["batch_size, lr"],
            "AP": [0.5],
        }
    )
    told = thesis.worded_table(table, "es")
    assert told.iloc[0].tolist() == [
        "fusion-0b27264cd1",
        "tesis, segundo entrenamiento, con lote 32",
        "decodificador y cabezas",
        "batch_size, lr",
        0.5,
    ]
    assert (
        told.columns.tolist() == ["entrenamiento", "receta", "parte", "no ejecutable", "AP"]
        and thesis.worded_table(table, "en") is table
    )
