"""Words in two languages, readable boxes, tables that fit, and figures that know what they show."""

import ast
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deimv2_tfg import figures, freshness
from deimv2_tfg.core import open_study, project_root
from deimv2_tfg.runs import data_hash

ROOT = Path(__file__).resolve().parents[1]
STORED = sorted((ROOT / "thesis_figures").glob("*/provenance.jsonl"))


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    return open_study("smoke", study="trial", chapter="07_results")


def test_words():
    assert figures.gettext("learning rate") == "learning rate"
    assert figures.gettext("learning rate", "es") == "tasa de aprendizaje"
    assert figures.gettext("no such words", "es") == "no such words"
    with pytest.raises(ValueError, match="en, es"):
        figures.gettext("learning rate", "de")


def test_the_six_classes_have_accents_and_others_their_own_names():
    assert figures.class_title("RAYONES_ARANAZOS", "es") == "rayones y arañazos"
    assert figures.class_title("RAYONES_ARANAZOS") == "scratches"
    assert figures.class_title("oil_stain", "es") == "oil stain"
    assert len({figures.class_title(c, "es") for c in figures.CLASS_TITLES}) == 6
    assert figures.short_titles(["deep_dent", "deep_hole", "rust"])[:1] == ["deep dent"]


@pytest.mark.parametrize(
    "value, digits, language, signed, text",
    [
        (0.4951, 3, "en", False, "0.495"),
        (0.4951, 3, "es", False, "0,495"),
        (92928, 0, "en", False, "92,928"),
        (92928, 0, "es", False, "92.928"),
        (-0.234, 1, "es", True, "-0,2"),
        (0.234, 1, "en", True, "+0.2"),
        (None, 3, "en", False, "–"),
        (float("nan"), 3, "es", True, "–"),
    ],
)
def test_numbers(value, digits, language, signed, text):
    assert figures.format_number(value, digits, language, signed) == text


def test_a_caption_keeps_its_numbers():
    caption = "Precision and recall of each class on test at IoU .50; dots: score .5."
    told = figures.caption_in(caption, "es")
    assert told.startswith("Precisión") and "0,50" in told and "0,5." in told
    assert figures.caption_in(caption) == caption


@pytest.mark.parametrize("path", STORED, ids=[p.parent.name for p in STORED])
def test_every_caption_on_file_has_its_spanish(path):
    records = figures.read_provenance(path.parent)
    english = [r["name"] for r in records if figures.caption_in(r["caption"], "es") == r["caption"]]
    assert not english


def test_ticks_have_the_decimal_sign_of_the_language():
    fig, ax = plt.subplots()
    ax.plot([0.1, 0.9])
    figures.finish(fig, "es")
    fig.canvas.draw()
    texts = [t.get_text() for t in ax.get_yticklabels()]
    assert any("," in t for t in texts) and not any("." in t for t in texts)


def test_labels_stay_inside_and_do_not_hide_one_another():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 80, (2, 2))
        boxes = np.hstack([corners, corners + rng.uniform(2, 40, (2, 2))]).clip(0, 100)
        places = figures.place_labels(boxes, [(30, 8)] * 2, (100, 100))
        assert all((0 <= place).all() and (place <= 100).all() for place in places)
        assert figures._overlap(places[0], places[1:]) == 0


def test_boxes_are_drawn_on_a_copy_in_their_class_colour():
    photograph = Image.new("RGB", (200, 100), "black")
    drawn = figures.draw_boxes(photograph, [[100, 40, 180, 90]], [2], list("abc"), [0.5])
    assert drawn.size == (200, 100) and photograph.getextrema() == ((0, 0),) * 3
    color = tuple(round(255 * part) for part in figures.class_style(2)["color"])
    assert drawn.getpixel((140, 90)) == color
    assert figures.draw_boxes(photograph, [], [], [], side=400).size == (400, 200)


def test_a_printed_table_fits_a_page():
    wide = pd.DataFrame({f"column {k}": [k, 2.5 * k] for k in range(12)})
    wide["run"] = "detector-0123456789"
    assert len(figures.for_print(wide).columns) == 8
    assert "run" not in figures.for_print(wide)
    assert list(figures.for_print(wide, columns=["column 3", "run"])) == ["column 3", "run"]


def test_units_of_a_printed_table():
    table = pd.DataFrame(
        {
            "class": ["CONTAMINACION", "own_class"],
            "objects": [40.0, np.nan],
            "AP": [0.271, 1.0],
            "AP low": [0.2, 0.9],
            "AP high": [0.3, 1.0],
            "difference": [-0.0021, np.nan],
            "difference low": [-0.0075, np.nan],
            "difference high": [0.0034, np.nan],
            "p images": [0.0001, 0.25],
        }
    )
    printed = figures.for_print(table, "es")
    assert printed["clase"].tolist() == ["contaminación", "own class"]
    assert printed["objetos"].tolist() == ["40", "–"]
    assert printed["AP"].tolist() == ["0,271 [0,200; 0,300]", "1,000 [0,900; 1,000]"]
    assert printed["diferencia (puntos)"].tolist() == ["-0,21 [-0,75; +0,34]", "–"]
    assert printed["p (imágenes)"].tolist() == ["<0,001", "0,250"]


