"""More than a hundred injected faults, each with the outcome that the trainer promises."""

import dataclasses
import errno
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
import warnings

import pytest
import torch
from accelerate import Accelerator

from deimv2_tfg import runs, training
from deimv2_tfg.criterion import NonFiniteLossError
from deimv2_tfg.guard import diagnose, random_state, replay
from deimv2_tfg.optim import Ema, parameter_groups
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import CheckpointError, Run, TrainingStopped, load_state, save_state
from deimv2_tfg.step import training_step
from deimv2_tfg.training import DEIMV2, find_run, train

BAD = (math.nan, math.inf, -math.inf)
SMALL = {"model": "tiny", "image_size": 64, "epochs": 2, "batch_size": 4, "lr": 1e-3}


@pytest.fixture
def config(smoke_data, tmp_path):
    return TrainConfig(str(smoke_data), str(tmp_path / "runs"), **SMALL)


def same(a, b):
    "Bit for bit, whatever it is made of."
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(path):
    "All that a run ends in but the time it took."
    run = Run(path)
    state = load_state(run)
    del state["counters"]["seconds"]
    result = run.result
    del result["seconds"]
    clocks = ["train/images_per_second", "train/data_wait"]
    metrics = run.metrics().drop(columns=clocks).fillna(-1).to_dict("records")
    return state | {"result": result, "metrics": metrics}


@pytest.fixture(scope="module")
def whole_run(smoke_data, tmp_path_factory):
    "The run of `config` where nothing happens to it."
    runs_dir = str(tmp_path_factory.mktemp("whole"))
    return train(TrainConfig(str(smoke_data), runs_dir, **SMALL))


@pytest.fixture(scope="module")
def whole(whole_run):
    "What it ends in."
    return outcome(whole_run)


# ------------------------------------------------------------------ one step


class Bench:
    "A network in the middle of training, and one good batch."

    def __init__(self, config):
        torch.manual_seed(0)
        self.config = config
        self.accelerator = Accelerator(cpu=True)
        self.model = DEIMV2.build(config, 6).train()
        self.losses = DEIMV2.losses(config, 6)
        self.ema = Ema(self.model, 10)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config))
        self.images = torch.randn(2, 3, 64, 64)
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.1, 0.3]])
        self.targets = [
            {"labels": torch.tensor([0, 1]), "boxes": boxes, "image_id": 7},
            {"labels": torch.tensor([1, 2]), "boxes": boxes.clone(), "image_id": 8},
        ]
        assert not self.step().failure

    def parts(self, images=None):
        return [(self.images if images is None else images, self.targets)]

    def step(self, images=None, losses=None):
        return training_step(
            self.model,
            losses or self.losses,
            self.parts(images),
            self.optimizer,
            self.ema,
            self.accelerator,
            self.config.clip,
            0,
        )

    def state(self):
        moments = self.optimizer.state_dict()["state"].values()
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": [{k: torch.as_tensor(v) for k, v in m.items()} for m in moments],
        }
        return copied(state)

    def refuses(self, images=None, losses=None):
        "The step fails and changes nothing; returns it with its diagnosis."
        before = self.state()
        numbers = random_state()
        step = self.step(images, losses)
        assert step.failure and same(before, self.state())
        drawn = random_state()
        cause = diagnose(self.model, losses or self.losses, self.parts(images), 0, numbers)
        assert same(before, self.state()) and same(drawn, random_state())
        assert all(p.grad is None for p in self.model.parameters())
        return step, cause


def copied(state):
    if torch.is_tensor(state):
        return state.clone()
    if isinstance(state, dict):
        return {k: copied(v) for k, v in state.items()}
    return [copied(v) for v in state]


@pytest.fixture(scope="module")
def bench(smoke_data):
    """One for all: a step that is refused leaves it as it was."""
    return Bench(TrainConfig(str(smoke_data), **SMALL))


