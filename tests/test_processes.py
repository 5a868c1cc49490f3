"""Two processes, started by `accelerate launch`, against one on the same global batch: normalisers, gradients, weights, evaluation; and a fault that only one of them sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import dataclasses, json, math, sys
from pathlib import Path
import torch
from deimv2_tfg import training
from deimv2_tfg.runs import Run
from deimv2_tfg.training import DEIMV2, Trainer, in_parts, set_rate, train, training_step, validate
from deimv2_tfg.batches import epoch_batches
from deimv2_tfg.recipes import TrainConfig

data, out = sys.argv[1], Path(sys.argv[2])
config = TrainConfig(data, str(out / "runs"), model="tiny", image_size=64, epochs=1, batch_size=4, lr=1e-3, photometric=0, iou_crop=0, warmup=0)

def without_noise(config, num_classes):
    model = DEIMV2.build(config, num_classes)
    model.config.num_denoising = 0
    return model

family = dataclasses.replace(DEIMV2, name="quiet", build=without_noise)
(out / "quiet").mkdir(exist_ok=True, parents=True)
trainer = Trainer(config, out / "quiet", family)
rank, n = trainer.accelerator.process_index, trainer.accelerator.num_processes
images, targets = next(iter(epoch_batches(trainer.view, config, 0, 0, rank, n)))
trainer.model.train()
for m in trainer.model.modules():
    if isinstance(m, torch.nn.BatchNorm2d): m.eval()
set_rate(trainer)
parts = in_parts(trainer, images, targets)
step = training_step(trainer.model, trainer.compute_losses, parts, trainer.optimizer, trainer.ema, trainer.accelerator, config.clip, 0)
plain = trainer.accelerator.unwrap_model(trainer.model)
mean = lambda v: trainer.accelerator.reduce(v.clone().float(), "mean").item()
losses = {k: mean(v) for k, v in step.losses.items()}
if rank == 0: torch.save({"losses": losses, "norm": step.grad_norm, "grads": {k: p.grad for k, p in plain.named_parameters() if p.grad is not None}, "weights": plain.state_dict(), "lr": trainer.rates[0]}, out / "step.pt")
metrics = validate(trainer)
poisoned = training_step(trainer.model, trainer.compute_losses, [(x * (math.nan if rank == n - 1 else 1), t) for x, t in parts], trainer.optimizer, trainer.ema, trainer.accelerator, config.clip, 0)
ordinary = trainer.compute_losses
late = lambda *a: {k: v * (math.nan if rank == n - 1 else 1) for k, v in ordinary(*a).items()}
after = training_step(trainer.model, late, parts, trainer.optimizer, trainer.ema, trainer.accelerator, config.clip, 0)
ordinary_step, calls = training.training_step, []
def second_is_bad(model, losses, parts, *rest):
    calls.append(1)
    if len(calls) == 2 and rank == n - 1: parts[0][0][0, 0, 0, 0] = math.nan
    return ordinary_step(model, losses, parts, *rest)
training.training_step = second_is_bad
run = train(config)
if rank == 0: (out / "done.json").write_text(json.dumps({"processes": n, "poisoned": [poisoned.failure, after.failure], "AP": metrics["val/AP"], "run": str(run), "incident": Run(run).incidents().to_dict("records"), "result": json.loads((run / "result.json").read_text())}))
"""


@pytest.fixture(scope="module")
def both(smoke_data, tmp_path_factory):
    "What the script leaves with one and with two processes."
    where = tmp_path_factory.mktemp("processes")
    (where / "script.py").write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "IN_TEST": "1", "ACCELERATE_USE_CPU": "true"}
    for n in (1, 2):
        (where / str(n)).mkdir()
        # with --cpu it starts several processes only by mpirun; its launcher for GPUs starts them, and the variable above keeps them on the CPU
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(n),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        done = subprocess.run(
            [
                sys.executable,
                *(launch if n > 1 else ()),
                str(where / "script.py"),
                str(smoke_data),
                str(where / str(n)),
            ],
            env=env,
            cwd=where,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return [
        (
            where / str(n),
            json.loads((where / str(n) / "done.json").read_text()),
            torch.load(where / str(n) / "step.pt"),
        )
        for n in (1, 2)
    ]


def test_a_step_of_two_processes_is_the_step_of_one(both):
    (_, one_done, one), (_, two_done, two) = both
    assert (one_done["processes"], two_done["processes"]) == (1, 2)
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-4), name
    assert two["norm"].item() == pytest.approx(one["norm"].item(), rel=1e-4)
    for name, grad in one["grads"].items():
        torch.testing.assert_close(two["grads"][name], grad, rtol=1e-3, atol=1e-7, msg=name)
    for name, weight in one["weights"].items():
        if (
            name in one["grads"]
        ):  # AdamW's first step is the gradient's sign: only where that is more than rounding
            clear = one["grads"][name].abs() > 1e-6
            torch.testing.assert_close(
                two["weights"][name][clear],
                weight[clear],
                rtol=1e-4,
                atol=0.02 * one["lr"],
                msg=name,
            )


def test_evaluation_has_every_photograph_once(both):
    found = []
    for where, done, _ in both:
        results = (
            json.loads((where / "quiet" / "predictions_val.json").read_text())
            if (where / "quiet" / "predictions_val.json").exists()
            else []
        )
        found.append([r["image_id"] for r in results])
        assert (
            len({(r["image_id"], r["category_id"], *r["bbox"], r["score"]) for r in results})
            > 0.9 * len(results)
            > 0
        )
    assert found[0] == found[1] and len(set(found[0])) == 6
    assert both[0][1]["AP"] == pytest.approx(both[1][1]["AP"], abs=1e-3)


def test_what_one_process_sees_both_skip(both):
    for _, done, _ in both:
        assert done["poisoned"] == ["loss", "loss"]
        (incident,) = done["incident"]
        assert (
            incident["step"] == 1
            and incident["origin"] == "input"
            and len(incident["bad_images"]) == 1
            and len(incident["image_ids"]) == 4
        )
    assert {*both[0][1]["incident"][0]["image_ids"]} == {*both[1][1]["incident"][0]["image_ids"]}


def test_a_whole_run_of_two_processes(both):
    for where, done, _ in both:
        assert done["result"]["steps"] == 3 and {
            "best",
            "last",
            "metrics.jsonl",
            "result.json",
        } <= {p.name for p in Path(done["run"]).iterdir()}
        assert len((Path(done["run"]) / "metrics.jsonl").read_text().splitlines()) == 2
