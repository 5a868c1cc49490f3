"""What each lever of the trainer is worth: what can be measured here is, what cannot is missing with its reason; and the study's cells on TensorBoard."""

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deimv2_tfg import stability
from deimv2_tfg.cli import main
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.stability import LEVERS, bench_lever, bench_train, by_device, write_board

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="states what is missing without a GPU"
)


@pytest.fixture(scope="module")
def bench(smoke_data):
    return bench_train(repeats=2, data_dir=str(smoke_data))


def test_a_row_a_lever_and_a_reason_for_each_that_is_missing(bench):
    assert list(bench["loop"]) == ["plain", *LEVERS, "the trainer"]
    absent = bench.set_index("loop").loc[["compiled", "CUDA graphs"]]
    assert list(absent["missing"]) == ["not asked for: --compiled", "needs a GPU"] and absent[
        ["images_per_second", "ratio", "step_s", "data_wait"]
    ].isna().all(axis=None)
    measured = bench[bench["missing"] == ""]
    assert (
        len(measured) == len(bench) - 2
        and (measured["ratio"] > 0).all()
        and measured["ratio"].iloc[0] == 1
        and measured["data_wait"].between(0, 1).all()
    )
    assert (
        measured["images_per_second"] * measured["step_s"] <= 4 + 1e-9
    ).all()  # the wait is part of it
    assert bench["peak_bytes"].isna().all()


def test_a_gpu_that_was_not_there_has_the_command(bench):
    here = by_device(bench)
    assert (
        here[[c for c in here if c.startswith("cuda") and "missing" not in c]].isna().all(axis=None)
        and here["cuda missing"].str.startswith("deimv2-tfg bench train --workers").all()
    )
    assert here["cpu ratio"].to_numpy() == pytest.approx(bench["ratio"].to_numpy(), nan_ok=True)
    both = by_device(bench, bench.assign(device="cuda", ratio=3.0, missing=""))
    assert (both["cuda ratio"] == 3).all() and (both["cuda missing"] == "").all()


def test_what_does_not_compile_is_missing_and_the_rest_is_measured(smoke_data, monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    found = bench_train(repeats=1, data_dir=str(smoke_data), compiled=True).set_index("loop")
    assert (
        found["missing"]["compiled"]
        == "RuntimeError: InvalidCxxCompiler: no working C++ compiler found"
        and np.isnan(found["ratio"]["compiled"])
        and found["ratio"]["the trainer"] > 0
    )
    monkeypatch.setattr(stability, "l1_distance", broken)
    with pytest.raises(RuntimeError, match="InvalidCxx"):
        bench_lever(
            ("no cdist",),
            TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4),
            1,
        )


def test_the_static_part_is_what_is_compiled(smoke_data, monkeypatch):
    asked, runs = [], []

    def compiled(forward, mode=None):
        asked.append((type(forward.__self__).__name__, mode))
        return lambda *a, **k: (runs.append(1), forward(*a, **k))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    config = TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4)
    assert (
        bench_lever(("compiled",), config, 2)["step_s"] > 0
        and len(asked) == 2
        and len(runs) == 2 * 3
    )
    bench_lever(("CUDA graphs",), config, 1)
    assert [mode for _, mode in asked] == [None, None, "reduce-overhead", "reduce-overhead"]


def test_workers_and_the_command(smoke_data, capsys, monkeypatch):
    found = bench_lever(
        ("photographs on disk",),
        TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4, num_workers=2),
        3,
    )
    assert 0 <= found["data_wait"] < 1 and found["images_per_second"] > 0
    monkeypatch.setattr(stability, "bench_train", lambda **given: pd.DataFrame([given]))
    assert main(["bench", "train", "--repeats", "2", "--workers", "3", "--compiled"]) == 0
    assert capsys.readouterr().out.split() == [
        "repeats",
        "workers",
        "compiled",
        "0",
        "2",
        "3",
        "True",
    ]


def test_cells_on_tensorboard(tmp_path):
    cells = pd.DataFrame(
        [
            {
                "precision": "no",
                "rate": "13 x",
                "clip": "none",
                "warmup": "none",
                "augmentation": "mild",
                "seed": np.int64(0),
                "state": "complete",
                "diverged": True,
                "skipped": 7,
                "grad norm q50": 2.5,
                "AP": np.nan,
            },
            {
                "precision": "fp16",
                "rate": "scaled",
                "clip": "0.1",
                "warmup": "none",
                "augmentation": "mild",
                "seed": np.int64(1),
                "state": "fail",
            },
        ]
    )
    for _ in range(2):
        board = write_board(cells, tmp_path / "board")  # the second replaces the first
    first, second = (EventAccumulator(str(board / f"cell-00{k}")).Reload() for k in range(2))
    assert {tag: [s.value for s in first.Scalars(tag)] for tag in first.Tags()["scalars"]} == {
        "grid/diverged": [1.0],
        "grid/skipped": [7.0],
        "grid/grad_norm_q50": [2.5],
    }
    assert second.Tags()["scalars"] == []
    hparams = first.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"13 x" in hparams and b"precision" in hparams
