"""The plan of the GPU study: its order, its budget, what a failure and a kill leave behind, and what is carried away."""

import dataclasses
import gzip
import json
import math
import os
import signal
import time
import zipfile

import pandas as pd
import pytest
import torch

from deimv2_tfg import gpu_study as g
from deimv2_tfg.core import open_study, read_json
from deimv2_tfg.training import phase1_config, read_incidents


@pytest.fixture
def study(tmp_path, monkeypatch, smoke_data):
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    return open_study("smoke", str(smoke_data), "gpu")


def step(name, kind="fake", **more):
    return g.Step(name, kind, 0, "", **more)


def quiet(*args):
    pass


def spend(job):
    job.clock.end = time.monotonic()


def detector(study, **changes):
    return g.training(dataclasses.replace(phase1_config(study), **changes), "detector", 1, "")


def test_the_most_informative_comes_first_and_all_networks_see_as_many_images(study):
    steps = g.study_plan(study, seeds=3)
    names = [s.name for s in steps]
    assert [s.priority for s in steps] == sorted(s.priority for s in steps) and len(
        {*names}
    ) == len(names)
    trainings = [s for s in steps if s.kind == "train"]
    assert len(
        {(g.config_of(s).epochs, g.config_of(s).batch_size) for s in trainings}
    ) == 1 and all(g.config_of(s).init == "scratch" for s in trainings)
    place = lambda part: next(k for k, n in enumerate(names) if part in n)
    assert (
        place("tiny, 64 px, seed 0")
        < place("seed 1")
        < place("phase 2")
        < place("96 px")
        < place("neu-det")
        < place("stability")
    )
    assert g.larger(640) == 1024


def test_budget_ends_a_training_and_the_next_call_finishes_it(study):
    plan = [detector(study, epochs=24)]
    states = g.run_plan(study, plan, budget_hours=1 / 3600, say=quiet)["state"]
    run = g.run_of(g.config_of(plan[0]))
    assert (
        list(states) == ["out of time"]
        and list((run / "last").glob("step-*.pt"))
        and not (run / "result.json").exists()
    )
    record = pd.read_csv(g.place_of(study) / "results_of_record.csv")
    assert list(record["row"]) == [plan[0].name] and record.drop(columns="row").isna().all(
        axis=None
    ), "a run that is not finished is an empty row"
    assert list(g.run_plan(study, plan, say=quiet)["state"]) == ["finished"]
    epochs = [
        l["epoch"]
        for l in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if l["split"] == "train"
    ]
    assert (
        epochs == list(range(1, 25))
        and read_json(run / "result.json")["steps"] == 72
        and read_incidents(run).empty
    )
    record = pd.read_csv(g.place_of(study) / "results_of_record.csv").iloc[0]
    assert (
        record["images_seen"] == 288
        and record["seed"] == 0
        and record["run"] == run.name
        and record["card"] == read_json(run / "env.json")["device"]
    )
    with zipfile.ZipFile(study.runs / "gpu_study-gpu.zip") as archive:
        names = archive.namelist()
        assert {
            f"runs/gpu/gpu_study/{n}"
            for n in ("plan.json", "progress.jsonl", "results_of_record.csv", "provenance.json")
        } <= {*names}
        assert f"runs/gpu/{run.name}/predictions_test.json" in names and not [
            n for n in names if n.endswith((".pt", ".safetensors")) or "/last/" in n
        ]
        told = json.loads(archive.read("runs/gpu/gpu_study/provenance.json"))
        assert told["runs"][0]["run"] == run.name and told["made"]["versions"]["torch"]
    before = (run / "result.json").stat().st_mtime_ns
    assert (
        list(g.run_plan(study, plan, say=quiet)["state"]) == ["finished"]
        and (run / "result.json").stat().st_mtime_ns == before
    )


