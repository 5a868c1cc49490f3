"""More than a hundred injected faults, each with the outcome that the trainer promises; the last test prints the count."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from deimv2_tfg import runs, training
from deimv2_tfg.criterion import NonFiniteLossError
from deimv2_tfg.guard import diagnose, random_state, replay
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import CheckpointError, Run, TrainingStopped, load_state, save_state
from deimv2_tfg.training import (
    DEIMV2,
    find_run,
    make_ema,
    parameter_groups,
    train,
    training_step,
)

COUNT = {}


def injected(kind, n=1):
    COUNT[kind] = COUNT.get(kind, 0) + n


@pytest.fixture
def config(smoke_data, tmp_path):
    return TrainConfig(
        str(smoke_data),
        str(tmp_path / "runs"),
        model="tiny",
        image_size=64,
        epochs=2,
        batch_size=4,
        lr=1e-3,
    )


def same(a, b):
    "Bit for bit, whatever it is made of."
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(run):
    "All that a run ends in but the time it took."
    state, result = load_state(run), json.loads((run / "result.json").read_text())
    state["counters"].pop("seconds")
    result.pop("seconds")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state | {
        "result": result,
        "metrics": [
            {k: v for k, v in l.items() if k not in ("train/images_per_second", "train/data_wait")}
            for l in lines
        ],
    }


@pytest.fixture(scope="module")
def whole(smoke_data, tmp_path_factory):
    "What the run of `config` ends in where nothing happens to it."
    return outcome(
        train(
            TrainConfig(
                str(smoke_data),
                str(tmp_path_factory.mktemp("whole")),
                model="tiny",
                image_size=64,
                epochs=2,
                batch_size=4,
                lr=1e-3,
            )
        )
    )


# ------------------------------------------------------------------ one step


class Bench:
    "A network in the middle of training, and one good batch."

    def __init__(self, config):
        torch.manual_seed(0)
        self.config, self.accelerator = config, Accelerator(cpu=True)
        self.model = DEIMV2.build(config, 6).train()
        self.losses, self.average = DEIMV2.losses(config, 6), make_ema(self.model, 10)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config))
        self.images = torch.randn(2, 3, 64, 64)
        self.targets = [
            {
                "labels": torch.tensor([i, i + 1]),
                "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.1, 0.3]]),
                "image_id": 7 + i,
            }
            for i in range(2)
        ]
        assert not self.step().failure

    def step(self, images=None, losses=None):
        return training_step(
            self.model,
            losses or self.losses,
            [(self.images if images is None else images, self.targets)],
            self.optimizer,
            self.average,
            self.accelerator,
            self.config.clip,
            0,
        )

    def state(self):
        return {
            k: {n: v.clone() for n, v in m.state_dict().items()}
            for k, m in (("model", self.model), ("average", self.average))
        } | {
            "optimizer": [
                {k: torch.as_tensor(v).clone() for k, v in s.items()}
                for s in self.optimizer.state_dict()["state"].values()
            ]
        }

    def refuses(self, images=None, losses=None):
        "The step fails and changes nothing; returns it with its diagnosis."
        before, numbers = self.state(), random_state()
        step = self.step(images, losses)
        assert step.failure and same(before, self.state())
        drawn = random_state()
        cause = diagnose(
            self.model,
            losses or self.losses,
            [(self.images if images is None else images, self.targets)],
            0,
            numbers,
        )
        assert (
            same(before, self.state())
            and same(drawn, random_state())
            and all(p.grad is None for p in self.model.parameters())
        )
        return step, cause


@pytest.fixture
def bench(config):
    return Bench(config)


BAD = (math.nan, math.inf, -math.inf)


def test_a_term_that_is_not_finite(bench):
    rng = random.Random(0)
    names = rng.sample(sorted(bench.step().losses), 24)
    for name in names:
        value = rng.choice(BAD)
        step, cause = bench.refuses(
            losses=lambda *a: (found := bench.losses(*a)) | {name: found[name] * value}
        )
        assert step.failure == "loss" and cause["origin"] == "loss" and cause["term"] == name
        injected("loss term")
    assert not bench.step().failure


def test_a_criterion_that_refuses(bench):
    def refuse(*a):
        raise NonFiniteLossError(["layer_logits of layer 1"], [7, 8])

    step, cause = bench.refuses(losses=refuse)
    assert step.failure == "loss" and not step.losses and cause["term"] == "layer_logits of layer 1"
    injected("criterion")


def test_a_gradient_that_is_not_finite(bench):
    rng = random.Random(1)
    used = [
        (n, p)
        for n, p in bench.model.named_parameters()
        if p.requires_grad and "denoising" not in n
    ]
    for name, p in rng.sample(used, 20):
        value = rng.choice(BAD)
        handle = p.register_hook(lambda g: torch.full_like(g, value))
        step, cause = bench.refuses()
        handle.remove()
        assert (
            step.failure == "gradient"
            and cause["origin"] == "gradient"
            and cause["term"] in step.losses
            and cause["module"] == name.rpartition(".")[0]
        )
        injected("gradient")
    assert not bench.step().failure


def test_a_module_whose_output_is_not_finite(bench):
    rng = random.Random(2)
    parts = [
        (n, m)
        for n, m in bench.model.named_modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm))
        and "denoising" not in n
        and "conv_encoder" in n
    ]
    for name, module in rng.sample(parts, 10):
        value = rng.choice(BAD)
        handle = module.register_forward_hook(lambda m, i, o: o + value, prepend=True)
        step, cause = bench.refuses()
        handle.remove()
        assert step.failure == "loss" and cause["origin"] == "forward" and cause["module"] == name
        injected("module output")
    assert not bench.step().failure


def test_a_weight_that_is_not_finite_is_named(bench):
    with torch.no_grad():
        bench.model.model.decoder.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    before, step = random_state(), bench.step()
    cause = diagnose(bench.model, bench.losses, [(bench.images, bench.targets)], 0, before)
    assert step.failure and (cause["origin"], cause["module"]) == (
        "weights",
        "model.decoder.layers.1.self_attn.q_proj",
    )
    injected("weight")


def test_photographs_that_are_not_finite(bench):
    rng = random.Random(3)
    for k in range(16):
        images, which = bench.images.clone(), [0, 1] if k < 2 else [k % 2]
        for i in which:
            images[i, rng.randrange(3), rng.randrange(64), rng.randrange(64)] = rng.choice(BAD)
        step, cause = bench.refuses(images)
        assert cause["origin"] == "input" and cause["images"] == [7 + i for i in which]
        injected("input" if len(which) == 2 else "one image")
    assert not bench.step().failure


# ------------------------------------------------------------------ a run


def poison(monkeypatch, when):
    "Multiply the loss by NaN at the calls of `training_step` for which `when(number)`."
    ordinary, calls = training.training_step, [0]

    def step(model, losses, *rest):
        calls[0] += 1
        if not when(calls[0] - 1):
            return ordinary(model, losses, *rest)
        return ordinary(model, lambda *a: {k: v * math.nan for k, v in losses(*a).items()}, *rest)

    monkeypatch.setattr(training, "training_step", step)


def test_single_bad_steps_are_skipped_and_recorded(config, monkeypatch):
    poison(monkeypatch, {1, 4, 5}.__contains__)
    run = train(config)
    incidents, result = Run(run).incidents(), json.loads((run / "result.json").read_text())
    assert (
        list(incidents["step"]) == [1, 4, 5]
        and list(incidents["in_a_row"]) == [1, 1, 2]
        and (result["incidents"], result["returns"], result["steps"]) == (3, 0, 6)
    )
    assert all(len(ids) == 4 for ids in incidents["image_ids"]) and set(incidents["failure"]) == {
        "loss"
    }
    lines = [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]
    assert [l["train/skipped"] for l in lines if l["split"] == "train"] == pytest.approx(
        [1 / 3, 2 / 3]
    ) and all(math.isfinite(l["train/loss"]) for l in lines if l["split"] == "train")
    assert replay(run, 0, DEIMV2)["origin"] == ""  # the fault was not in the batch
    injected("bad step in a run", 3)


def test_several_in_a_row_return_to_the_last_state_at_half_the_rate(config, monkeypatch):
    poison(monkeypatch, {3, 4, 5}.__contains__)
    with pytest.warns(UserWarning, match="back to step 3 at 0.5"):
        run = train(config)
    result, state = json.loads((run / "result.json").read_text()), load_state(run)
    assert (
        result["incidents"],
        result["returns"],
        result["steps"],
        state["counters"]["slower"],
    ) == (3, 1, 6, 0.5)
    injected("bad steps in a row", 3)


def test_a_run_that_cannot_be_saved_stops_with_a_report(config, monkeypatch):
    poison(monkeypatch, lambda k: k >= 3)
    with (
        pytest.raises(TrainingStopped, match="rollbacks to half the rate"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        train(config)
    run = find_run(config)
    report = json.loads((run / "stopped.json").read_text())
    assert (
        report["incidents"] == 9
        and report["returns"] == 2
        and report["first"]["failure"] == "loss"
        and not (run / "result.json").exists()
    )
    assert load_state(run)["counters"]["epoch"] == 1 and all(
        torch.isfinite(v).all() for v in load_state(run)["model"].values() if v.is_floating_point()
    )
    with pytest.raises(TrainingStopped, match="stopped.json"):
        train(config)
    (run / "stopped.json").unlink()
    monkeypatch.undo()
    assert json.loads((train(config) / "result.json").read_text())["steps"] == 6
    injected("bad steps without end", 9)


def test_two_writers(config):
    run = find_run(config)
    run.mkdir(parents=True)
    with (
        runs.only_writer(run),
        pytest.raises(TrainingStopped, match=f"process {os.getpid()} is writing"),
    ):
        train(config)
    assert train(config) == run
    injected("second writer")


# ------------------------------------------------------------------ checkpoints


def test_damaged_checkpoints(tmp_path):
    rng = random.Random(4)
    for k in range(30):
        run = tmp_path / str(k)
        old, new = (
            save_state(run, step, {"step": step, "weights": torch.randn(500)}) for step in (3, 6)
        )

        def damage(path):
            content = bytearray(path.read_bytes())
            if rng.random() < 0.5:
                content = content[: rng.randrange(len(content))]
            else:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)

        damage(new)
        if k < 24:
            with pytest.warns(UserWarning, match="damaged"):
                assert load_state(run)["step"] == 3
        else:
            damage(old)
            with (
                pytest.raises(CheckpointError, match="no whole checkpoint"),
                pytest.warns(UserWarning),
            ):
                load_state(run)
        injected("damaged checkpoint")


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(config, whole):
    run = train(config)
    (run / "result.json").unlink()
    newest = sorted((run / "last").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert train(config) == run
    assert same(whole, outcome(run))
    injected("damaged checkpoint")


# ------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 32 MB; where none can be mounted, None: then a full disk is simulated by the error that it gives."
    there = tmp_path / "disk"
    there.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(there)], capture_output=True
        ).returncode
        == 0
    )
    yield there if mounted else None
    if mounted:
        subprocess.run(["umount", str(there)], check=True)


def test_a_state_that_does_not_fit_leaves_the_one_before(small_disk, tmp_path, monkeypatch):
    run, rng = (small_disk or tmp_path) / "run", random.Random(7)
    save_state(run, 3, {"step": 3, "weights": torch.randn(500_000)})

    def full(*a):
        raise OSError(
            errno.ENOSPC,
            "No space left on device (simulated: no file system could be mounted here)",
        )

    if not small_disk:
        monkeypatch.setattr(runs, "atomic_write", full)
    for k in range(5):
        if small_disk:
            (small_disk / "ballast").write_bytes(
                bytes(os.statvfs(small_disk).f_bavail * 4096 - rng.randrange(2_000_000))
            )
        with pytest.raises(OSError, match="No space left"):
            save_state(run, 6, {"step": 6, "weights": torch.randn(500_000)})
        assert load_state(run)["step"] == 3 and [p.suffix for p in (run / "last").iterdir()] == [
            ".pt"
        ]
        if small_disk:
            (small_disk / "ballast").unlink()
        injected("full disk (tmpfs)" if small_disk else "full disk (simulated)")


def test_a_full_disk_stops_with_the_run_intact(config, whole, small_disk, tmp_path, monkeypatch):
    there = small_disk or tmp_path / "simulated"
    full = dataclasses.replace(config, runs_dir=str(there / "runs"))
    run, ballast, ordinary, rng = (
        find_run(full),
        there / "ballast",
        runs.atomic_write,
        random.Random(5),
    )
    for k in range(4):
        if small_disk:
            free = os.statvfs(there).f_bavail * 4096
            ballast.write_bytes(bytes(max(0, free - rng.randrange(10_000, 15_000_000))))
        else:
            left = [rng.randrange(1, 6)]

            def write(*a):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(
                        errno.ENOSPC,
                        "No space left on device (simulated: no file system could be mounted here)",
                    )
                return ordinary(*a)

            monkeypatch.setattr(runs, "atomic_write", write)
        try:
            train(full)
        except TrainingStopped as e:
            assert "the disk is full" in str(e) and "Make room" in str(e)
        if run.exists() and list((run / "last").glob("step-*.pt")):
            assert load_state(run) is not None
        assert not (run / "best").exists() or {"config.json", "model.safetensors"} <= {
            p.name for p in (run / "best").iterdir()
        }
        ballast.unlink(missing_ok=True)
        monkeypatch.undo()
        if not (run / "result.json").exists():
            injected("full disk (tmpfs)" if small_disk else "full disk (simulated)")
    assert same(whole, outcome(train(full)))


# ------------------------------------------------------------------ processes that die


def holds(run, pid):
    "Whether the process `pid` is the one that writes the run."
    try:
        return json.loads((run / "writer.json").read_text())["pid"] == pid
    except (OSError, ValueError):
        return False


def end_after(context, config, how=None, seconds=0.0):
    "Train in a process of its own that gets `how` (None: nothing) `seconds` after it has taken the run, if it still lives then. Returns its exit code and how long it held the run."
    child, run = context.Process(target=train, args=(config,)), find_run(config)
    child.start()
    while child.is_alive() and not holds(run, child.pid):
        time.sleep(0.005)
    taken = time.monotonic()
    child.join(seconds if how else 120)
    if how == signal.SIGKILL:
        child.kill()  # of a child that has ended, these do nothing
    elif how == signal.SIGTERM:
        child.terminate()
    child.join(120)
    assert child.exitcode is not None, "neither ended nor died within two minutes"
    return child.exitcode, time.monotonic() - taken


def test_processes_that_are_killed_end_in_the_same_weights(config, whole, tmp_path):
    context, rng = multiprocessing.get_context("forkserver"), random.Random(6)
    context.set_forkserver_preload(["deimv2_tfg.training"])
    untouched = dataclasses.replace(config, runs_dir=str(tmp_path / "untouched"))
    code, length = end_after(context, untouched)
    assert code == 0 and same(whole, outcome(find_run(untouched)))
    for how, deaths in ((signal.SIGKILL, 8), (signal.SIGTERM, 5)):
        died, begun = 0, 0
        while (
            died < deaths
        ):  # a run that was over before its turn to die is a whole run and no fault; another is begun
            assert begun < 25, f"{begun} runs, {died} deaths: they are over before the signal comes"
            cut = dataclasses.replace(config, runs_dir=str(tmp_path / f"{how.name}{begun}"))
            run, begun = find_run(cut), begun + 1
            while died < deaths and not (run / "result.json").exists():
                code, held = end_after(context, cut, how, rng.uniform(0, 0.9) * length)
                if (run / "result.json").exists():
                    length = min(length, held)
                    continue
                assert code in (
                    (-how,) if how == signal.SIGKILL else (128 + how, -how)
                )  # -SIGTERM: before it listened
                died += 1
                injected(how.name)
                logged = (
                    [
                        json.loads(l)
                        for l in (run / "metrics.jsonl").read_text().splitlines()
                        if l.endswith("}")
                    ]
                    if (run / "metrics.jsonl").exists()
                    else []
                )
                epochs = max((l["epoch"] for l in logged if l["split"] == "train"), default=0)
                state = load_state(run)
                assert (
                    state["counters"]["epoch"] if state else 0
                ) >= epochs - 1  # the epoch that it was in, no more
            assert same(whole, outcome(train(cut)))


def test_a_hundred_faults(capsys):
    if len(COUNT) < 5:
        pytest.skip("the faults of this file were not injected in this run")
    with capsys.disabled():
        print(
            f"\n{sum(COUNT.values())} injected faults: {', '.join(f'{n} {kind}' for kind, n in COUNT.items())}"
        )
    assert sum(COUNT.values()) >= 100
    assert (
        sum(n for kind, n in COUNT.items() if "disk" not in kind and "SIG" not in kind) >= 100
    )  # those that no speed of the machine takes away
