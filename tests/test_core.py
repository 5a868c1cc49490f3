"""Profiles, places, and files that are written whole or not at all."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from deimv2_tfg.core import (
    append_line,
    atomic_write,
    check_parameters,
    keep_lines,
    open_study,
    read_json,
    read_lines,
    to_jsonable,
)


def test_profiles_and_names(monkeypatch):
    assert open_study().profile.name == "smoke"
    monkeypatch.delenv("IN_TEST")
    assert open_study().profile.name == "demo"
    assert open_study(data_dir="x/set").name.startswith("set_")
    with pytest.raises(ValueError, match="smoke, demo, compact, thesis"):
        open_study("tiny")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        atomic_write(path, None)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nothing_is_not_zero():
    assert to_jsonable({"AP": float("nan"), "n": 0}) == {"AP": None, "n": 0}


def test_arrays_and_tensors_become_plain_numbers():
    values = {"array": np.arange(2), "number": np.float32(0.5), "tensor": torch.ones(1, 2)}
    assert to_jsonable(values) == {"array": [0, 1], "number": 0.5, "tensor": [[1.0, 1.0]]}


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"ä": 1}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "record.jsonl"
    assert read_lines(path) == []
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    keep_lines(path, lambda i, line: line["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_light_rooms_load_nothing_heavy():
    "A command line with a typing error must answer at once."
    heavy = "{'torch', 'pandas', 'matplotlib'} & {*sys.modules}"
    code = f"import sys, deimv2_tfg.core, deimv2_tfg.runs, deimv2_tfg.recipes; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.finding("training.md:26")
def test_a_parameter_that_a_page_does_not_have_is_refused():
    page = "profile = None  # a size\nseed = 0"
    check_parameters([page, "# Parameters\nseed = 7\n", "epochs = 3"])
    with pytest.raises(ValueError, match="no parameter of this page: Seed, epochs; it has profile"):
        check_parameters(["", page, "# Parameters\nepochs = 3\nSeed = 7\nprofile = 'smoke'"])


@pytest.mark.finding("training.md:26")
def test_a_page_looks_at_what_it_was_given(monkeypatch):
    main = types.SimpleNamespace(In=["seed = 0", "# Parameters\ndataset = 'x'"])
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match="no parameter of this page: dataset; it has seed"):
        open_study()