def test_a_term_that_is_not_finite(bench):
    "12 of the terms, one at a time."
    rng = random.Random(0)
    names = rng.sample(sorted(bench.step().losses), 12)
    for name in names:
        value = rng.choice(BAD)

        def spoilt(*args, name=name, value=value):
            found = bench.losses(*args)
            return found | {name: found[name] * value}

        step, cause = bench.refuses(losses=spoilt)
        assert step.failure == "loss"
        assert (cause["origin"], cause["term"]) == ("loss", name)
    assert not bench.step().failure


def test_a_criterion_that_refuses(bench):
    def refuse(*args):
        raise NonFiniteLossError(["layer_logits of layer 1"], [7, 8])

    step, cause = bench.refuses(losses=refuse)
    assert step.failure == "loss" and not step.losses
    assert cause["term"] == "layer_logits of layer 1"


def test_a_gradient_that_is_not_finite(bench):
    "Of 12 parameters, one at a time."
    rng = random.Random(1)
    used = []
    for name, p in bench.model.named_parameters():
        if p.requires_grad and "denoising" not in name:
            used.append((name, p))
    for name, p in rng.sample(used, 12):
        value = rng.choice(BAD)
        handle = p.register_hook(lambda g, value=value: torch.full_like(g, value))
        step, cause = bench.refuses()
        handle.remove()
        assert step.failure == "gradient" and cause["origin"] == "gradient"
        assert cause["term"] in step.losses
        assert cause["module"] == name.rpartition(".")[0]
    assert not bench.step().failure


def test_a_module_whose_output_is_not_finite(bench):
    "10 modules of the backbone, one at a time."
    rng = random.Random(2)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)
    modules = []
    for name, module in bench.model.named_modules():
        if isinstance(module, kinds) and "conv_encoder" in name:
            modules.append((name, module))
    for name, module in rng.sample(modules, 10):
        value = rng.choice(BAD)
        handle = module.register_forward_hook(lambda m, i, o, v=value: o + v, prepend=True)
        step, cause = bench.refuses()
        handle.remove()
        assert step.failure == "loss"
        assert (cause["origin"], cause["module"]) == ("forward", name)
    assert not bench.step().failure


def test_a_weight_that_is_not_finite_is_named(bench):
    weight = bench.model.model.decoder.layers[1].self_attn.q_proj.weight.detach()
    kept = weight[0, 0].item()
    weight[0, 0] = math.nan
    before = random_state()
    step = bench.step()
    cause = diagnose(bench.model, bench.losses, bench.parts(), 0, before)
    assert step.failure and cause["origin"] == "weights"
    assert cause["module"] == "model.decoder.layers.1.self_attn.q_proj"
    weight[0, 0] = kept


@pytest.mark.parametrize("which", [[0, 1], [0], [1]])
def test_photographs_that_are_not_finite(bench, which):
    "One pixel of each, by each of the numbers."
    rng = random.Random(3)
    for value in BAD:
        images = bench.images.clone()
        for i in which:
            images[i, rng.randrange(3), rng.randrange(64), rng.randrange(64)] = value
        _, cause = bench.refuses(images)
        assert cause["origin"] == "input"
        assert cause["images"] == [7 + i for i in which]
    assert not bench.step().failure


# ------------------------------------------------------------------ a run


def poison(monkeypatch, when):
    "Multiply the loss by NaN at the calls of `training_step` for which `when(number)`."
    ordinary = training.training_step
    calls = []

    def step(model, losses, *rest):
        def spoilt(*args):
            return {k: v * math.nan for k, v in losses(*args).items()}

        calls.append(1)
        return ordinary(model, spoilt if when(len(calls) - 1) else losses, *rest)

    monkeypatch.setattr(training, "training_step", step)


def test_single_bad_steps_are_skipped_and_recorded(config, monkeypatch):
    poison(monkeypatch, {1, 4, 5}.__contains__)
    run = Run(train(config))
    incidents = run.incidents()
    assert list(incidents["step"]) == [1, 4, 5]
    assert list(incidents["in_a_row"]) == [1, 1, 2]
    assert set(incidents["failure"]) == {"loss"}
    assert all(len(ids) == 4 for ids in incidents["image_ids"])
    result = run.result
    assert (result["incidents"], result["returns"], result["steps"]) == (3, 0, 6)
    trained = run.metrics("train")
    assert list(trained["train/skipped"]) == pytest.approx([1 / 3, 2 / 3])
    assert all(map(math.isfinite, trained["train/loss"]))
    assert replay(run, 0, DEIMV2)["origin"] == ""  # the fault was not in the batch


