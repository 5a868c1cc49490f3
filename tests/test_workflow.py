"""A study as a workflow: what runs, what does not run again, and how it reaches a cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))


def snakemake(home, *words, study="smoke", snakefile=ROOT / "Snakefile", path="", **options):
    """Start snakemake with its files under `home`."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    command += ["--directory", str(home), "--configfile", str(ROOT / f"studies/{study}.yaml")]
    folders = [path, str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"DEIMV2_TFG_HOME": str(home), "PATH": os.pathsep.join(folders)}
    env.pop("DEIMV2_TFG_PHASE1", None)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *words], env=env, **output, **options)


def said(home, *words, **options):
    """What snakemake says, once it has ended well."""
    process = snakemake(home, *words, **options)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text
    return text


PAGE = "runs/smoke/pages/00a_photographs.ipynb"  # a short one, which imports core


def copied(folder):
    """A copy of the workflow whose core imports one module more, and a home with photographs."""
    clone = folder / "clone"
    for name in ("nbs", "deimv2_tfg", "studies"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in (("core", "from .deeper import THING\n"), ("deeper", "THING = 1\n")):
        with (clone / f"deimv2_tfg/{name}.py").open("a") as module:
            module.write(line)
    data = folder / "home/runs/smoke/data.txt"
    data.parent.mkdir(parents=True)
    data.touch()
    return Path(shutil.copy(ROOT / "Snakefile", clone)), folder / "home"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The copy, its home, and whether a page that was killed is there and is made afterwards."""
    copy, home = copied(tmp_path_factory.mktemp("killed"))
    words = ["--cores", "1", "--rerun-incomplete", "--nolock", PAGE]
    process = snakemake(home, *words, snakefile=copy, start_new_session=True)
    waited = 0
    while not (home / "runs/smoke/failed").exists() and waited < 120:
        time.sleep(0.2)
        waited += 0.2
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half = (home / PAGE).exists()
    said(home, *words, snakefile=copy)
    return copy, home, half


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_asks_costs_and_expects(study):
    head = [line for line in study.read_text().splitlines() if line.startswith("#")]
    for word in ("# Question:", "# Commands:", "# Time:", "# Expected:"):
        assert any(line.startswith(word) for line in head), word
    assert yaml.safe_load(study.read_text())["profile"]


def test_the_plan_of_a_study_has_its_trainings(tmp_path):
    plan = said(tmp_path, "--cores", "2", "--dry-run", study="gpu")
    assert "training seed5" in plan
    assert "--image_size 1024" in plan


def test_the_plan_has_every_chapter_and_the_training_that_they_look_for(tmp_path, monkeypatch):
    from deimv2_tfg import cli
    from deimv2_tfg.core import open_study
    from deimv2_tfg.synthetic import study_data
    from deimv2_tfg.training import phase1_config

    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    plan = said(tmp_path, "--cores", "1", "--dry-run", "--printshellcmds")
    for chapter in CHAPTERS:
        assert f"chapter {chapter}" in plan
    assert "training phase1" in plan
    line = next(line for line in plan.splitlines() if "deimv2-tfg train" in line)
    words = line.split("deimv2-tfg ")[1].split(" | ")[0].replace("'", "").split()
    _, options = cli.called(words)
    study = open_study("smoke")
    assert options["config"] == phase1_config(study)
    assert options["config"].data_dir == str(study_data(study))


def test_a_run_that_was_trained_elsewhere_takes_the_place_of_phase_1(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_PHASE1", "run")
    words = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    words += ["--configfile", str(ROOT / "studies/smoke.yaml"), "--cores", "1", "--dry-run"]
    words.append("runs/smoke/pages/04_training_stability.ipynb")
    env = os.environ | {"DEIMV2_TFG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "snakemake", *words]
    text = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    assert "chapter" in text
    assert "training phase1" not in text


def test_killed_at_any_moment_the_same_command_finishes(killed):
    _, home, half = killed
    assert not half
    assert (home / PAGE).exists()


def test_only_what_changed_is_made_again(killed):
    copy, home, _ = killed
    words = ["--cores", "1", "--dry-run", PAGE]
    notebook = copy.parent / "nbs/00a_photographs.ipynb"
    content = json.loads(notebook.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            cell["execution_count"] = 7
    notebook.write_text(json.dumps(content))
    unrelated = copy.parent / "deimv2_tfg/multimodal.py"
    unrelated.write_text(unrelated.read_text() + "\nNEW = 1\n")
    assert "Nothing to be done" in said(home, *words, snakefile=copy)

    (copy.parent / "deimv2_tfg/deeper.py").write_text("THING = 2\n")
    assert "chapter 00a_photographs" in said(home, *words, snakefile=copy)


PROGRAM = """
import os, sys
print(os.getcwd(), os.environ["WORD"], *sys.argv[1:], "json" in sys.modules)
raise SystemExit(3)
"""


@pytest.mark.parametrize("warm", [True, False])
def test_a_page_s_program_is_the_same_as_a_fork(tmp_path, warm):
    """Place, environment, output and exit status are the caller's; without a server, too."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sockets").mkdir()
    script, address = str(ROOT / "studies/warm.py"), tmp_path / "sockets/warm"
    if len(str(address)) > 100:
        pytest.skip("a socket's path is short")
    server = subprocess.Popen([sys.executable, script, "serve", str(address), "json"])
    while not address.exists():
        time.sleep(0.05)
    env = os.environ | {"WORD": "said", "WARM": str(address) if warm else ""}
    options = {"env": env, "cwd": tmp_path, "text": True, "stdout": subprocess.PIPE}
    caller = subprocess.Popen([sys.executable, "-S", script, "program", "7"], **options)
    said_by_it = caller.communicate(timeout=60)[0]
    server.kill()
    assert said_by_it == f"{tmp_path} said 7 {warm}\n"
    assert caller.returncode == 3


SLURM = {
    "sbatch": 'printf "%q " "$@" > "$(dirname "$0")/script"; echo 4711',
    "sacct": 'echo "4711|COMPLETED"',
    **dict.fromkeys(("sacctmgr", "scancel", "scontrol", "sinfo", "squeue", "sshare"), "true"),
}


def test_a_training_becomes_a_job_of_slurm_with_its_gpu_memory_and_time(tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, body in SLURM.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    data = tmp_path / "runs/smoke/data.txt"
    data.parent.mkdir(parents=True)
    data.touch()
    words = ["--config", "gpu=1", "--profile", str(ROOT / "profiles/slurm"), "--latency-wait", "1"]
    words += ["--default-resources", "slurm_account=a", "slurm_partition=p"]
    words += ["--slurm-init-seconds-before-status-checks", "1"]
    process = snakemake(tmp_path, *words, "runs/smoke/trainings/phase1.txt", path=str(fakes))
    process.communicate(timeout=120)
    script = (fakes / "script").read_text()
    for option in ("--gpus=1", "--mem 4000", "-t 60", "--cpus-per-task=2", "--wrap="):
        assert option in script
    assert "training:name=phase1" in script
