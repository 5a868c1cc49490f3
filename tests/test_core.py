"""Paths, hashes, runs and provenance."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from deimv2_tfg.core import atomic_write, open_study, save_figure, save_table, to_jsonable
from deimv2_tfg.runs import code_hash, data_hash, reachable_code, source_hash


def test_profiles_and_names(monkeypatch):
    assert open_study().profile.name == "smoke"
    monkeypatch.delenv("IN_TEST")
    assert open_study().profile.name == "demo" and open_study(data_dir="x/set").name.startswith(
        "set_"
    )
    with pytest.raises(ValueError, match="smoke, demo, compact, thesis"):
        open_study("tiny")


def test_a_figure_and_a_table_are_saved_with_their_provenance(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    study, frame = (
        open_study("smoke"),
        pd.DataFrame({"class": ["a", "b"], "AP": [0.5, float("nan")]}),
    )
    fig, ax = plt.subplots()
    save_figure(fig, study, "bars", frame, "Two bars.", runs=["runs/x/detector-1"])
    save_table(frame, study, "aps", "A table.")
    assert {p.name for p in study.figures.iterdir()} == {
        "bars.pdf",
        "bars.png",
        "bars.csv",
        "bars.json",
        "aps.csv",
        "aps.tex",
        "aps.json",
    }
    about = json.loads((study.figures / "bars.json").read_text())
    assert (
        about["runs"] == ["detector-1"]
        and about["caption"] == "Two bars."
        and {"commit", "dirty", "versions", "seed"} <= about.keys()
    )
    tex = (study.figures / "aps.tex").read_text()
    assert "\\toprule" in tex and "--" in tex and "nan" not in tex.lower()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        atomic_write(path, None)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_data_hash_sees_every_byte(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    (tmp_path / "train/images/a.jpg").write_bytes(b"one")
    first = data_hash(tmp_path)
    (tmp_path / "train/images/a.jpg").write_bytes(b"two")
    second = data_hash(tmp_path)
    (tmp_path / "train/images/a.jpg").rename(tmp_path / "train/images/b.jpg")
    assert len({first, second, data_hash(tmp_path)}) == 3


def test_code_hash_follows_what_is_called():
    assert (
        source_hash("def f():\n  'doc'\n  return 1")
        == source_hash("def f(): return 1")
        != source_hash("def f(): return 2")
    )
    reached = reachable_code("training", "train", leave_out=("core",))
    assert {
        "training.train_epoch",
        "criterion.Criterion",
        "detector.build_detector",
        "transforms.TrainTransform",
    } <= reached.keys()
    assert (
        not any(k.startswith("core.") for k in reached)
        and "detector.convert_weights" not in reached
    )
    assert code_hash("training", "train") != code_hash("evaluation", "evaluate")


def test_nothing_is_not_zero():
    assert to_jsonable({"AP": float("nan"), "n": 0}) == {"AP": None, "n": 0}
