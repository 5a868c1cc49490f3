"""The command line says what is wrong and ends with an exit code; stored outputs never come from other sources."""

import json
import subprocess
import sys

import pytest

from deimv2_tfg import cli


def test_doctor(smoke_data, tmp_path, capsys):
    assert cli.main(["doctor", str(smoke_data)]) == 0 and "0 errors" in capsys.readouterr().out
    assert (
        cli.main(["doctor", str(tmp_path)]) == 1 and "train/train.json" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "command",
    [
        ["train", "nowhere"],
        ["evaluate", "nowhere", "nowhere"],
        ["convert", "nothing.pth", "out"],
        ["bench", "nothing"],
        ["synth", "x", "--profile", "nothing"],
    ],
)
def test_a_fault_of_the_user_is_a_message_and_no_traceback(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 1
    assert capsys.readouterr().err.startswith("deimv2-tfg: ")


def test_options_are_the_function_s_own(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("epochs", "lr", "batch_size", "ema", "seed"))


def test_pages_takes_outputs_only_from_the_same_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    cell = {
        "cell_type": "code",
        "id": "one",
        "metadata": {},
        "source": ["1 + 1"],
        "outputs": [],
        "execution_count": None,
    }
    output = {
        "output_type": "execute_result",
        "data": {"text/plain": ["2"]},
        "metadata": {},
        "execution_count": 4,
    }
    noise = {"output_type": "stream", "name": "stderr", "text": ["3/10"]}
    book = lambda **changed: json.dumps(
        {"cells": [cell | changed], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    )
    for folder in ("nbs", "runs/demo/pages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "nbs/a.ipynb").write_text(book())
    (tmp_path / "runs/demo/pages/a.ipynb").write_text(book(outputs=[noise, output]))
    cli.pages(str(tmp_path / "runs/demo/pages"))
    stored = json.loads((tmp_path / "nbs/a.ipynb").read_text())
    assert [o["data"] for o in stored["cells"][0]["outputs"]] == [{"text/plain": ["2"]}]
    assert stored["metadata"]["stored_outputs"] == {
        "study": "demo",
        "sources": cli.sources_fingerprint(stored),
    }
    (tmp_path / "runs/demo/pages/a.ipynb").write_text(book(source=["1 + 2"], outputs=[output]))
    with pytest.raises(ValueError, match="a.ipynb"):
        cli.pages(str(tmp_path / "runs/demo/pages"))


def test_a_command_loads_only_its_own_chapter():
    code = "import sys; from deimv2_tfg.cli import main; main(['doctor', 'nowhere']); print([m for m in sys.modules if m.startswith(('transformers', 'accelerate', 'deimv2_tfg.training'))])"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1] == "[]"


def test_a_fault_of_ours_shows_where_it_is(monkeypatch):
    def broken(data_dir):
        raise RuntimeError("a bug")

    monkeypatch.setattr("deimv2_tfg.doctor.doctor", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor", "x"])


def test_readme_names_commands_and_options_that_exist(root):
    import re

    from deimv2_tfg import weights

    readme = (root / "README.md").read_text()
    lines = re.findall(r"deimv2-tfg ([a-z-]+)([^\n`]*)", readme)
    assert len(lines) > 10
    for command, rest in lines:
        assert command in cli.COMMANDS, command
        commands = next(a for a in cli.command_parser([command])._actions if a.dest == "command")
        known = {s for a in commands.choices[command]._actions for s in a.option_strings}
        assert {o for o in re.findall(r"(?<=\s)(--\w+)", rest.split("#")[0])} <= known, (
            command,
            rest,
        )
    digests = set(re.findall(r"`([0-9a-f]{64})`", readme))
    assert digests and all(
        weights.PUBLISHED[d].startswith(re.search(rf"`(\S+)` \|[^\n]*{d}", readme)[1])
        for d in digests
    )
