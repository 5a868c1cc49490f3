"""Groups stay together, classes keep their shares, a changed data set is refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from deimv2_tfg import cli
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import DatasetError, annotation_file, check_dataset
from deimv2_tfg.splits import (
    assign_shares,
    bind_data,
    deal,
    freeze,
    groups_of,
    require_frozen,
    split_table,
    write_assignment,
    write_folds,
)
from deimv2_tfg.synthetic import make_dataset

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "industrial6"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Six test photographs are mirrored copies of training photographs, four named as augmented."
    root = make_dataset(
        tmp_path_factory.mktemp("data") / "set", profile="smoke", counts=(80, 12, 24)
    )
    train, test = (read_json(annotation_file(root, s)) for s in ("train", "test"))
    for k in range(10):
        name = (
            f"c{k}.png"
            if k >= 4
            else f"{Path(train['images'][20 + k]['file_name']).stem}_aug{k}.png"
        )
        with Image.open(root / "train" / "images" / train["images"][k]["file_name"]) as i:
            copy = ImageOps.mirror(i) if k >= 4 else Image.effect_noise(i.size, 50)
        copy.save(root / "test" / "images" / name)
        test["images"].append(
            {
                "id": 500 + k,
                "file_name": name,
                "width": copy.width,
                "height": copy.height,
                "part": f"p{k // 2}",
            }
        )
    write_json(annotation_file(root, "test"), test)
    return root


def test_groups_join_looks_names_and_a_column(data):
    table = split_table(data)
    at = {f: k for k, f in enumerate(table["file_name"])}
    train = read_json(annotation_file(data, "train"))["images"]
    both, looks, names, column = (
        groups_of(data),
        groups_of(data, ("look",)),
        groups_of(data, ("name",)),
        groups_of(data, (), "part"),
    )
    for k in range(4, 10):
        assert looks[at[f"c{k}.png"]] == looks[at[train[k]["file_name"]]] == both[at[f"c{k}.png"]]
    for k in range(4):
        stem = Path(train[20 + k]["file_name"]).stem
        assert names[at[f"{stem}_aug{k}.png"]] == names[at[f"{stem}.jpg"]]
    assert len(set(names.tolist())) == len(table) - 4
    assert (
        column[at["c6.png"]] == column[at["c7.png"]] != column[at["c8.png"]]
        and len(set(column.tolist())) == len(table) - 5
    )
    with pytest.raises(ValueError, match="camera"):
        groups_of(data, (), "camera")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_apart_and_classes_keep_their_shares(data, seed):
    table = assign_shares(data, (0.7, 0.1, 0.2), seed=seed)
    assert table.groupby("group")["share"].nunique().max() == 1
    sizes = np.bincount(table["share"], minlength=3) / len(table)
    assert np.abs(sizes - (0.7, 0.1, 0.2)).max() < 0.03
    classes = table.columns[3:-2]
    for c in classes:
        shown = table[table[c] > 0]["share"]
        assert (
            np.abs(np.bincount(shown, minlength=3) - np.array([0.7, 0.1, 0.2]) * len(shown)).max()
            <= 2
        )
    assert assign_shares(data, (0.7, 0.1, 0.2), seed=seed).equals(table)


def test_dealing_is_even_and_uses_the_seed():
    counts = np.eye(3)[np.repeat([0, 1, 2], (60, 30, 10))]
    for seed in range(3):
        dealt = deal(counts, (0.6, 0.2, 0.2), seed)
        assert [[int((counts[dealt == s, c]).sum()) for c in range(3)] for s in range(3)] == [
            [36, 18, 6],
            [12, 6, 2],
            [12, 6, 2],
        ]
    assert (deal(counts, (0.6, 0.2, 0.2), 0) != deal(counts, (0.6, 0.2, 0.2), 1)).any()


def test_written_splits_are_sound_and_without_leaks(data, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*") if p.is_file()}
    out = write_assignment(data, tmp_path / "anew", assign_shares(data))
    report = check_dataset(out)
    assert (
        not report.errors
        and not report.pairs.across.any()
        and not [f for f in report.findings if f.kind == "name-augmented-across"]
    )
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*") if p.is_file()} == before
    old, new = split_table(data), split_table(out)
    assert sorted(old["file_name"]) == sorted(new["file_name"]) and old.drop(
        columns=["split", "file_name", "entry"]
    ).sum().equals(new.drop(columns=["split", "file_name", "entry"]).sum())
    with pytest.raises(FileExistsError):
        write_assignment(data, out, assign_shares(data))


def test_every_photograph_is_tested_once(data, tmp_path):
    folds = write_folds(data, tmp_path, 4)
    tested = [f for fold in folds for f in split_table(fold, ("test",))["file_name"]]
    assert sorted(tested) == sorted(split_table(data)["file_name"]) and all(
        not check_dataset(f, photographs=False).errors for f in folds
    )
    assert all(require_frozen(f) for f in folds)
    with pytest.raises(ValueError, match="at least 3"):
        write_folds(data, tmp_path / "two", 2)


def test_a_run_refuses_changed_data_and_names_the_files(data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "set"))
    first = bind_data(tmp_path / "run", root)
    assert (
        bind_data(tmp_path / "run", root) == first
        and read_json(tmp_path / "run" / "data.json")["hash"] == first
    )
    coco = read_json(annotation_file(root, "val"))
    coco["annotations"][0]["bbox"][0] += 1
    write_json(annotation_file(root, "val"), coco)
    with pytest.raises(DatasetError, match="changed: val/val.json"):
        bind_data(tmp_path / "run", root)
    assert (
        bind_data(tmp_path / "run", root, allow_changed=True) != first
        and (tmp_path / "run" / "data_changes.jsonl").exists()
    )
    assert read_json(tmp_path / "run" / "data.json")["hash"] == first


def test_a_frozen_set_is_guarded(data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "set"))
    with pytest.raises(DatasetError, match="freeze it first"):
        require_frozen(root)
    freeze(root)
    assert require_frozen(root) == read_json(root / "splits.json")["hash"]
    picture = root / "test" / "images" / "c5.png"
    with Image.open(picture) as i:
        ImageOps.flip(i).save(picture)
    with pytest.raises(DatasetError, match="changed: test/images/c5.png"):
        require_frozen(root)
    with pytest.raises(DatasetError):
        freeze(root)
    with pytest.raises(DatasetError):
        bind_data(tmp_path / "run", root)


def test_commands(data, tmp_path, capsys):
    assert cli.main(["split", str(data), str(tmp_path / "out"), "--shares", "0.6,0.2,0.2"]) == 0
    assert "groups" in capsys.readouterr().out and require_frozen(tmp_path / "out")
    assert (
        cli.main(["split", str(data), str(tmp_path / "folds"), "--folds", "3"]) == 0
        and (tmp_path / "folds" / "fold2" / "splits.json").exists()
    )
    assert (
        cli.main(["split", str(data), str(tmp_path / "x"), "--shares", "1,2"]) == 2
        and cli.main(["split", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    )


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real photographs {REAL} are not there")
def test_real_photographs_of_one_part_stay_together():
    report = check_dataset(REAL)
    table = assign_shares(REAL, (715, 102, 204), report=report)
    index = {(r.split, r.file_name): r.share for r in table.itertuples()}
    keys = list(report.photographs)
    assert report.pairs.across.sum() > 300  # as it is, the splits share parts
    assert all(
        index[keys[a]] == index[keys[b]]
        for a, b in zip(report.pairs.a, report.pairs.b, strict=True)
    )  # dealt anew, none
    assert np.abs(np.bincount(table["share"]) - (715, 102, 204)).max() <= 2
