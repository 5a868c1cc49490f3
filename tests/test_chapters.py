"""Every chapter runs headless in the smoke profile, alone, from a folder that is not the repository's, and leaves its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))


def papermill(page, where, home, *parameters):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        "--log-level",
        "ERROR",
        "-k",
        "python3",
        str(page),
        "executed.ipynb",
        *parameters,
    ]
    env = os.environ | {
        "DEIMV2_TFG_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("IN_TEST", None)
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_chapter(page, home, tmp_path):
    done = papermill(
        page,
        tmp_path,
        home,
        "-p",
        "profile",
        "smoke",
        "-p",
        "study",
        f"alone/{page.stem}" if page.stem.startswith("05") else "together",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    executed = json.loads((tmp_path / "executed.ipynb").read_text())
    assert all(c.get("execution_count") for c in executed["cells"] if c["cell_type"] == "code")
    if page.stem != "index":
        assert any((home / "thesis_figures").rglob("*.csv"))


def test_a_bad_data_dir_stops_with_every_problem(home, tmp_path):
    done = papermill(
        ROOT / "nbs" / "04_training_stability.ipynb",
        tmp_path,
        home,
        "-p",
        "profile",
        "smoke",
        "-p",
        "data_dir",
        str(tmp_path),
    )
    assert done.returncode != 0 and all(
        part in done.stderr
        for part in ("train/train.json", "val/val.json", "test/test.json", "Expected layout")
    )