def test_latex_is_centred_and_escaped():
    latex = figures.to_latex(pd.DataFrame({"a_b": ["50 %"]}), "100 % of a_b.", "tab:x")
    assert r"\centering" in latex and r"a\_b" in latex and r"100 \% of a\_b." in latex
    long = pd.DataFrame({"row": [str(k) for k in range(60)]})
    assert "longtable" in figures.to_latex(long, "Long.")


def test_a_figure_and_a_table_are_saved_by_chapter_with_one_record_each(page):
    frame = pd.DataFrame({"class": ["a", "b"], "AP": [0.5, float("nan")]})
    run = page.runs / "detector-1"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": "tiny", "seed": 3}))
    (run / "result.json").write_text(json.dumps({"images_seen": 48, "seconds": 90}))
    figures.save_figure(plt.figure(), page, "bars", frame, "Two bars.", [run])
    figures.save_table(frame, page, "aps", "A table.")
    figures.save_table(frame, page, "aps", "A table, again.")
    files = {p.name for p in (page.figures / "07_results").iterdir()}
    assert files == {"bars.pdf", "bars.png", "bars.csv", "aps.csv", "aps.tex"}
    aps, bars = figures.read_provenance(page.figures)
    assert aps["name"] == "07_results/aps" and aps["caption"] == "A table, again."
    assert bars["runs"] == {"detector-1": figures.run_digest(run)}
    row = pd.read_csv(page.figures / "runs.csv").iloc[0]
    assert row["seed"] == 3 and row["images seen"] == 48 and row["minutes"] == 1.5
    index = freshness.write_index(page.figures).read_text()
    assert "## 6.1 Metrics" in index and "**bars** Two bars. [png](07_results/bars.png)" in index


def test_saving_the_same_again_changes_no_record(page):
    frame = pd.DataFrame({"AP": [0.5]})
    figures.save_table(frame, page, "aps", "A table.")
    before = (page.figures / "provenance.jsonl").read_bytes()
    figures.save_table(frame, page, "aps", "A table.")
    assert (page.figures / "provenance.jsonl").read_bytes() == before


def state_of(page, data_dir=None):
    return freshness.check_figures(page.figures, data_dir).iloc[0].tolist()[1:]


def test_a_run_that_changed_is_stale_and_one_that_is_not_here_is_not(page):
    run = page.runs / "detector-1"
    run.mkdir(parents=True)
    (run / "result.json").write_text("{}")
    by = [figures.draw_boxes]
    figures.save_table(pd.DataFrame({"AP": [0.5]}), page, "aps", "A table.", [run], by=by)
    assert state_of(page) == ["fresh", ""]
    (run / "result.json").write_text('{"AP": 1}')
    assert state_of(page) == ["stale", "run detector-1 has changed"]
    (run / "result.json").unlink()
    assert state_of(page) == ["cannot be checked here", "run detector-1 is not here"]


def test_changed_code_is_stale(page, monkeypatch):
    figures.save_table(pd.DataFrame({"AP": [0.5]}), page, "aps", "A.", by=[figures.draw_boxes])
    record = figures.read_provenance(page.figures)[0]
    assert list(record["code"]) == ["figures.draw_boxes"] and state_of(page)[0] == "fresh"
    record["code"]["figures.draw_boxes"] = "0" * 12
    (page.figures / "provenance.jsonl").write_text(json.dumps(record))
    assert state_of(page) == ["stale", "figures.draw_boxes has changed"]


def test_changed_data_are_stale(page, smoke_data):
    record = {"name": "01_data/a", "code": {"cell": "gone"}, "runs": {}, "data": "0" * 12}
    page.figures.mkdir(parents=True)
    (page.figures / "provenance.jsonl").write_text(json.dumps(record))
    changes = freshness._changes(record, page.runs, data_hash(smoke_data))
    assert ("stale", "the data have changed") in changes
    assert state_of(page)[0] == "stale"  # no cell of the page has that hash


def test_the_check_passes_on_what_is_stored(monkeypatch):
    monkeypatch.delenv("DEIMV2_TFG_HOME", raising=False)
    assert project_root() == ROOT and freshness.report_figures() == 0


def test_what_is_stored_is_small_and_listed():
    files = [p for p in (ROOT / "thesis_figures").rglob("*") if p.is_file()]
    tracked = [p for p in files if p.parts[len(ROOT.parts) + 1] not in ("smoke", "demo")]
    assert len(tracked) <= 300 and sum(p.stat().st_size for p in tracked) < 10_000_000
    for path in [p for p in STORED if p.parent.name != "smoke"]:  # it holds the package's too
        index = path.with_name("index.md").read_text()
        assert len(index) < 20_000
        for record in figures.read_provenance(path.parent):
            assert f"]({record['name']}." in index, record["name"]


def literal_words(path):
    """Texts that a module of the package hands to `gettext` as they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "gettext"
        if called and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def test_every_word_of_a_plot_is_in_the_catalogue():
    known = figures.catalogue("es")
    paths = sorted((ROOT / "deimv2_tfg").glob("*.py"))
    missing = {f"{p.stem}: {word}" for p in paths for word in literal_words(p) if word not in known}
    assert not missing


def test_a_box_in_a_table_prints_as_numbers():
    table = pd.DataFrame({"class": ["NORMAL"], "box": [[1.0, 2.0, 30.0, 40.0]]})
    assert figures.for_print(table).iloc[0, 1] == "1, 2, 30, 40"
