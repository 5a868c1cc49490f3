"""The trainer: a run is found again, resumes as if nothing had happened, takes no bad step."""

import contextlib
import dataclasses
import errno
import itertools
import math
import re
import signal
import threading
import time
from types import SimpleNamespace

import accelerate
import pytest
import torch

from deimv2_tfg import optim, step, training
from deimv2_tfg import trainer as trainers
from deimv2_tfg.baselines import FASTER_RCNN
from deimv2_tfg.batches import augmented, epoch_batches
from deimv2_tfg.data import DatasetError, load_dataset
from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.evaluation import evaluate
from deimv2_tfg.guard import is_incident, random_state, set_random_state, stop_requests
from deimv2_tfg.journal import end_table
from deimv2_tfg.optim import Ema, parameter_groups, pick_precision
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Log, Run, TrainingStopped, load_state, save_state
from deimv2_tfg.step import count_boxes, shares_of, training_step
from deimv2_tfg.training import DEIMV2, find_run, train
from deimv2_tfg.transforms import normalised


@pytest.fixture
def config(smoke_data, tmp_path):
    small = {"model": "tiny", "image_size": 64, "epochs": 2, "batch_size": 4, "lr": 1e-3}
    return TrainConfig(str(smoke_data), str(tmp_path), **small)


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------ a run


