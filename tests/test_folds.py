"""Cross-validation: folds found, predictions pooled, networks compared photograph by photograph."""

import json

import pytest
from page_code import page_module

from deimv2_tfg import folds as page
from deimv2_tfg.cli import main
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import DatasetError
from deimv2_tfg.evaluation import jittered_results
from deimv2_tfg.metrics import judged
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Run
from deimv2_tfg.splits import write_folds

PAGE = page_module("07f_folds")


@pytest.fixture(scope="module")
def folds(smoke_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cv") / "folds"
    write_folds(smoke_data, folder, 3)
    return folder


def store_run(folder, fold, model, jitter, seed=0):
    """A finished run whose predictions on test are the true boxes, moved."""
    coco = read_json(fold / "test/test.json")
    run = Run(folder / f"detector-{model}-{fold.name}-{seed}")
    classes = [c["name"] for c in coco["categories"]]
    config = {"model": model, "seed": seed, "data_dir": str(fold), "classes": classes}
    run.write("config.json", config | {"family": "detector", "image_size": 64})
    run.write("result.json", {"best_val_AP": 0.5})
    results = jittered_results(coco, jitter, seed)
    run.save_predictions("test", results, judged(coco, results=results).metrics)
    return run


@pytest.fixture(scope="module")
def runs_dir(folds, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for fold in page.fold_directories(folds):
        for seed in (0, 1):
            store_run(place, fold, "sharp", 0.05, seed)
            store_run(place, fold, "blurred", 0.3, seed)
    store_run(place, folds / "fold0", "begun", 0.1)
    return place


def test_a_folder_without_folds_or_with_one_missing_is_refused(folds, smoke_data, tmp_path):
    with pytest.raises(DatasetError, match="holds no folds: `deimv2-tfg split"):
        page.fold_directories(smoke_data)
    for name in ("fold0", "fold2"):
        manifest = folds / name / "splits.json"
        write_json(tmp_path / name / "splits.json", read_json(manifest))
    with pytest.raises(DatasetError, match="of 3 folds there is no 1; split again"):
        page.fold_directories(tmp_path)


def test_every_photograph_is_judged_once_and_by_all_networks(folds, runs_dir, smoke_data):
    networks = PAGE.fold_runs(folds, runs_dir)
    assert len(networks) == 3
    table = page.fold_table(folds, networks, draws=300).set_index("network")
    sharp, blurred, begun = (next(n for n in networks if m in n) for m in ("sharp", "blur", "beg"))
    listed = [read_json(smoke_data / s / f"{s}.json")["images"] for s in ("train", "val", "test")]
    assert table.loc[sharp, "images"] == sum(map(len, listed)) == 24
    assert table.loc[sharp, "seeds"] == table.loc[blurred, "seeds"] == 2
    assert table.loc[sharp, "AP"] > table.loc[blurred, "AP"] + 0.2
    assert table.loc[begun, "note"] == "1 of 3 folds"
    assert table.loc[begun, "AP"] != table.loc[begun, "AP"]  # missing, not zero


def test_the_difference_to_the_first_row_is_paired_by_photograph(folds, runs_dir):
    networks = PAGE.fold_runs(folds, runs_dir)
    wanted = {m: next(r for n, r in networks.items() if m in n) for m in ("blurred", "sharp")}
    row = page.fold_table(folds, wanted, draws=300).iloc[1]
    both = page.fold_table(folds, wanted, draws=300)["AP"]
    assert row["difference"] == pytest.approx(both[1] - both[0])
    assert 0 < row["difference low"] < row["difference"] < row["difference high"]
    assert row["p images"] < 0.01


def test_a_photograph_that_two_runs_judge_is_refused(folds, runs_dir, tmp_path):
    again = tmp_path / "fold1"
    again.symlink_to(folds / "fold0")
    runs = [store_run(runs_dir, folds / "fold0", model, 0.1) for model in ("one", "other")]
    with pytest.raises(ValueError, match="is judged by detector-one-fold0-0 and by detector-oth"):
        page.pooled(dict(zip((folds / "fold0", again), runs, strict=True)))


def test_the_folds_mean_is_the_mean_of_their_own_metrics(folds, runs_dir):
    networks = PAGE.fold_runs(folds, runs_dir)
    name = next(n for n in networks if "sharp" in n)
    own = [r for r in networks[name] if r.config["seed"] == 0]
    table = page.fold_table(folds, {name: own}, draws=50)
    aps = [json.loads((r.path / "metrics_test.json").read_text())["AP"] for r in own]
    assert table.loc[0, "mean of folds"] == pytest.approx(sum(aps) / 3)


def test_cv_trains_each_fold_in_one_folder_and_prints_the_table(
    folds, tmp_path, monkeypatch, capsys
):
    trained = []

    def train(config, family):
        trained.append((config.data_dir, config.runs_dir, family.name))
        return store_run(tmp_path, type(folds)(config.data_dir), config.model, 0.1).path

    monkeypatch.setattr(page, "train", train)
    command = ["cv", str(folds), "--model", "resnet18", "--runs_dir", str(tmp_path / "runs")]
    assert main(command) == 0
    assert [place for place, _, _ in trained] == [str(folds / f"fold{k}") for k in range(3)]
    assert {family for _, _, family in trained} == {"faster_rcnn"}
    assert "mean of folds" in capsys.readouterr().out


def test_runs_of_a_folder_of_folds_go_to_one_place(folds):
    configs = page.fold_configs(TrainConfig(str(folds), model="tiny", image_size=64))
    assert len({c.runs_dir for c in configs}) == 1 and configs[0].runs_dir.endswith("runs/folds")
