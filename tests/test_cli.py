"""The command line: one clear line for what a user got wrong, before anything is written."""

import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deimv2_tfg import cli
from deimv2_tfg.options import field_comments
from deimv2_tfg.recipes import FusionConfig, TrainConfig
from tools import pages

ROOT = Path(__file__).resolve().parents[1]
MAIN = "import sys; from deimv2_tfg.cli import main; sys.exit(main())"


def cpu_seconds(*words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def said(capsys, *words):
    """Exit code, and what a command says on standard error."""
    try:
        code = cli.main([*words])
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["trian"], ["runs", "--typo"]])
def test_help_and_a_typo_cost_little(words):
    assert cpu_seconds(*words) < 1.5


def test_doctor(smoke_data, tmp_path, capsys):
    assert cli.main(["doctor", str(smoke_data)]) == 0
    assert "0 errors" in capsys.readouterr().out
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "train/train.json" in capsys.readouterr().out


WRONG = {
    "train DATA --model nano": "model",
    "train DATA --lr -0.1": "lr",
    "train DATA --flat 1.5": "flat",
    "train DATA --batch_size 0": "batch_size",
    "train DATA --clip -1": "clip",
    "train DATA --epochs 0": "epochs",
    "train DATA --epochs many": "epochs",
    "fuse RUN DATA --head resid": "head",
    "fuse RUN DATA --plain 15": "plain",
    "synth OUT --counts text": "counts",
    "synth OUT --profile nothing": "profile",
    "predict RUN DATA --threshold 50": "threshold",
    "predict RUN DATA --threshold nan": "threshold",
    "predict RUN DATA --every 0": "every",
    "predict RUN DATA --device gpu": "device",
    "evaluate RUN DATA --split tst": "split",
    "bench nothing": "what",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_value_is_one_line_that_names_it(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, message = said(capsys, *line.split())
    assert code == 2
    assert len(message.splitlines()) == 1
    assert WRONG[line] in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train DATA --imgsz 64", "--image_size"),
        ("train DATA --epoch 64", "--epochs"),
        ("predict RUN DATA --treshold .5", "--threshold"),
        ("tarin DATA", "train"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(line, meant, capsys):
    code, message = said(capsys, *line.split())
    assert code == 2
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    "line",
    [
        "train nowhere",
        "train DATA --model tiny --init nowhere",
        "train DATA --model tiny --image_size 50",
        "train DATA --model resnet18 --init nowhere.pth",
        "train DATA --model tiny --device gpu",
        "fuse nowhere DATA",
        "evaluate nowhere nowhere",
        "evaluate nowhere.json DATA",
        "evaluate EMPTY DATA",
        "predict nowhere nowhere",
        "predict EMPTY DATA --threshold nan",
        "predict --model nowhere nowhere",
        "predict nowhere",
        "predict DATA DATA --write yaml",
        "ship nowhere name",
        "export nowhere",
        "export EMPTY",
        "import nowhere out",
        "import EMPTY out",
        "import DATA DATA",
        "split nowhere out",
        "split DATA out --shares 1,2",
        "split DATA DATA",
        "describe nowhere",
        "convert nothing.pth out",
        "convert DATA/train/train.json out",
        "runs nowhere",
        "compare nowhere nothing",
        "report nothing-of-this-name",
        "doctor DATA --fix --out DATA/copy",
        "synth DATA",
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(line, smoke_data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").symlink_to(smoke_data)
    words = line.replace("DATA", "data").replace("EMPTY", "empty").split()
    code, message = said(capsys, *words)
    assert code == 2
    assert message.startswith("deimv2-tfg")
    assert "Traceback" not in message and len(message) < 2000
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("field: wrong"), 2),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2),
        (NotADirectoryError(20, "Not a directory", "a.json"), 2),
        (OSError(28, "No space left on device"), 1),
        (KeyError("field"), None),
        (TypeError("a fault of ours"), None),
    ],
)
def test_a_fault_of_ours_is_no_bad_input(error, expected, capsys, monkeypatch):
    def fail(**options):
        raise error

    monkeypatch.setattr(cli, "called", lambda words: (fail, {}))
    if expected is None:
        with pytest.raises(type(error)):
            cli.main(["runs"])
    else:
        assert said(capsys, "runs") == (expected, f"deimv2-tfg: {error}\n")


def test_a_gpu_that_is_not_there_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", int)
    (tmp_path / "config.json").write_text("{}")
    code, message = said(capsys, "evaluate", str(tmp_path), "x", "--device", "cuda")
    assert code == 2
    assert "device='cuda': torch finds no such device" in message


def test_dashes_underscores_and_switches_are_read_alike():
    parser = cli.command_parser(cli.COMMANDS["train"], "train")
    for words in (
        ["x", "--image-size", "64", "--no-vertical-flips", "--checkpointing"],
        ["x", "--image_size=64", "--vertical_flips", "false", "--checkpointing", "True"],
    ):
        options = parser.parse_args(cli.spelled_out(words, parser))
        assert (options.image_size, options.vertical_flips, options.checkpointing) == (
            64,
            False,
            True,
        )


def test_a_printed_recipe_gives_the_same_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "x", "--lr", "2e-3", "--epochs", "7", "--print_config"])
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(capsys.readouterr().out)
    _, options = cli.called(["train", "--config", str(recipe), "--epochs", "8"])
    assert options["config"] == TrainConfig("x", lr=2e-3, epochs=8)