def test_a_failure_is_recorded_and_the_next_step_begins(study):
    ran = []

    def fake(s, job):
        ran.append(s.name)
        if s.name == "bad":
            raise ValueError("no such thing")

    plan = [
        step("bad"),
        step("good"),
        step("built on bad", after=("bad",)),
        step("built on good", after=("good",)),
    ]
    table = g.run_plan(study, plan, kinds={"fake": fake}, say=quiet)
    assert list(table["state"]) == ["failed", "finished", "waits for bad", "finished"] and ran == [
        "bad",
        "good",
        "built on good",
    ]
    failed = [
        l
        for l in g.Progress(g.place_of(study) / "progress.jsonl").lines()
        if l["event"] == "failed"
    ]
    assert (
        len(failed) == 1
        and failed[0]["error"] == "ValueError: no such thing"
        and "in fake" in failed[0]["traceback"]
    )
    g.run_plan(study, plan, kinds={"fake": fake}, say=quiet)
    assert ran == ["bad", "good", "built on good", "bad"], "only what is not finished is run again"


def test_budget_is_looked_at_between_steps(study):
    plan = [step("one"), step("two")]
    table = g.run_plan(
        study, plan, budget_hours=1, kinds={"fake": lambda s, job: spend(job)}, say=quiet
    )
    assert list(table["state"]) == ["finished", "to do"]


def test_a_step_that_is_cut_between_two_of_its_runs_goes_on(study):
    made = []

    def grid(s, job):
        for k in range(4):
            if k in made:
                continue
            job.clock.check()
            made.append(k)
            if k == 1:
                spend(job)

    first = g.run_plan(study, [step("grid")], budget_hours=1, kinds={"fake": grid}, say=quiet)
    assert list(first["state"]) == ["out of time"] and made == [0, 1]
    assert list(g.run_plan(study, [step("grid")], kinds={"fake": grid}, say=quiet)["state"]) == [
        "finished"
    ] and made == [0, 1, 2, 3]


def test_a_request_to_end_from_outside_ends_the_plan(study):
    def asked(s, job):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        g.run_plan(study, [step("long"), step("next")], kinds={"fake": asked}, say=quiet)
    log = g.Progress(g.place_of(study) / "progress.jsonl")
    assert (
        log.states() == {"long": "interrupted"}
        and signal.getsignal(signal.SIGTERM) is handler
        and (study.runs / "gpu_study-gpu.zip").exists()
    )


def test_one_process_a_plan(study):
    def inside(s, job):
        with pytest.raises(RuntimeError, match="another process"):
            g.run_plan(study, [step("x")], kinds={"fake": lambda s, j: None}, say=quiet)

    assert list(g.run_plan(study, [step("outer")], kinds={"fake": inside}, say=quiet)["state"]) == [
        "finished"
    ]


def test_rows_that_were_not_run_are_there_and_empty(study):
    steps = g.study_plan(study, seeds=2)
    record = g.results_of_record(study, steps, g.Progress(g.place_of(study) / "none.jsonl"))
    assert (
        list(record.columns) == list(g.RECORD)
        and record["row"].is_unique
        and record.drop(columns="row").isna().all(axis=None)
    )
    assert (
        sum(record["row"].str.startswith("phase 2")) == 8
        and sum(record["row"].str.startswith("neu-det")) == 3
        and sum(record["row"].str.startswith("stability")) == 1
    )
    assert g.comparison(study, steps).columns.tolist() == ["model"]


def test_smaller_cards_compute_smaller_parts_of_the_same_batch():
    from deimv2_tfg.training import TrainConfig

    config = TrainConfig("", model="tiny", image_size=1024, batch_size=16)
    found = [
        g.card_settings("cpu", config, memory_gb=gb, precision="bf16") for gb in (48, 5, 3, 0.2)
    ]
    sizes = [s.micro_batch or 16 for s in found]
    assert (
        sizes[0] == 16
        and sizes[:3] == sorted(sizes[:3], reverse=True)
        and sizes[2] < 16
        and found[-1].checkpointing
        and not found[0].checkpointing
    )
    assert all(s.apply(config).batch_size == 16 and s.precision != "fp16" for s in found)
    assert all(not s.predicted_gb > 0.8 * gb for s, gb in zip(found, (48, 5, 3, 0.2)))


