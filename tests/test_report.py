"""The report of a run or a study is one file that says what the functions of the thesis say."""

import base64
import io
import json
import re

import pandas as pd
import pytest
from PIL import Image

from deimv2_tfg import report
from deimv2_tfg.cli import main
from deimv2_tfg.results import per_class_table
from deimv2_tfg.runs import Run

LINK = re.compile(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>\s]+)')


@pytest.fixture
def run(tmp_path, smoke_data):
    """A finished run by hand that finds two thirds of the objects, with a failed step."""
    run = Run(tmp_path / "runs" / "tiny" / "detector-1")
    run.path.mkdir(parents=True)
    config = {"data_dir": str(smoke_data), "image_size": 64, "epochs": 2, "note": "<b>bold</b>"}
    run.write("config.json", config | {"family": "detector"})
    run.write("result.json", {"best_val_AP": 0.5, "seconds": 90})
    rows = [
        {"split": "train", "epoch": e, "train/loss_mal": 3.0 / e, "train/lr": 1} for e in (1, 2)
    ]
    rows.append({"split": "val", "epoch": 2, "val/AP": 0.5, "val/AP50": 0.75})
    for name, lines in (("metrics", rows), ("incidents", [{"step": 3, "failure": "non-finite"}])):
        text = "\n".join(json.dumps(line) for line in lines)
        (run.path / f"{name}.jsonl").write_text(text + "\n")
    for split in ("val", "test"):
        truth = json.loads((smoke_data / split / f"{split}.json").read_text())["annotations"]
        kept = [a for k, a in enumerate(truth) if k % 3]
        found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} for a in kept]
        found = [box | {"score": 0.5 + k / 1000} for k, box in enumerate(found)]
        run.save_predictions(split, found, {"AP": 0.6, "AP50": 0.7})
    return run


def test_a_run_is_one_file_with_the_numbers_of_the_thesis(run):
    html = report.report_run(run).read_text()
    links = LINK.findall(html)
    pictures = [link for link in links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == 4  # intervals, curves, confusions, worst photographs
    assert all(link.startswith("#s") for link in links if link not in pictures)
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).verify()
    mean = per_class_table(run).set_index("class").loc["mean"]
    interval = f"{mean['AP']:.3f} [{mean['AP low']:.3f}; {mean['AP high']:.3f}]"
    assert interval in html and "non-finite" in html
    assert "<b>bold" not in html and "&lt;b&gt;bold" in html and "<script" not in html


def test_spanish_has_no_english_title(run):
    html = report.report_run(run, language="es").read_text()
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert len(titles) == len(report.RUN_SECTIONS)
    assert not set(titles) & set(report.RUN_SECTIONS)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert not [c for c in captions if re.search(r"\b(the|of|and|by)\b", c)]
    assert "0,600" in html and "0.600" not in html.partition("<nav>")[0]


def test_what_is_missing_is_a_note_with_the_way_out(run):
    (run.path / "predictions_test.json").unlink()
    sections = {s["title"]: s["items"] for s in report.run_sections(run)}
    assert "evaluate(run, data_dir, 'test')" in sections["Average precision"][0]["note"]
    assert "picture" in sections["Training"][0]
    (run.path / "predictions_val.json").unlink()
    assert report.report_run(run).is_file()


@pytest.fixture
def study(tmp_path):
    """A study on file with one table of more rows than are shown, and a figure that is lost."""
    folder = tmp_path / "thesis_figures" / "tiny"
    (folder / "07c_thesis").mkdir(parents=True)
    rows = {"model": [f"network {k}" for k in range(50)], "AP": [k / 100 for k in range(50)]}
    pd.DataFrame(rows).to_csv(folder / "07c_thesis/results.csv", index=False)
    about = {"caption": "All runs.", "runs": {"detector-1": None}, "commit": "0123456789"}
    records = [
        about | {"name": "07c_thesis/results", "kind": "table"},
        about | {"name": "07a_errors/lost", "kind": "figure"},
    ]
    lines = "\n".join(json.dumps(r) for r in records)
    (folder / "provenance.jsonl").write_text(lines + "\n")
    return folder


def test_a_study_on_file(study, tmp_path):
    html = report.report_study(study, tmp_path / "out.html").read_text()
    assert "6.3 Comparison of all networks" in html and "6.2" not in html
    assert "run detector-1; commit 0123456" in html
    assert "the first 40 of 50 rows" in html and "network 40" not in html


def test_a_study_of_runs_alone_is_compared(run):
    sections = report.study_sections(run.path.parent)
    (table,) = sections[0]["items"]
    assert table["head"][0] == "model" and len(table["rows"]) == 1


def test_the_command_takes_a_run_or_a_study(run, study, capsys):
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "report.html")
    out = study.parent / "study.html"
    assert main(["report", str(study), "--out", str(out), "--language", "es"]) == 0
    assert "<title>tiny</title>" in out.read_text()
    assert main(["report", "nothing-of-this-name"]) == 2
    assert "no such run" in capsys.readouterr().err