def test_a_run_holds_what_is_promised_and_is_found_again(config):
    run = Run(train(config))
    promised = {"config.json", "env.json", "data.json", "metrics.jsonl", "result.json"}
    promised |= {"tensorboard", "predictions_val.json", "best", "last"}
    assert promised <= {p.name for p in run.path.iterdir()}
    lines = run.metrics()
    told = list(zip(lines["split"], lines["epoch"], strict=True))
    assert told == [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    made_with = {"commit", "dirty", "versions", "device", "seed", "data_hash", "code_hash"}
    assert made_with <= run.environment.keys()
    before = (run.path / "result.json").read_bytes()
    assert train(config) == run.path
    assert (run.path / "result.json").read_bytes() == before
    metrics = evaluate(run.path, config.data_dir, "test")
    assert run.scores("test")["AP50"] == metrics["AP50"]


def test_another_question_is_another_run(config):
    assert find_run(config) == find_run(dataclasses.replace(config, num_workers=2))
    assert find_run(config) != find_run(dataclasses.replace(config, lr=2e-3))


def test_a_run_knows_its_data_wherever_it_is_read(config, smoke_data, monkeypatch):
    monkeypatch.chdir(smoke_data.parent)
    relative = dataclasses.replace(config, data_dir=smoke_data.name, epochs=1)
    run = Run(train(relative))
    assert run.path == find_run(dataclasses.replace(config, epochs=1))
    monkeypatch.chdir("/")
    assert run.data_dir == smoke_data and run.annotations("val")["images"]


def test_a_run_that_was_cut_off_ends_in_the_same_weights(config, tmp_path, monkeypatch):
    whole = load_state(train(config))
    cut = dataclasses.replace(config, runs_dir=str(tmp_path / "cut"))
    ordinary = training.train_epoch

    def power_failure(trainer, stop):
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        return ordinary(trainer, stop)

    monkeypatch.setattr(training, "train_epoch", power_failure)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(training, "train_epoch", ordinary)
    torch.manual_seed(12345)
    resumed = load_state(train(cut))
    assert same_tensors(whole["model"], resumed["model"])
    assert same_tensors(whole["ema"], resumed["ema"])


def test_a_snapshot_is_of_its_moment_and_written_meanwhile(config, tmp_path, monkeypatch):
    free = threading.Event()

    def when_free(*state):
        assert free.wait(60)
        return save_state(*state)

    monkeypatch.setattr(trainers, "save_state", when_free)
    trainer = training.Trainer(config, tmp_path)
    kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    training.snapshot(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    assert load_state(trainer.run) is None
    free.set()
    assert training.restore(trainer) and same_tensors(kept, trainer.model.state_dict())


def test_an_exception_waits_for_the_snapshot(config, monkeypatch):
    def slowly(*state):
        time.sleep(0.5)
        return save_state(*state)

    def fails(trainer, *batch):
        if trainer.step == 3:
            raise RuntimeError("a fault of step 4")
        ordinary(trainer, *batch)

    ordinary = training.train_batch
    monkeypatch.setattr(trainers, "save_state", slowly)
    monkeypatch.setattr(training, "train_batch", fails)
    with pytest.raises(RuntimeError, match="a fault of step 4"):
        train(config)
    assert load_state(find_run(config))["counters"]["epoch"] == 1


def test_what_fails_in_the_writing_is_raised_in_the_training(config, monkeypatch):
    def second_fails(run, step, state):
        if step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_state(run, step, state)

    monkeypatch.setattr(trainers, "save_state", second_fails)
    with pytest.raises(TrainingStopped, match="the disk is full.*step-00000000"):
        train(config)
    assert not Run(find_run(config)).finished


def test_a_bad_data_dir_stops_before_anything_is_written(config, tmp_path):
    with pytest.raises(DatasetError, match="Expected layout"):
        train(dataclasses.replace(config, data_dir=str(tmp_path / "nowhere")))
    assert not any(tmp_path.iterdir())


def test_a_network_of_another_family_stops_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match="allowed for detector"):
        train(dataclasses.replace(config, model="resnet18"))
    assert not any(tmp_path.iterdir())


def test_a_rate_that_never_falls_trains_to_the_end(config):
    run = Run(train(dataclasses.replace(config, flat=1.0, warmup=0.0)))
    rates = run.metrics("train")["train/lr"]
    assert run.finished and rates.nunique() == 1


def test_few_groups_and_no_decay_on_vectors(config):
    model = build_detector(DetectorConfig.tiny(num_classes=6))
    groups = parameter_groups(model, dataclasses.replace(config, backbone_lr=0.05))
    assert len(groups) <= 4
    assert len({g["lr"] for g in groups}) == 2
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_a_batch_in_parts_takes_as_many_steps(config):
    run = Run(train(dataclasses.replace(config, micro_batch=2, epochs=1)))
    assert run.result["steps"] == 3
    assert load_state(run)["counters"]["micro"] == 2


def test_training_ends_when_nothing_gets_better(config):
    run = Run(train(dataclasses.replace(config, patience=1, epochs=6)))
    assert run.result["epochs"] < 6
    assert load_state(run)["counters"]["since_best"] == 1


def test_all_augmentation_at_once_with_recomputed_activations(config):
    mixing = {"mosaic": 0.5, "mixup": 0.5, "copy_blend": 0.5, "quarter_turns": 0.5}
    other = {"multi_scale": 0.5, "checkpointing": True, "micro_batch": -1}
    run = Run(train(dataclasses.replace(config, **mixing, **other)))
    trained = run.metrics("train")
    assert (trained["train/skipped"] == 0).all()
    assert (trained["train/grad_norm/max"] >= trained["train/grad_norm/q50"]).all()
    assert (trained["train/grad_norm/q50"] > 0).all()
    assert len(run.predictions("val")) > 0


# ------------------------------------------------------------------ a batch in parts


def gradient_of(model, losses, parts, size):
    "Gradient and losses of a step that moves nothing."
    step = training_step(
        model,
        losses,
        parts,
        torch.optim.SGD(model.parameters(), 0.0),
        Ema(model, 10),
        accelerate.Accelerator(cpu=True),
        0,
        0,
        size,
    )
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients), step.losses


@pytest.mark.parametrize("family", [DEIMV2, FASTER_RCNN], ids=lambda family: family.name)
def test_a_batch_in_parts_has_the_gradient_of_the_batch(family):
    "Of what the family's own count divides; parts of one and three photographs of unlike boxes."
    size = family.size
    targets = [{"labels": torch.zeros(n), "image_id": n} for n in (1, 7, 2, 3)]
    x = torch.rand(4, 3, 8, 8)
    model = torch.nn.Linear(3, 2)

    def toy(model, x, targets, epoch):
        total = 0
        for photograph, t in zip(x, targets, strict=True):
            output = model(photograph.mean((1, 2)))
            total = total + (output**2).sum() * max(1, len(t["labels"]))
        return {"toy": total / size(targets)}

    parts = [(x[:1], targets[:1]), (x[1:], targets[1:])]
    whole, _ = gradient_of(model, toy, [(x, targets)], size)
    parted, _ = gradient_of(model, toy, parts, size)
    torch.testing.assert_close(parted, whole)
    by_family = {"detector": [1 / 13, 12 / 13], "faster_rcnn": [1 / 4, 3 / 4]}
    assert shares_of(parts, size) == by_family[family.name]
    assert shares_of(parts[:1], size) == [1.0]
    plain_mean, _ = gradient_of(model, toy, parts, lambda targets: 1)
    assert not torch.allclose(plain_mean, whole)


