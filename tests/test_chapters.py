"""Every chapter runs headless in the smoke profile, from a folder that is not the repository's.

All of them by the workflow, as `make thesis` runs them; one alone, which has to make what it needs,
and one with bad data, in this process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from page_code import run_page

from deimv2_tfg.data import DatasetError
from deimv2_tfg.figures import read_provenance
from deimv2_tfg.memoria import picture

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))


def called(home, where, *words):
    """A command of this environment in the folder `where`, with its files under `home`."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"DEIMV2_TFG_HOME": str(home), "PATH": os.pathsep.join(folders)}
    env.pop("IN_TEST", None)
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def study(home):
    """The smoke study, made by the workflow."""
    options = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(home), "--keep-going"]
    options += ["--configfile", str(ROOT / "studies/smoke.yaml"), "--cores", "2"]
    done = called(home, home, "snakemake", *options)
    return home / "runs/smoke", done.stdout + done.stderr


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(chapter, study):
    runs, said = study
    page = runs / f"pages/{chapter}.ipynb"
    assert page.exists(), said[-6000:]
    cells = json.loads(page.read_text())["cells"]
    assert all(cell.get("execution_count") for cell in cells if cell["cell_type"] == "code")


def test_the_study_leaves_figures_tables_and_its_training(home, study):
    runs, _ = study
    assert len(list((home / "thesis_figures/smoke").rglob("*.csv"))) > 20
    run = Path((runs / "trainings/phase1.txt").read_text().strip())
    assert (run / "result.json").exists()


def test_examples_of_a_page_are_no_runs_of_the_study(study):
    """A residual head of two epochs is shown in chapter 5; the smoke grid has no such head."""
    runs, _ = study
    configs = [json.loads(p.read_text()) for p in runs.glob("fusion-*/config.json")]
    assert {config["head"] for config in configs} == {"contrastive", "linear"}
    assert list((runs / "examples").glob("fusion-*/result.json"))


def test_pictures_with_words_have_them_in_spanish(home, study, tmp_path):
    """Stored in Spanish or drawn from their data: all that the text of the thesis names."""
    folder = home / "thesis_figures/smoke"
    sections = [path.read_text() for path in (ROOT / "memoria/es").glob("*.typ")]
    named = re.findall(r'#figura\("([^"]+)"', "\n".join(sections))
    records = {r["name"]: r for r in read_provenance(folder) if r["kind"] == "figure"}
    there = [name for name in named if name in records]
    assert len(there) > 15
    for name in there:
        _, translated = picture(records[name], folder, tmp_path, "es")
        assert translated, name


def test_the_example_of_the_readme_runs_as_it_stands(study, home, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    photograph = next((home / "runs/data").rglob("test_00001.jpg"))
    shutil.copy(photograph, tmp_path / "part.jpg")
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names["found"].boxes)
    assert all(line.split()[0] in names["detector"].names for line in lines)


def test_a_chapter_alone_makes_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run_page("05_multimodal", profile="smoke", study="alone")
    plt.close("all")
    assert list((tmp_path / "home/runs/alone").glob("detector-*/result.json"))
    assert list((tmp_path / "home/thesis_figures/alone/05_multimodal").glob("*.csv"))
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_a_bad_data_dir_stops_with_every_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path / "home"))
    (tmp_path / "photographs").mkdir()
    with pytest.raises(DatasetError) as stopped:
        run_page("01_data", profile="smoke", data_dir=str(tmp_path / "photographs"))
    plt.close("all")
    for part in ("train/train.json", "val/val.json", "test/test.json", "Expected layout"):
        assert part in str(stopped.value)