def test_several_in_a_row_roll_back_to_the_last_state_at_half_the_rate(config, monkeypatch):
    poison(monkeypatch, {3, 4, 5}.__contains__)
    with pytest.warns(UserWarning, match="back to step 3 at 0.5"):
        run = Run(train(config))
    result = run.result
    assert (result["incidents"], result["returns"], result["steps"]) == (3, 1, 6)
    assert load_state(run)["counters"]["slower"] == 0.5


def test_a_run_that_cannot_be_saved_stops_with_a_report(config, monkeypatch):
    config = dataclasses.replace(config, max_skips=1)  # by default three; see above
    poison(monkeypatch, lambda k: k >= 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(TrainingStopped, match="rollbacks to half the rate did not help"):
            train(config)
    run = Run(find_run(config))
    report = run.stopped
    assert (report["incidents"], report["returns"]) == (3, 2)
    assert report["first"]["failure"] == "loss" and not run.finished
    state = load_state(run)
    assert state["counters"]["epoch"] == 1
    floats = [v for v in state["model"].values() if v.is_floating_point()]
    assert all(torch.isfinite(v).all() for v in floats)
    with pytest.raises(TrainingStopped, match="stopped.json"):
        train(config)
    (run.path / "stopped.json").unlink()
    monkeypatch.undo()
    assert Run(train(config)).result["steps"] == 6


def test_two_writers(config):
    config = dataclasses.replace(config, epochs=1)
    run = find_run(config)
    with runs.only_writer(run):
        with pytest.raises(TrainingStopped, match=f"process {os.getpid()} is writing"):
            train(config)
    assert train(config) == run


# ------------------------------------------------------------------ checkpoints


def damage(path, rng):
    "Cut a file short, or flip one of its bits."
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content = content[:place]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def two_states(run):
    return [save_state(run, step, {"step": step, "w": torch.randn(500)}) for step in (3, 6)]


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, seed):
    _, newest = two_states(tmp_path)
    damage(newest, random.Random(seed))
    with pytest.warns(UserWarning, match="damaged"):
        assert load_state(tmp_path)["step"] == 3


@pytest.mark.parametrize("seed", range(6))
def test_damaged_checkpoints_alone_are_refused(tmp_path, seed):
    rng = random.Random(seed)
    for path in two_states(tmp_path):
        damage(path, rng)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_state(tmp_path)


