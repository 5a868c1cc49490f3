"""Memory by count: against real steps on the CPU and the fake card; what is decided from it."""

import dataclasses
import functools
import types

import pytest
import torch
from fake_card import DEVICE, Accelerator, autocast, fake_card, real, to_card

from deimv2_tfg import trainer as trainers
from deimv2_tfg.baselines import FASTER_RCNN, Baseline
from deimv2_tfg.cost import (
    PARTS,
    SLACK,
    LiveMemory,
    StepMemory,
    card_table,
    counted_step,
    lacks_memory,
    largest_part,
    part_sizes,
    unmatched_losses,
)
from deimv2_tfg.criterion import Criterion
from deimv2_tfg.detector import DetectorConfig, anchor_logits, build_detector
from deimv2_tfg.optim import Ema
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.trainer import DEIMV2, Trainer, fit_micro_batch, measured_precisions

SIZE, BATCH = 96, 4
GIB = 2**30


def targets_of(batch) -> list[dict]:
    boxes = torch.linspace(0.2, 0.4, 16).reshape(4, 4)
    return [{"labels": torch.zeros(4, dtype=torch.int64), "boxes": boxes} for _ in range(batch)]


def real_step(dtype) -> int:
    "Most bytes alive in the second step of a real training on the CPU, by its tensors."
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.tiny())
    ema = Ema(model, 10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    criterion = Criterion(6)
    pixel_values = torch.randn(BATCH, 3, SIZE, SIZE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = model(pixel_values, targets=targets_of(BATCH))
        sum(criterion(outputs, targets_of(BATCH)).values()).backward()
        optimizer.step()
        ema.update_parameters(model)

    step()
    optimizer.zero_grad(set_to_none=True)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    held = [*model.state_dict().values(), *ema.state_dict().values(), *moments, pixel_values]
    with LiveMemory(held) as live:
        step()
    return live.peak


@functools.lru_cache
def counted(dtype) -> int:
    return counted_step(DetectorConfig.tiny(), SIZE, BATCH, dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_count_is_within_15_percent_of_a_real_step(dtype):
    assert counted(dtype) == pytest.approx(real_step(dtype), rel=0.15)


def test_the_count_is_within_15_percent_of_a_step_on_the_fake_card(monkeypatch):
    expected = counted(torch.bfloat16)
    anchor_logits.cache_clear()
    with fake_card(monkeypatch) as card:
        model = to_card(real(build_detector, DetectorConfig.tiny()))
        others = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
        with LiveMemory([*model.parameters(), *model.buffers(), *others]) as live:
            pixel_values = torch.empty(BATCH, 3, SIZE, SIZE, device=DEVICE)
            moved = {"device": DEVICE}
            labels = torch.zeros(4, dtype=torch.int64, **moved)
            targets = [{"labels": labels, "boxes": torch.full((4, 4), 0.25, **moved)}] * BATCH
            with autocast(torch.bfloat16):
                outputs = model(pixel_values, targets=targets)
            losses = unmatched_losses(Criterion(6), outputs, targets)
            Accelerator(card).backward(sum(losses.values()))
    anchor_logits.cache_clear()
    assert expected == pytest.approx(live.peak, rel=0.15)


def test_faster_rcnn_is_counted_by_steps_of_the_cpu():
    "A line over the photographs; none of its stages is frozen, whatever begins it."
    config = TrainConfig("", model="resnet18", image_size=64, init="imagenet", precision="no")
    counted = FASTER_RCNN.memory(config, 6)
    weights = 4 * sum(p.numel() for p in Baseline("resnet18", 6, 64).parameters())
    assert 4 * weights < counted.fixed < 6 * weights and 0 < counted.each < counted.fixed
    losses = FASTER_RCNN.losses(config, 6)
    model = Baseline("resnet18", 6, 64).train()
    with LiveMemory([*model.state_dict().values()]) as live:
        sum(losses(model, torch.rand(3, 3, 64, 64), targets_of(3), 0).values()).backward()
    assert live.peak + 3 * weights == pytest.approx(counted.fixed + 3 * counted.each, rel=0.15)
    assert set(measured_precisions(config, FASTER_RCNN)) == {"no", "bf16"}


def test_the_counter_sees_a_tensor_once_and_its_end():
    before = torch.zeros(1000, 128)
    with LiveMemory([before, before.T]) as live:
        assert live.now == live.peak == 512_000
        more = before + 1
        more.add_(1)
        assert live.now == 1_024_000
        del more
        assert live.now == 512_000
    assert live.peak == 1_024_000


def test_m_fits_a_card_of_12_gb_as_promised():
    "10.7 GiB are left by the context; photographs at 640 and at 1024 px, no checkpointing."
    free = 10.7 * GIB / SLACK
    eight = counted_step(DetectorConfig.m(), 640, 8)
    fixed = 5 * 4 * 18_243_716  # weights, average, two moments, gradients
    assert eight < free < 2 * eight - fixed  # 16 photographs take two parts
    assert counted_step(DetectorConfig.m(), 1024, 4) < free


def test_the_largest_part_is_found_upwards_and_a_failure_costs_one_attempt():
    tried = []

    def of_six(n):
        tried.append(n)
        return n <= 6

    assert largest_part(16, 4, of_six) == 6 and tried == [4, 6, 8]
    tried.clear()
    assert largest_part(16, 16, of_six) == 6 and tried == [16, 8, 6]
    assert largest_part(16, 0, of_six) == 6 and largest_part(16, 5, of_six) == 6
    assert largest_part(16, 16, lambda n: False) == 0
    assert part_sizes(10) == [1, 2, 3, 4, 5, 10]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_lack_of_memory_has_many_names(text):
    assert lacks_memory(RuntimeError(text)) and lacks_memory(torch.OutOfMemoryError("whatever"))
    assert not lacks_memory(RuntimeError("Expected all tensors to be on the same device"))
    assert not lacks_memory(ValueError(text))


def test_a_training_that_fits_nowhere_tries_checkpointing_and_then_says_so(smoke_data, tmp_path):
    config = TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4)
    trainer = Trainer(config, tmp_path)
    tried = []

    def fails(n):
        tried.append((n, trainer.recomputed))
        if not trainer.recomputed or n > 2:
            raise RuntimeError("CUDA out of memory.")

    assert fit_micro_batch(trainer, fails) == 2 and trainer.recomputed
    assert tried == [(4, 0), (2, 0), (1, 0), (4, 1), (2, 1)]
    with pytest.raises(RuntimeError, match="same device"):
        fit_micro_batch(trainer, broken)
    with pytest.raises(ValueError, match="not one photograph of 64 px fits"):
        fit_micro_batch(trainer, too_large)


def broken(n):
    raise RuntimeError("Expected all tensors to be on the same device")


def too_large(n):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_the_count_proposes_a_part_where_there_is_a_card(monkeypatch):
    config = TrainConfig("", model="tiny", image_size=64, precision="bf16")
    counted = StepMemory(50_000_000, 20_000_000)
    card = torch.device("cuda")
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=card),
        config=config,
        sizes=[64],
        recomputed=0,
        family=dataclasses.replace(DEIMV2, memory=lambda config, classes: counted),
        train_set=types.SimpleNamespace(num_classes=6),
    )
    reserved = counted.needs(5) // 2  # by torch, for what is no longer used
    free = counted.needs(5) - reserved
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert trainers._counted_part(trainer, 16) in (4, 5)  # rounded
    trainer.accelerator.device = torch.device("cpu")
    assert trainers._counted_part(trainer, 16) == 16


def test_the_self_check_of_a_card_runs_on_a_cpu_too(monkeypatch):
    table = card_table("tiny", ((SIZE, BATCH), (64, 2)), repeats=1)
    assert list(table["image_size"]) == [SIZE, 64] and not table["note"].any()
    assert (table["images/s"] > 0).all() and table["waits"].isna().all()
    assert table[list(PARTS)].sum(axis=1).to_list() == pytest.approx([1, 1])
    ratio = table["peak_gib"] / table["counted_gib"]
    assert ratio.between(0.75, 1.15).all()  # the count has an average of the weights besides

    def full(*given):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr("deimv2_tfg.cost.StepParts", full)
    table = card_table("tiny", ((64, 2),), repeats=1)
    assert len(table) == 1 and table["note"].str.contains("CUDNN_STATUS_ALLOC_FAILED").all()