def test_probe_tries_more_frugal_ways_until_one_fits(study, monkeypatch):
    tried = []

    def card_of_one(config, settings, family, steps):
        tried.append((settings.micro_batch or config.batch_size, settings.checkpointing))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return g.Probe(settings, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(g, "_probe", card_of_one)
    config = dataclasses.replace(phase1_config(study), batch_size=8)
    found = g.probe(config, g.CardSettings("", 1.0, "no", 0, False, 0))
    assert tried == [(8, False), (4, False), (8, True)] and (
        found.settings.micro_batch,
        found.settings.checkpointing,
    ) == (0, True)
    monkeypatch.setattr(g, "_probe", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(MemoryError, match="smaller image_size"):
        g.probe(config, found.settings)


def test_settings_of_a_plan_are_kept_on_another_card(study, monkeypatch):
    steps = [detector(study)]
    key = g.probe_key("detector", g.config_of(steps[0]))
    old = g.Probe(g.CardSettings("another card", 12.0, "bf16", 2, True, 4), 1.0, 1.0, 1.0, math.nan)
    g.write_plan(study, steps, {key: old})
    assert g.read_probes(study)[key].settings.micro_batch == 2 and math.isnan(
        g.read_probes(study)[key].peak_gb
    )
    monkeypatch.setattr(
        g, "probe", lambda config, settings, family: g.Probe(settings, 2.0, 2.0, 2.0, 2.0)
    )
    again = g.probe_all(steps, g.read_probes(study), quiet)[key]
    assert (
        (again.settings.micro_batch, again.settings.checkpointing, again.settings.precision)
        == (2, True, "bf16")
        and again.settings.device != "another card"
        and again.step_s == 2.0
    )
    timed = g.timed(steps, {key: again})[0]
    assert g.config_of(timed).micro_batch == 2 and timed.seconds == pytest.approx(
        2 * 3 * 2.0 + 2.0 * (2 * 6 + 6)
    )


def test_time_left_follows_the_pace_of_finished_trainings(study):
    log, steps = (
        g.Progress(g.place_of(study) / "progress.jsonl"),
        [dataclasses.replace(step(n, "train"), seconds=10.0) for n in "ab"],
    )
    assert g.remaining(steps, {}, log) == 20
    log("a", "begun", expected_s=10.0)
    log("a", "finished", seconds=30.0)
    assert g.remaining(steps, {"a": "finished"}, log) == pytest.approx(30)


def test_a_trace_is_read_into_own_times_and_busy_times(tmp_path):
    mark = lambda name, ts, dur: {
        "ph": "X",
        "cat": "user_annotation",
        "name": f"part/{name}",
        "ts": ts,
        "dur": dur,
    }
    kernel = lambda ts, dur: {"ph": "X", "cat": "kernel", "name": "k", "ts": ts, "dur": dur}
    events = [
        mark("step", 0, 100),
        mark("criterion", 10, 50),
        mark("backbone", 20, 30),
        mark("backward", 60, 40),
        kernel(25, 5),
        kernel(70, 20),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    table = g.read_trace(path).set_index("part")
    assert (table["seconds"] * 1e6).round().astype(int).to_dict() == {
        "other": 10,
        "criterion": 20,
        "backbone": 30,
        "backward": 40,
    }
    assert (table["card_busy_s"] * 1e6).round().astype(int).to_dict() == {
        "other": 0,
        "criterion": 0,
        "backbone": 5,
        "backward": 20,
    }


def test_parts_of_a_step_leave_the_trainer_as_it_was(study, tmp_path):
    config = phase1_config(study)
    trainer, parts, _ = g.probe_trainer(config, g.DEIMV2, tmp_path)
    before = [dict(o.__dict__) for o, _, _ in g.marks(trainer)]
    with pytest.raises(ZeroDivisionError), g.marked(trainer, g.Traffic().around):
        1 / 0
    assert [dict(o.__dict__) for o, _, _ in g.marks(trainer)] == before
    with g.marked(trainer, (counted := g.Traffic()).around), counted:
        done = g.one_step(trainer, parts)
    assert (
        not done.failure
        and counted.flops["backward"] > counted.flops["backbone"] > 0
        and counted.bytes["optimizer"] > 8 * sum(p.numel() for p in trainer.model.parameters())
    )


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="nvidia-smi"):
        g.gpu_study()


def test_neu_det_is_converted_once(tmp_path, monkeypatch, root):
    source = root.parent / "shared" / "data" / "neu-det"
    if not source.is_dir():
        pytest.skip("the NEU set is not beside the clone (../shared/data/neu-det)")
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    made = g.neu_set(source)
    first = (made / "train" / "train.json").stat().st_mtime_ns
    assert (
        g.neu_set(source) == made
        and (made / "train" / "train.json").stat().st_mtime_ns == first
        and g.neu_set(made) == made.resolve()
    )
    assert g._counts(str(made))["test"] == 360


def test_memory_of_every_shape_and_the_ones_that_do_not_fit(study, monkeypatch):
    config, whole = phase1_config(study), g._probe

    def card(config, settings, family, steps):
        if config.image_size > 64 and not settings.checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(config, settings, family, steps)

    monkeypatch.setattr(g, "_probe", card)
    table = g.peak_table(config, ((64, 4), (96, 2)), steps=1)
    assert table[["image_size", "batch", "checkpointing"]].values.tolist() == [
        [64, 4, False],
        [64, 4, True],
        [96, 2, False],
        [96, 2, True],
    ]
    assert (
        list(table["note"].str.contains("does not fit"))
        == [False, False, True, False]
        == list(table["step_s"].isna())
    )
    assert g.PEAKS["thesis"] == ((640, 8), (1024, 4)) and {16, 32} <= {*g.THROUGHPUT["thesis"]}


def test_throughput_of_every_batch_and_the_ones_that_do_not_fit(study, monkeypatch):
    def bench(repeats, batch, **more):
        if batch > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pd.DataFrame(
            [
                {"loop": "plain", "ratio": 1.0, "missing": ""},
                {"loop": "the trainer", "ratio": 2.0, "missing": ""},
            ]
        )

    monkeypatch.setattr(g, "bench_train", bench)
    table = g.throughput_table(phase1_config(study), (16, 32), 1)
    assert list(table["batch"]) == [16, 16, 32] and "does not fit" in table["missing"].iloc[-1]


def test_rows_on_the_neu_set_stand_beside_the_published_ones(study):
    plan = [g.training(phase1_config(study), "detector", 1, "", "neu-det")]
    names = lambda table: table.set_index("row").index
    before = g.beside_published(g.neu_runs(plan))
    assert (
        list(names(before)) == ["DEIMv2-tiny, 64 px, seed 0", *(p["row"] for p in g.PUBLISHED_NEU)]
        and before.loc[0, ["AP50", "AP", "run"]].isna().all()
    )
    assert (
        before["AP50"].dropna().between(0, 1).all()
        and (before.loc[1:, "first weights"] == "COCO").all()
    )
    g.run_plan(study, plan, say=quiet)
    table, record = (
        pd.read_csv(study.figures / "gpu_neu_det.csv"),
        pd.read_csv(g.place_of(study) / "results_of_record.csv"),
    )
    assert (
        table.loc[0, "AP50"] == pytest.approx(record.loc[0, "AP50"])
        and table.loc[0, "run"] == record.loc[0, "run"]
    )
    assert read_json(study.figures / "gpu_neu_det.json")["runs"] == [record.loc[0, "run"]]
