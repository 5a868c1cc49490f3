"""What each lever of the trainer gives; what cannot be measured here says why."""

import pytest
import torch
from page_code import page_module

from deimv2_tfg.cost import PARTS, memory_table, parts_table
from deimv2_tfg.data import load_dataset
from deimv2_tfg.recipes import TrainConfig

levers = page_module("04d_levers")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="states what is missing without a GPU"
)


@pytest.fixture
def config(smoke_data):
    return TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4)


def broken(*given, **options):
    raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nmore")


def test_one_row_per_lever_and_a_reason_for_each_that_is_missing():
    bench = levers.bench_train(repeats=2)
    assert list(bench["loop"]) == ["plain", *levers.LEVERS, "the trainer"]
    absent = bench.set_index("loop").loc[["compiled", "CUDA graphs"]]
    assert list(absent["missing"]) == ["not asked for: compiled", "needs a GPU"]
    assert absent[["images_per_second", "ratio", "step_s", "data_wait"]].isna().all(axis=None)
    measured = bench[bench["missing"] == ""]
    assert len(measured) == len(bench) - 2
    assert (measured["ratio"] > 0).all()
    assert measured["ratio"].iloc[0] == 1
    assert measured["data_wait"].between(0, 1).all()
    with_the_wait = measured["images_per_second"] * measured["step_s"]
    assert (with_the_wait <= 4 + 1e-9).all()
    assert bench["peak_bytes"].isna().all()


def test_what_does_not_compile_is_missing_and_any_other_fault_is_raised(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    measured, reason = levers.measured_lever(("compiled",), config, 1)
    assert measured == {}
    assert reason == "RuntimeError: InvalidCxxCompiler: no working C++ compiler found"
    monkeypatch.setattr(levers, "l1_distance", broken)
    with pytest.raises(RuntimeError, match="InvalidCxx"):
        levers.measured_lever(("no cdist",), config, 1)


def test_the_static_part_is_what_is_compiled(config, monkeypatch):
    asked = []
    calls = []

    def compiled(forward, mode=None):
        asked.append(mode)

        def counted(*values, **named):
            calls.append(forward.__self__)
            return forward(*values, **named)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    assert levers.bench_lever(("compiled",), config, 2)["step_s"] > 0
    assert len(asked) == 2
    assert len(calls) == 2 * 3
    levers.bench_lever(("CUDA graphs",), config, 1)
    assert asked == [None, None, "reduce-overhead", "reduce-overhead"]


def test_workers_load_what_is_kept_on_disk(config):
    loading = TrainConfig(**vars(config) | {"num_workers": 2})
    measured = levers.bench_lever(("photographs on disk",), loading, 3)
    assert 0 <= measured["data_wait"] < 1
    assert measured["images_per_second"] > 0


def test_photographs_are_decoded_in_the_first_epoch_alone():
    table = levers.bench_loading(64, 1, (512, 384)).set_index(["loading", "epoch"])
    decoded = table["decoded"].unstack()
    assert list(decoded.loc["decoded each time"]) == [12, 12]
    kept = decoded.drop(index="decoded each time")
    assert len(kept) == len(levers.LOADING) - 1
    assert (kept["first"] == 12).all() and (kept["later"] == 0).all()
    rates = table["photographs_per_second"].unstack()
    assert rates.loc["shrunk once", "later"] > rates.loc["decoded each time", "later"]
    assert rates.loc["shrunk once, two workers"].isna().all()


def test_a_card_is_measured_on_photographs_of_640_px(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(levers, "study_data", lambda study: smoke_data)
    config = levers.bench_config()
    assert (config.model, config.image_size, config.batch_size) == ("m", 640, 16)
    photograph = load_dataset(config.data_dir, "train").photograph(0)
    assert photograph.size == (640, 640)


def test_parts_of_a_step_add_up_and_are_above_their_floor():
    parts = parts_table("tiny", 64, 2, repeats=1).set_index("part")
    assert list(parts.index) == list(PARTS)
    assert parts["share"].sum() == pytest.approx(1)
    assert (parts["seconds"] > parts["floor_s"]).all()
    assert parts["flops"]["backward"] > parts["flops"]["decoder"] > 0


def test_memory_of_a_step_by_batch_and_what_does_not_fit(monkeypatch):
    table = memory_table("tiny", 64, 4, repeats=1)
    assert list(table["batch"]) == [4, 2, 1]
    assert (table["step_s"] > 0).all()

    def too_large(step, repeats):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("deimv2_tfg.cost.step_memory", too_large)
    table = memory_table("tiny", 64, 1)
    assert list(table["note"]) == ["does not fit"]
