"""Runs: what identifies one, what is read from it, and what older runs leave unsaid."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from deimv2_tfg import runs
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import (
    Run,
    TrainingStopped,
    code_hash,
    data_hash,
    file_digest,
    find_runs,
    finished_run,
    keep_best,
    only_writer,
    reachable_code,
    source_hash,
    weights_hash,
)
from deimv2_tfg.splits import manifest_of
from deimv2_tfg.synthetic import make_dataset
from deimv2_tfg.training import train


def test_data_hash_sees_every_byte(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    photograph = tmp_path / "train/images/a.jpg"
    photograph.write_bytes(b"one")
    first = data_hash(tmp_path)
    photograph.write_bytes(b"two")
    second = data_hash(tmp_path)
    photograph.rename(tmp_path / "train/images/b.jpg")
    assert len({first, second, data_hash(tmp_path)}) == 3


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"one")
    before = file_digest(path)
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old and as long as before
    assert file_digest(path) != before


def test_code_hash_follows_what_is_called():
    quiet = source_hash("def f(): return 1")
    assert source_hash("def f():\n  'doc'\n  return 1") == quiet
    assert source_hash("def f(): return 2") != quiet
    reached = reachable_code("training", "train", leave_out=("core",)).keys()
    assert {"training.train_epoch", "step.training_step", "guard.roll_back"} <= reached
    assert {"criterion.Criterion", "transforms.TrainTransform", "recipes.lr_factor"} <= reached
    assert {"detector.build_detector", "batches.EpochView"} <= reached
    assert not any(name.startswith("core.") for name in reached)
    assert "detector.convert_weights" not in reached
    assert code_hash("training", "train") != code_hash("evaluation", "evaluate")


def test_a_photograph_is_hashed_once_a_process(tmp_path, monkeypatch):
    "One training of new data: data hash, manifest, environment, and the run asked for again."
    data = Path(make_dataset(tmp_path / "data", profile="smoke", seed=3))
    monkeypatch.setattr(runs, "FRESH", 0.0)
    read = Counter()
    ordinary = runs.hashlib.sha256

    def counted(content=b""):
        read[bytes(content)] += 1
        return ordinary(content)

    photographs = {path.read_bytes() for path in data.rglob("images/*")}
    config = TrainConfig(str(data), str(tmp_path / "runs"), model="tiny", image_size=64)
    monkeypatch.setattr(runs.hashlib, "sha256", counted)
    run = train(TrainConfig(**vars(config) | {"epochs": 1, "batch_size": 4}))
    assert train(TrainConfig(**vars(config) | {"epochs": 1, "batch_size": 4})) == run
    assert manifest_of(data)["hash"] == json.loads((run / "data.json").read_text())["hash"]
    hashed = {content: n for content, n in read.items() if content in photographs}
    assert len(hashed) == len(photographs)
    assert set(hashed.values()) == {1}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "detector-1")
    config = {"data_dir": str(tmp_path / "data"), "image_size": [64, 96], "classes": ["b", "a"]}
    run.write("config.json", config)
    return run


def test_a_run_tells_what_is_in_it(run, tmp_path):
    assert not run.finished and run.result == {} and run.family == "detector"
    assert run.image_size == (64, 96) and run.classes == ["b", "a"]
    assert run.data_dir == tmp_path / "data"
    assert run.incidents().empty and run.metrics().empty and run.scores("val") == {}
    assert Run(run) == run and os.fspath(run) == str(run.path)
    with pytest.raises(FileNotFoundError, match="evaluate"):
        run.predictions("test")
    with pytest.raises(FileNotFoundError, match="pass data_dir"):
        run.annotations("test")


def test_predictions_and_annotations_come_back(run, tmp_path):
    results = [{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}]
    run.save_predictions("test", results, {"AP": float("nan")})
    assert run.predictions("test") == results and run.scores("test") == {"AP": None}
    moved = tmp_path / "moved" / "test"
    moved.mkdir(parents=True)
    (moved / "test.json").write_text('{"images": []}')
    assert run.annotations("test", data_dir=tmp_path / "moved") == {"images": []}


def test_the_score_of_a_fusion_run_has_the_name_of_a_training_s(run):
    run.write("result.json", {"val_AP": 0.25})
    assert run.result["best_val_AP"] == 0.25


def test_runs_are_found_by_what_they_are(tmp_path):
    for k, family in enumerate(("fusion", "detector", "fusion")):
        run = Run(tmp_path / f"{family}-{k}")
        run.write("config.json", {"family": family, "seed": k})
        run.write("result.json", {})
        os.utime(run.path / "result.json", (100 - k, 100 - k))
    Run(tmp_path / "fusion-3").write("config.json", {"family": "fusion"})  # not finished
    assert [run.config["seed"] for run in find_runs(tmp_path)] == [2, 1, 0]
    assert [run.config["seed"] for run in find_runs(tmp_path, "fusion")] == [2, 0]
    assert [run.config["seed"] for run in find_runs(tmp_path, "fusion", seed=0)] == [0]
    assert find_runs(tmp_path, text="true") == []


def test_weights_are_known_by_content(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "best").mkdir(parents=True)
        (tmp_path / name / "best" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "best" / "config.json").write_text("{}")
    here = weights_hash(tmp_path / "here")
    assert here == weights_hash(tmp_path / "there") == weights_hash(tmp_path / "there" / "best")
    (tmp_path / "there" / "best" / "config.json").write_text('{"num_classes": 3}')
    assert weights_hash(tmp_path / "there") != here
    with pytest.raises(FileNotFoundError, match="no weights"):
        weights_hash(tmp_path)


def test_a_run_that_is_not_finished_is_refused(run):
    with pytest.raises(ValueError, match="env.json, result.json, best missing"):
        finished_run(run, run.data_dir)


def test_a_best_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    keep_best(run, lambda folder: Run(folder).write("config.json", {"AP": 1}))

    def full(folder):
        Run(folder).write("config.json", {"AP": 2})
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        keep_best(run, full)
    assert run.about_best == {"AP": 1}


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "run"):
        assert (tmp_path / "run" / "writer.json").exists()
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_second_writer_is_told_who_it_is(tmp_path):
    with only_writer(tmp_path / "run"):
        with pytest.raises(TrainingStopped, match=f"process {os.getpid()} is writing"):
            only_writer(tmp_path / "run").__enter__()