def test_a_run_resumes_from_the_checkpoint_before_and_ends_the_same(config, whole_run, whole):
    run = find_run(config)
    shutil.copytree(whole_run, run)
    (run / "result.json").unlink()
    newest = sorted((run / "last").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert train(config) == run
    assert same(whole, outcome(run))


# ------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 32 MB; None where none can be mounted: then its error is simulated."
    there = tmp_path / "disk"
    there.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(there)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    yield there if mounted else None
    if mounted:
        subprocess.run(["umount", str(there)], check=True)


class FullAfter:
    "`atomic_write` of a disk that is full after so many files."

    def __init__(self, files):
        self.left = files
        self.write = runs.atomic_write

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device (simulated)")
        return self.write(*args)


def fill(disk, spare):
    free = os.statvfs(disk).f_bavail * 4096
    (disk / "ballast").write_bytes(bytes(max(0, free - spare)))


def test_a_state_that_does_not_fit_leaves_the_one_before(small_disk, tmp_path, monkeypatch):
    rng = random.Random(7)
    run = (small_disk or tmp_path) / "run"
    save_state(run, 3, {"step": 3, "weights": torch.randn(500_000)})
    if not small_disk:
        monkeypatch.setattr(runs, "atomic_write", FullAfter(0))
    for _ in range(5):
        if small_disk:
            fill(small_disk, rng.randrange(2_000_000))
        with pytest.raises(OSError, match="No space left"):
            save_state(run, 6, {"step": 6, "weights": torch.randn(500_000)})
        assert load_state(run)["step"] == 3
        assert [p.suffix for p in (run / "last").iterdir()] == [".pt"]
        if small_disk:
            (small_disk / "ballast").unlink()


def test_a_full_disk_stops_with_the_run_intact(config, whole, small_disk, tmp_path, monkeypatch):
    rng = random.Random(5)
    there = small_disk or tmp_path / "simulated"
    full = dataclasses.replace(config, runs_dir=str(there / "runs"))
    run = find_run(full)
    for _ in range(3):
        if small_disk:
            fill(there, rng.randrange(10_000, 15_000_000))
        else:
            monkeypatch.setattr(runs, "atomic_write", FullAfter(rng.randrange(1, 6)))
        try:
            train(full)
        except TrainingStopped as e:
            assert "the disk is full" in str(e) and "Make room" in str(e)
        if list((run / "last").glob("step-*.pt")):
            assert load_state(run) is not None
        if (run / "best").exists():
            assert {"config.json", "model.safetensors"} <= {
                p.name for p in (run / "best").iterdir()
            }
        (there / "ballast").unlink(missing_ok=True)
        monkeypatch.undo()
    assert same(whole, outcome(train(full)))


# ------------------------------------------------------------------ processes that die


def holds(run, pid):
    "Whether the process `pid` is the one that writes the run."
    try:
        return Run(run).read("writer.json")["pid"] == pid
    except (OSError, ValueError, KeyError):
        return False


def end_after(context, config, how=None, seconds=0.0):
    """Train in a process of its own that gets the signal `how` after `seconds` of holding the run.

    Returns its exit code and how long it held the run.
    """
    child = context.Process(target=train, args=(config,))
    run = find_run(config)
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


def loses_no_more_than_an_epoch(run):
    "Whether the state of a run that died is at most one epoch behind its log."
    logged = Run(run).metrics("train")
    epochs = logged["epoch"].max() if len(logged) else 0
    state = load_state(run)
    saved = state["counters"]["epoch"] if state else 0
    return saved >= epochs - 1


@pytest.fixture(scope="module")
def context():
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["deimv2_tfg.training", "torch.utils.tensorboard"])
    return forks


@pytest.fixture(scope="module")
def length(smoke_data, whole, tmp_path_factory, context):
    "Seconds that an untouched process holds its run, which is the whole one."
    runs_dir = str(tmp_path_factory.mktemp("untouched"))
    untouched = TrainConfig(str(smoke_data), runs_dir, **SMALL)
    code, length = end_after(context, untouched)
    assert code == 0 and same(whole, outcome(find_run(untouched)))
    return length


@pytest.mark.parametrize("how, deaths", [(signal.SIGKILL, 4), (signal.SIGTERM, 2)])
def test_processes_that_die_end_in_the_same_weights(
    config, whole, tmp_path, context, length, how, deaths
):
    """Each dies somewhere, is started again, dies again; the run that comes of it is the whole one.

    A run that was over before its turn to die is no fault; another is begun.
    """
    rng = random.Random(6)
    expected = {-how} if how == signal.SIGKILL else {128 + how, -how}  # -how: before it listened
    died = 0
    for begun in range(25):
        cut = dataclasses.replace(config, runs_dir=str(tmp_path / f"{how.name}{begun}"))
        run = find_run(cut)
        while died < deaths and not Run(run).finished:
            code, held = end_after(context, cut, how, rng.uniform(0, 0.9) * length)
            if Run(run).finished:
                length = min(length, held)
                continue
            assert code in expected
            assert loses_no_more_than_an_epoch(run)
            died += 1
        assert same(whole, outcome(train(cut)))
        if died == deaths:
            return
    pytest.fail(f"{died} deaths in 25 runs: they are over before the signal comes")
