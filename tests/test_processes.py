"""Two processes of `accelerate launch` against one: the same batch, the same step, one record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deimv2_tfg.runs import Run

SCRIPT = """
import dataclasses, json, math, sys
from pathlib import Path

import torch

from accelerate.utils import gather_object

from deimv2_tfg import criterion, trainer as trainers, training
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Run
from deimv2_tfg.step import training_step
from deimv2_tfg.training import DEIMV2, Trainer, in_parts, set_rate, train, validate

data, out = sys.argv[1], Path(sys.argv[2])
config = TrainConfig(
    data, str(out / "runs"), model="tiny", image_size=64, epochs=1, batch_size=4, lr=1e-3,
    photometric=0, iou_crop=0, warmup=0,
)


def without_noise(config, num_classes):
    model = DEIMV2.build(config, num_classes)
    model.config.num_denoising = 0
    return model


family = dataclasses.replace(DEIMV2, name="quiet", build=without_noise)
(out / "quiet").mkdir(exist_ok=True, parents=True)
trainer = Trainer(config, out / "quiet", family)
rank, n = trainer.accelerator.process_index, trainer.accelerator.num_processes
last = rank == n - 1
trainer.model.train()
for m in trainer.model.modules():
    if isinstance(m, torch.nn.BatchNorm2d):
        m.eval()
trainers._counted_part = lambda trainer, batch: 1 if last else batch
largest = trainers.fit_micro_batch(trainer, lambda n: None)
trainer.micro = 0
parts = in_parts(trainer, *next(iter(trainer.batches.of(0))))
set_rate(trainer)


def step_on(parts, losses=trainer.compute_losses):
    held = (trainer.optimizer, trainer.ema, trainer.accelerator)
    return training_step(trainer.model, losses, parts, *held, config.clip, 0)


def spoilt(*args):
    "Terms that only the last process finds not finite."
    return {k: v * (math.nan if last else 1) for k, v in trainer.compute_losses(*args).items()}


fetched, fetch = [], criterion.fetch
criterion.fetch = lambda tensors: fetched.append(1) or fetch(tensors)
step = step_on(parts)
losses = {}
for name, value in step.losses.items():
    losses[name] = trainer.accelerator.reduce(value.clone().float(), "mean").item()
plain = trainer.accelerator.unwrap_model(trainer.model)
if rank == 0:
    grads = {k: p.grad for k, p in plain.named_parameters() if p.grad is not None}
    found = {"losses": losses, "norm": step.grad_norm, "grads": grads}
    found |= {"weights": plain.state_dict(), "lr": trainer.rates[0]}
    torch.save(found, out / "step.pt")
transfers = len(fetched)
metrics = validate(trainer)
poisoned = step_on([(x * (math.nan if last else 1), t) for x, t in parts])
after = step_on(parts, spoilt)
ordinary, calls = training.training_step, []


def second_is_bad(model, losses, parts, *rest):
    calls.append(1)
    if len(calls) == 2 and last:
        parts[0][0][0, 0, 0, 0] = math.nan
    return ordinary(model, losses, parts, *rest)


training.training_step = second_is_bad
run = Run(train(config))
agreed = gather_object([(largest, transfers)])
if rank == 0:
    done = {"agreed": agreed}
    done |= {"processes": n, "failures": [poisoned.failure, after.failure], "AP": metrics["val/AP"]}
    done |= {"run": str(run.path), "incidents": run.incidents().to_dict("records")}
    (out / "done.json").write_text(json.dumps(done))
"""


def command(processes, *arguments):
    "With --cpu it starts several only by mpirun: its launcher for GPUs does, kept on the CPU."
    if processes == 1:
        return [sys.executable, *arguments]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launch, *arguments]


def start(processes, where, data):
    (where / "script.py").write_text(SCRIPT)
    cpu = {"OMP_NUM_THREADS": "1", "IN_TEST": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command(processes, str(where / "script.py"), str(data), str(where)),
        env=os.environ | cpu,
        cwd=where,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    about = json.loads((where / "done.json").read_text())
    return where, about, torch.load(where / "step.pt")


@pytest.fixture(scope="module")
def both(smoke_data, tmp_path_factory):
    "What the script leaves with one and with two processes."
    folders = [tmp_path_factory.mktemp(f"processes{n}") for n in (1, 2)]
    return [start(n, folder, smoke_data) for n, folder in zip((1, 2), folders, strict=True)]


def test_a_step_of_two_processes_is_the_step_of_one(both):
    (_, one_done, one), (_, two_done, two) = both
    assert (one_done["processes"], two_done["processes"]) == (1, 2)
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-4), name
    assert two["norm"].item() == pytest.approx(one["norm"].item(), rel=1e-4)
    for name, grad in one["grads"].items():
        torch.testing.assert_close(two["grads"][name], grad, rtol=1e-3, atol=1e-7, msg=name)
        # AdamW's first step is the gradient's sign: only where that is more than rounding
        clear = grad.abs() > 1e-6
        weights, others = one["weights"][name][clear], two["weights"][name][clear]
        near = 0.02 * one["lr"]
        torch.testing.assert_close(others, weights, rtol=1e-4, atol=near, msg=name)


def test_evaluation_has_every_photograph_once(both):
    found = []
    for where, _, _ in both:
        results = Run(where / "quiet").predictions("val")
        found.append([r["image_id"] for r in results])
        boxes = {(r["image_id"], r["category_id"], *r["bbox"], r["score"]) for r in results}
        assert len(boxes) > 0.9 * len(results) > 0
    assert found[0] == found[1]
    assert len(set(found[0])) == 6
    assert both[0][1]["AP"] == pytest.approx(both[1][1]["AP"], abs=1e-3)


def test_what_one_process_sees_both_skip(both):
    seen = []
    for _, done, _ in both:
        assert done["failures"] == ["loss", "loss"]
        (incident,) = done["incidents"]
        assert incident["step"] == 1 and incident["origin"] == "input"
        assert len(incident["bad_images"]) == 1
        assert len(incident["image_ids"]) == 4
        seen.append(set(incident["image_ids"]))
    assert seen[0] == seen[1]


def test_the_smaller_part_wins_everywhere_and_a_step_has_one_transfer(both):
    "Of a batch of four the second process could take one at a time, the first its whole half."
    assert [done["agreed"] for _, done, _ in both] == [[[4, 1]], [[1, 1], [1, 1]]]


def test_a_whole_run_of_two_processes(both):
    for _, done, _ in both:
        run = Run(Path(done["run"]))
        assert run.result["steps"] == 3
        assert {"best", "last"} <= {p.name for p in run.path.iterdir()}
        assert len(run.metrics()) == 2