@pytest.mark.parametrize("recipe", ["thesis_second_run", "thesis_phase2"])
def test_shipped_recipes_are_read(recipe):
    path = str(ROOT / f"deimv2_tfg/recipes/{recipe}.yml")
    words = ["train", "x"] if recipe == "thesis_second_run" else ["fuse", "run", "x"]
    _, options = cli.called([*words, "--config", path])
    assert isinstance(options["config"], TrainConfig | FusionConfig)


@pytest.mark.parametrize("config", [TrainConfig, FusionConfig])
def test_help_explains_the_fields(config):
    name = "train" if config is TrainConfig else "fuse"
    parser = cli.command_parser(cli.COMMANDS[name], name)
    comments = field_comments(config)
    assert len(comments) > 15
    text = " ".join(parser.format_help().split())
    assert all(comment.replace("%", "%") in text for comment in comments.values())
    assert "from 0 to 1" in text


README_COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("deimv2-tfg ") and "$" not in line
]


@pytest.mark.parametrize("words", README_COMMANDS, ids=" ".join)
def test_commands_of_the_readme_are_understood(words):
    function, options = cli.called(words)
    assert callable(function)
    assert options


def test_a_command_loads_only_its_own_chapter():
    code = (
        "import sys; from deimv2_tfg.cli import main; main(['doctor', 'nowhere']); "
        "print([m for m in sys.modules "
        "if m.startswith(('transformers', 'accelerate', 'deimv2_tfg.training'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_fault_of_ours_shows_where_it_is(monkeypatch):
    def broken(*options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("deimv2_tfg.doctor.doctor", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor", "x"])


def test_runs_are_listed_and_found_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    for number, date in enumerate(["2026-01-02T10:00:00", "2026-01-01T10:00:00"]):
        run = tmp_path / f"runs/mine/detector-{number}"
        (run / "best").mkdir(parents=True)
        config = {"model": "tiny", "epochs": 3, "image_size": 64, "data_dir": "photos"}
        config["name"] = f"attempt {number}"
        (run / "config.json").write_text(json.dumps(config))
        (run / "result.json").write_text(json.dumps({"best_val_AP": 0.25}))
        (run / "env.json").write_text(json.dumps({"time": date}))
        (run / "metrics_test.json").write_text(json.dumps({"AP": 0.5}))
    assert cli.main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["detector-1", "detector-0"]
    assert {"tiny", "0.250", "0.500", "3", "64", "photos"} <= set(lines[1].split())
    assert {"attempt", "1"} <= set(lines[1].split())
    assert cli.run_named("latest").endswith("detector-0")
    assert cli.run_named("attempt 1").endswith("detector-1")
    assert cli.run_named("detector-1").endswith("runs/mine/detector-1")
    with pytest.raises(FileNotFoundError, match="detector-0"):
        cli.run_named("detector-7")


def test_ctrl_c_saves_and_says_how_to_go_on(smoke_data, tmp_path):
    words = ["train", str(smoke_data), "--model", "tiny", "--image_size", "64", "--epochs", "300"]
    words += ["--batch_size", "4", "--eval_every", "300", "--runs_dir", str(tmp_path)]
    training = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], stderr=subprocess.PIPE, text=True
    )
    waited = 0
    while not list(tmp_path.glob("*/metrics.jsonl")) and waited < 240:
        time.sleep(0.5)
        waited += 0.5
    training.send_signal(signal.SIGINT)
    message = training.communicate(timeout=120)[1]
    assert training.returncode == 128 + signal.SIGINT
    assert "Traceback" not in message
    assert f"deimv2-tfg {shlex.join(words)}" in message
    assert list(tmp_path.glob("*/last/*"))


def test_stored_pages_come_only_from_the_same_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "project_root", lambda: tmp_path)
    executed = tmp_path / "runs/demo/pages"
    executed.mkdir(parents=True)
    (tmp_path / "nbs").mkdir()
    noise = {"output_type": "stream", "name": "stderr", "text": ["3/10"]}
    output = {"output_type": "stream", "name": "stdout", "text": ["2"]}

    def page(source, outputs):
        cell = {"cell_type": "code", "id": "one", "metadata": {}, "source": [source]}
        cell |= {"outputs": outputs, "execution_count": None}
        return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})

    (tmp_path / "nbs/a.ipynb").write_text(page("1 + 1", []))
    (executed / "a.ipynb").write_text(page("1 + 1", [noise, output]))
    pages.store_pages(executed)
    stored = json.loads((tmp_path / "nbs/a.ipynb").read_text())
    assert stored["cells"][0]["outputs"] == [output]
    fingerprint = pages.sources_fingerprint(stored)
    assert stored["metadata"]["stored_outputs"] == {"study": "demo", "sources": fingerprint}
    (executed / "a.ipynb").write_text(page("1 + 2", [output]))
    with pytest.raises(ValueError, match="a.ipynb"):
        pages.store_pages(executed)