def test_class_terms_of_a_detector_in_parts(smoke_data):
    config = TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=6)
    view = augmented(load_dataset(config.data_dir, "train"), config)
    x, targets = next(iter(epoch_batches(view, config, 0)))
    x = normalised(x)
    assert len({len(t["labels"]) for t in targets}) > 1
    model = DEIMV2.build(config, 6).train()
    losses = DEIMV2.losses(config, 6)
    model.config.num_denoising = 0
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()

    def class_terms(*args):
        return {k: v for k, v in losses(*args).items() if "mal" in k}

    def gradient(cuts):
        parts = [(x[a:b], targets[a:b]) for a, b in itertools.pairwise(cuts)]
        return gradient_of(model, class_terms, parts, count_boxes)

    whole, terms = gradient([0, 6])
    parted, same = gradient([0, 1, 3, 6])
    assert (whole - parted).norm() < 1e-4 * whole.norm()
    for name, value in terms.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ what a person reads


@pytest.fixture
def told(monkeypatch, capsys):
    "What is said on standard error, a line each."
    monkeypatch.delenv("IN_TEST")
    monkeypatch.setattr(trainers, "fastest_precision", lambda *configured: "no")
    return lambda: [
        line for line in capsys.readouterr().err.splitlines() if "epoch" in line or ":" in line
    ]


def test_an_epoch_is_a_line_and_the_end_a_table(config, told):
    run = Run(train(config))
    first, *lines = told()
    assert "2 epochs of 3 steps" in first and run.name in first
    epochs = [line for line in lines if re.match(r"epoch \d/2  loss \d+\.\d\d  AP 0\.\d{3}", line)]
    assert len(epochs) == 2
    assert "images/s" in epochs[0] and " left  " in epochs[0]
    assert all(line.endswith(run.name) for line in epochs)
    last = run.metrics("val").iloc[-1]
    assert f"AP50 {last['val/AP50']:.3f}" in epochs[1]
    (end,) = [line for line in lines if line.startswith("2 epochs, 24 images")]
    assert run.name in end
    assert train(config) == run.path
    (again,) = told()
    assert again.startswith(f"already trained, AP {run.result['best_val_AP']:.3f}")


