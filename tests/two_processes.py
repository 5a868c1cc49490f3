"""What a training step, an evaluation and a run come to with any number of processes.

`torchrun --nproc-per-node 2 two_processes.py DATA OUT`; with one process `main(data, out)`.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object

from deimv2_tfg import criterion, training
from deimv2_tfg import trainer as trainers
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import Run
from deimv2_tfg.step import training_step
from deimv2_tfg.training import DEIMV2, Trainer, in_parts, set_rate, train, validate

SMALL = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4, "lr": 1e-3}
PLAIN = {"photometric": 0, "iou_crop": 0, "warmup": 0}


def without_noise(config, num_classes):
    model = DEIMV2.build(config, num_classes)
    model.config.num_denoising = 0
    return model


def quiet_trainer(config, where):
    """A trainer whose steps draw no random numbers and see no batch statistics."""
    where.mkdir(exist_ok=True, parents=True)
    family = dataclasses.replace(DEIMV2, name="quiet", build=without_noise)
    trainer = Trainer(config, where, family)
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return trainer


def main(data, out):
    with pytest.MonkeyPatch.context() as patch:
        measured(data, Path(out), patch)


def measured(data, out, patch):
    config = TrainConfig(str(data), str(out / "runs"), **SMALL, **PLAIN)
    trainer = quiet_trainer(config, out / "quiet")
    rank, n = trainer.accelerator.process_index, trainer.accelerator.num_processes
    last = rank == n - 1
    patch.setattr(trainers, "_counted_part", lambda trainer, batch: 1 if last else batch)
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
    patch.setattr(criterion, "fetch", lambda tensors: fetched.append(1) or fetch(tensors))
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

    patch.setattr(training, "training_step", second_is_bad)
    run = Run(train(config))
    done = {"agreed": gather_object([(largest, transfers)]), "processes": n}
    if rank == 0:
        done |= {"failures": [poisoned.failure, after.failure], "AP": metrics["val/AP"]}
        done |= {"run": str(run.path), "incidents": run.incidents().to_dict("records")}
        (out / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
