"""The grid over possible causes of divergence: its cells, its effects, what failed and why."""

import itertools
import math

import pandas as pd
import pytest
from page_code import page_module

from deimv2_tfg.core import append_line
from deimv2_tfg.recipes import TrainConfig

stability = page_module("04a_divergence")
GRID = {
    "precision": ["no"],
    "rate": ["scaled", "4 x"],
    "clip": ["0.1"],
    "warmup": ["none"],
    "augmentation": ["none"],
    "seed": [0],
}


@pytest.fixture
def config(smoke_data, tmp_path):
    sizes = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4}
    return TrainConfig(str(smoke_data), str(tmp_path), **sizes)


def test_a_failed_cell_keeps_its_reason_and_is_tried_again(config, tmp_path, monkeypatch):
    ordinary = stability.run_cell

    def breaks(base, levels):
        if levels["rate"] == "4 x":
            raise RuntimeError("the machine went away")
        return ordinary(base, levels)

    journal = tmp_path / "grid.journal"
    monkeypatch.setattr(stability, "run_cell", breaks)
    first = stability.run_grid(config, GRID, journal)
    assert sorted(t.state.name for t in first.trials) == ["COMPLETE", "FAIL"]
    failed = stability.grid_table(first).set_index("state").loc["fail"]
    assert failed["reason"] == "RuntimeError: the machine went away"
    assert math.isnan(failed["AP"])
    monkeypatch.undo()
    again = stability.run_grid(config, GRID, journal)
    assert sorted(t.state.name for t in again.trials) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert stability.grid_table(again)["AP"].notna().sum() == 2
    assert stability.failed_cells(again) == []
    more = stability.run_grid(config, GRID, journal)
    assert len(more.trials) == len(stability.read_grid(journal).trials) == 3
    with pytest.raises(FileNotFoundError, match="no such journal"):
        stability.read_grid(tmp_path / "other.journal")


def test_only_a_guard_that_gave_up_is_a_finding(config, monkeypatch):
    def full(config):
        raise stability.TrainingStopped("the disk is full")

    monkeypatch.setattr(stability, "train", full)
    with pytest.raises(stability.TrainingStopped, match="disk"):
        stability.run_cell(config, {})


def cell(rate, clip, seed, AP):
    """A finished cell at the recipe's level of all factors but rate and clipping."""
    levels = stability.RECIPE | {"rate": rate, "clip": clip, "seed": seed}
    found = {"diverged": False, "skipped": 0, "grad norm q50": 1.0, "grad norm max": 2.0}
    return levels | found | {"run": f"{rate} {clip} {seed}", "AP": AP}


def test_main_effects_are_paired_and_leave_out_what_gave_up():
    rows = []
    for rate, clip, seed in itertools.product(("scaled", "13 x"), ("0.1", "none"), (0, 1)):
        AP = 0.4 + 0.1 * seed - 0.2 * (rate == "13 x") + 0.05 * (clip == "none")
        rows.append(cell(rate, clip, seed, AP))
    rows[-1] |= {"diverged": True, "skipped": 3, "AP": math.nan}
    cells = pd.DataFrame(rows)
    effects = stability.main_effects(cells).set_index(["factor", "level"])
    fast = effects.loc[("rate", "13 x")]
    assert fast["pairs"] == 3
    assert fast["AP_difference"] == pytest.approx(-0.2)
    assert fast["low"] == pytest.approx(-0.2)
    assert fast["against"] == "scaled"
    assert fast["diverged"] == 0.25
    assert effects.loc[("clip", "none"), "AP_difference"] == pytest.approx(0.05)
    assert effects.loc[("rate", "scaled"), ["against", "AP_difference"]].isna().all()
    assert effects.loc[("precision", "fp32"), "cells"] == 8


def test_without_a_pair_there_is_no_difference():
    only = pd.DataFrame([cell("13 x", "0.1", 0, 0.4)])
    effects = stability.main_effects(only).set_index(["factor", "level"])
    assert effects.loc[("rate", "13 x"), "pairs"] == 0
    assert math.isnan(effects.loc[("rate", "13 x"), "AP_difference"])
    assert stability.main_effects(only.drop(columns="run")).empty


def test_an_interaction_is_seen_where_the_mean_effect_hides_it():
    rows = []
    for seed in range(3):
        rows += [cell("scaled", "0.1", seed, 0.2), cell("scaled", "none", seed, 0.3)]
        rows += [cell("4 x", "0.1", seed, 0.2), cell("4 x", "none", seed, 0.1)]
    cells = pd.DataFrame(rows)
    effect = stability.main_effects(cells).set_index(["factor", "level"]).loc[("clip", "none")]
    assert effect["AP_difference"] == pytest.approx(0)
    assert effect["recipe_AP_difference"] == pytest.approx(0.1)
    crossed = stability.crossed_effects(cells, "clip", "rate").set_index("rate")
    assert crossed["AP_difference"].to_dict() == pytest.approx({"scaled": 0.1, "4 x": -0.1})
    assert list(crossed["pairs"]) == [3, 3]


class Trial:
    """A finished cell as Optuna stores it."""

    class state:
        name = "COMPLETE"

    def __init__(self, run):
        self.params = {"rate": "4 x"}
        self.user_attrs = {"run": str(run), "stopped": ""}


def test_the_largest_norm_of_a_cell_is_that_of_all_its_epochs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "result.json").write_text('{"returns": 0, "best_val_AP": 0.5}')
    for step, norm in enumerate([30.0, 25000.0, 31.0]):
        append_line(
            tmp_path / "metrics.jsonl",
            {"split": "train", "step": step, "train/grad_norm/max": norm},
        )
    row = stability.read_cell(Trial(tmp_path))
    assert row["grad norm max"] == 25000
    assert row["AP"] == 0.5
    assert math.isnan(row["grad norm q50"])
    assert row["diverged"] is False