def test_the_table_at_the_end_is_of_the_weights_that_were_kept(tmp_path):
    log = Log(tmp_path, 0)
    for epoch, ap in ((1, 0.5), (2, 0.25)):
        scores = {"val/AP": ap, "val/AP50": ap + 0.25, "val/AP/bolt": ap, "val/AP50/bolt": 1.0}
        log("val", epoch, epoch, scores)
    table = end_table(tmp_path).set_index("class")
    assert table.loc["all"].tolist() == [0.5, 0.75] and table.loc["bolt"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_is_told(config, told, monkeypatch, number):
    ordinary = training.train_batch

    def interrupted(trainer, *batch):
        ordinary(trainer, *batch)
        if trainer.step == 4:
            signal.raise_signal(number)

    monkeypatch.setattr(training, "train_batch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + number
    assert "stopped at epoch 2, step 4; saved" in told()[-1]
    run = Run(train(config))
    assert f"resuming at epoch 2, step 4: {run.path}" in told()
    assert run.result["steps"] == 6


def test_a_second_ctrl_c_does_not_wait():
    with stop_requests() as stop, pytest.raises(KeyboardInterrupt):
        assert stop() == 0
        signal.raise_signal(signal.SIGINT)
        assert stop() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_a_name_and_a_device_change_no_run(config):
    named = dataclasses.replace(config, name="first try", device="cpu", epochs=1)
    assert find_run(named) == find_run(dataclasses.replace(config, epochs=1))
    assert Run(train(named)).config["name"] == "first try"
    with pytest.raises(ValueError, match="allowed: one of cpu, mps, cuda"):
        dataclasses.replace(config, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no such device"):
            train(dataclasses.replace(config, device="cuda:1"))


# ------------------------------------------------------------------ precision


def test_the_faster_precision_is_measured_once_and_remembered(config, tmp_path, monkeypatch):
    monkeypatch.delenv("IN_TEST")
    monkeypatch.setenv("DEIMV2_TFG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    asked = []

    def measured(config, family):
        asked.append(config.model)
        return {"tiny": {"no": 1.0, "bf16": 0.8}, "small": {"no": 1.0, "bf16": 0.95}}[config.model]

    monkeypatch.setattr(trainers, "measured_precisions", measured)
    on_cpu = dataclasses.replace(config, device="cpu")
    assert [trainers.fastest_precision(on_cpu, DEIMV2) for _ in range(2)] == ["bf16", "bf16"]
    small = dataclasses.replace(on_cpu, model="small")
    assert trainers.fastest_precision(small, DEIMV2) == "no"
    given = dataclasses.replace(on_cpu, precision="no")
    assert trainers.fastest_precision(given, DEIMV2) == "no" and asked == ["tiny", "small"]
    monkeypatch.setenv("IN_TEST", "1")
    assert trainers.fastest_precision(on_cpu, DEIMV2) == "no"


def test_a_resumed_run_keeps_its_precision_and_attends_in_float32(config, monkeypatch):
    first = Run(train(dataclasses.replace(config, precision="bf16", epochs=1)))
    assert first.environment["precision"] == "bf16"
    again = training.Trainer(dataclasses.replace(config, epochs=1), first)
    assert again.precision == again.accelerator.mixed_precision == "bf16"
    attentions = [
        m.config._attn_implementation for m in again.model.modules() if hasattr(m, "config")
    ]
    assert set(attentions) == {"sdpa_float32"}
    kept = [m.config._attn_implementation for m in again.ema.modules() if hasattr(m, "config")]
    assert set(kept) == {"sdpa"}


@pytest.mark.parametrize(
    "capability, expected", [((7, 5), "fp16"), ((8, 6), "bf16"), ((6, 1), "no")]
)
def test_precision_by_generation_of_the_card(config, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision(config) == expected
    assert pick_precision(dataclasses.replace(config, device="cpu")) == "no"


def test_what_a_card_is_asked_for_and_how_processes_share(config, monkeypatch):
    "TF32; buffers are broadcast only where batch norms are not synchronised, as they are on cards."
    made, asked = [], []
    monkeypatch.setattr(optim, "Accelerator", lambda **given: made.append(given))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        optim.start_accelerator(config, "no")
    torch.backends.cudnn.benchmark = False
    shared = [given["kwargs_handlers"][0] for given in made]
    assert [how.broadcast_buffers for how in shared] == [True, False]
    assert all(how.find_unused_parameters for how in shared) and asked == ["high"]


def test_evaluation_on_a_card_runs_under_autocast(config, monkeypatch):
    done = []
    monkeypatch.setattr(training, "predict", lambda *given, device: done.append("predict"))

    @contextlib.contextmanager
    def autocast():
        done.append("begin")
        yield
        done.append("end")

    for device, expected in (("cuda", ["begin", "predict", "end"]), ("cpu", ["predict"])):
        done.clear()
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(
                device=torch.device(device), num_processes=1, process_index=0, autocast=autocast
            ),
            ema=SimpleNamespace(module=torch.nn.Identity()),
            val_set=None,
            config=config,
        )
        training.predict_val(trainer)
        assert done == expected


def test_a_first_step_in_fp16_that_is_refused_lowers_the_scale():
    scaler = torch.amp.GradScaler("cpu")
    step._lower_scale(scaler, "cpu")
    assert scaler.get_scale() == 2**15
    accelerator = SimpleNamespace(scaler=scaler)
    overflow = step.Step({}, torch.tensor(math.nan), "overflow")
    assert not is_incident(overflow, accelerator)  # the scale is still sought
    assert is_incident(dataclasses.replace(overflow, failure="loss"), accelerator)
    for _ in range(9):
        step._lower_scale(scaler, "cpu")
    assert is_incident(overflow, accelerator)


def test_random_numbers_of_more_cards_than_are_here(monkeypatch):
    state = random_state() | {"cuda": ["first", "second"]}
    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *numbers: given.append(numbers))
    set_random_state(state)
    assert given == [("first", 0)]
