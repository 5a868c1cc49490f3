"""Device discipline without a card: every family's step on fake tensors of `cuda:0`.

What is counted here is what a card would be asked for; nothing is computed.
"""

import collections

import pytest
import torch
from fake_card import DEVICE, Accelerator, autocast, backward, counted, fake_card, real, to_card
from page_code import page_module
from torch.optim.swa_utils import AveragedModel
from transformers.initialization import no_init_weights

from deimv2_tfg.baselines import BACKBONES, Baseline
from deimv2_tfg.batches import augmented, epoch_batches
from deimv2_tfg.criterion import Criterion
from deimv2_tfg.data import load_dataset
from deimv2_tfg.detector import Detector, DetectorConfig, anchor_logits, library_config
from deimv2_tfg.evaluation import detections
from deimv2_tfg.fusion import HEADS, ClassText, build_head
from deimv2_tfg.multimodal import FusedDetector, thaw
from deimv2_tfg.optim import Ema, parameter_groups, recompute
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.step import count_boxes, training_step
from deimv2_tfg.training import DEIMV2, in_parts
from deimv2_tfg.transforms import _centre

pretraining = page_module("09_pretraining")

TRAINED = ("small", "lite", "s", "thesis_m", "atto", "n", "l")  # m below, with its budget
SHORT = {"vit_depth": 3, "features": (0, 1, 2)}  # more blocks are the same again
ASKED = ("tiny", "small", "lite", "s", "m", "thesis_m", "femto", "pico", "x")


@pytest.fixture
def card(monkeypatch):
    caches = (anchor_logits, _centre)
    for cached in caches:
        cached.cache_clear()
    with fake_card(monkeypatch) as card:
        yield card
    for cached in caches:
        cached.cache_clear()


def targets_of(counts, device="cpu") -> list[dict]:
    targets = []
    for i, n in enumerate(counts):
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        boxes = torch.full((n, 4), 0.25, device=device)
        targets.append({"labels": labels, "boxes": boxes, "image_id": i})
    return targets


def build_detector(name="tiny", **changes) -> Detector:
    "A detector for `to_card`: shapes without numbers, in training mode."
    with torch.device("meta"), no_init_weights():
        return Detector(library_config(DetectorConfig.named(name, **changes))).train()


class Training:
    "A training of DEIMv2 on the fake card; `step` makes one."

    def __init__(self, card, name="tiny", dtype=torch.bfloat16, checkpointing=False, micro=0, **of):
        self.card = card
        self.config = TrainConfig("", model=name, image_size=64)
        self.accelerator = Accelerator(card)
        self.micro = micro
        model = to_card(real(build_detector, name, **of))
        self.ema = to_card(Ema(model, 1000))
        groups = parameter_groups(model, self.config)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.compute_losses = DEIMV2.losses(self.config, 6)
        if checkpointing:
            recompute(DEIMV2.blocks(model))
        self.model = model
        self.dtype = dtype
        self.mark()

    def mark(self):
        "Name the parts of the step whose operations are counted."
        inner = self.model.model
        counted(self.card, inner.conv_encoder, "forward", "backbone")
        counted(self.card, inner.encoder, "forward", "encoder")
        for layer in inner.decoder.layers:
            counted(self.card, layer, "forward", "decoder layers")
        plain = self.model.forward

        def forward(*args, **kwargs):
            with self.card.part("heads"), autocast(self.dtype):
                return plain(*args, **kwargs)

        self.model.forward = forward
        losses = self.compute_losses

        def compute_losses(*args):
            with self.card.part("criterion"):
                return losses(*args)

        self.compute_losses = compute_losses
        counted(self.card, self.ema, "update_parameters", "ema")

    def step(self, batch=2, size=64, counts=None):
        targets = targets_of(counts or [2] * batch)
        parts = in_parts(self, torch.empty(batch, 3, size, size), targets)
        step = training_step(
            self.model,
            self.compute_losses,
            parts,
            self.optimizer,
            self.ema,
            self.accelerator,
            0.1,
            0,
            count_boxes,
        )
        assert not step.failure and len(step.losses) > 20
        return step

    def second_step(self, batch, size):
        "A step after what the first one makes for all; what it asked of the card is in `card`."
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        with torch.no_grad():
            pixel_values = torch.empty(batch, 3, size, size, device=DEVICE)
            self.model(pixel_values, targets=targets_of([2] * batch, DEVICE))
        self.card.waits.clear()
        self.card.ops.clear()
        self.card.names.clear()
        return self.step(batch, size)


def stays_on_the_card(training, step):
    assert step.grad_norm.device == DEVICE
    trained = [p for p in training.model.parameters() if p.requires_grad]
    assert all(p.grad.device == DEVICE for p in trained)


@pytest.mark.parametrize("name", [*TRAINED, "tiny"])
def test_a_training_step_of_deimv2_stays_on_the_card(card, name):
    dtype = None if name == "tiny" else torch.bfloat16
    training = Training(card, name, dtype, decoder_layers=2, **SHORT)
    stays_on_the_card(training, training.step(counts=[3, 0]))


def test_a_training_step_with_checkpointing_and_in_parts_stays_on_the_card(card):
    Training(card, checkpointing=True, micro=2).step(batch=4)


@pytest.mark.parametrize("name", ASKED)
def test_detections_of_deimv2_stay_on_the_card(card, name):
    model = to_card(real(build_detector, name, decoder_layers=1, **SHORT).eval())
    sizes = torch.tensor([[480, 640], [480, 640]]).to(DEVICE)
    with torch.no_grad():
        found = detections(model, torch.empty(2, 3, 64, 64, device=DEVICE), sizes)
    assert all(value.device == DEVICE for one in found for value in one.values())


def updates_on_the_card(model, compute_loss):
    "One step of any network: forward, backward, AdamW and average stay on the card."
    ema = to_card(real(Ema, model, 10))
    to_card(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    loss = compute_loss()
    assert loss.device == DEVICE
    backward(loss)
    grads = [p.grad for p in trained if p.grad is not None]
    assert grads and all(grad.device == DEVICE for grad in grads)
    optimizer.step()
    ema.update_parameters(model)
    held = [value for state in optimizer.state.values() for value in state.values()]
    held += [*ema.module.parameters(), *ema.module.buffers()]
    assert all(value.device == DEVICE for value in held)


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_faster_rcnn_stays_on_the_card(card, backbone):
    model = real(Baseline, backbone, 6, 640).train()
    pixel_values = torch.empty(2, 3, 640, 640, device=DEVICE)
    targets = targets_of([2, 2], DEVICE)
    updates_on_the_card(model, lambda: sum(model(pixel_values, targets).values()))
    found = model.eval().detections(pixel_values, torch.tensor([[480, 640]] * 2).to(DEVICE))
    assert all(one["boxes"].device == DEVICE for one in found)


@pytest.mark.parametrize("kind", list(HEADS))
def test_the_fused_detector_stays_on_the_card(card, kind):
    detector = real(build_detector, decoder_layers=1).eval()
    words = real(torch.ones, 6, 32)
    text = ClassText(words, words, real(torch.arange, 6))
    head = real(build_head, kind, 48, text)
    model = FusedDetector(detector, head, text, {})
    model = thaw(model, "decoder").train()
    pixel_values = torch.empty(2, 3, 64, 64, device=DEVICE)
    targets = targets_of([2, 1], DEVICE)

    def compute_loss():
        output = model(pixel_values, targets=targets)
        return sum(Criterion(6)(output, targets).values())

    updates_on_the_card(model, compute_loss)


def test_pretraining_stays_on_the_card(card):
    vit = real(build_detector).model.conv_encoder.backbone
    model = real(pretraining.MaskedViT, vit).train()
    mask = pretraining.random_mask(2, 4).to(DEVICE)
    pixel_values = torch.empty(2, 3, 64, 64, device=DEVICE)
    card.waits.clear()
    updates_on_the_card(model, lambda: model(pixel_values, mask))
    assert card.waits == []


def test_tensors_on_two_devices_are_noticed(card):
    model = to_card(real(build_detector))
    with pytest.raises(RuntimeError, match="same device"):
        model(torch.empty(2, 3, 64, 64), targets=targets_of([1, 1], DEVICE))


def test_host_waits_do_not_grow_with_the_batch_and_none_is_inside_forward(card):
    training = Training(card)
    training.step(batch=2)  # fills caches, which know sizes and not batches
    for batch in (2, 8):
        card.waits.clear()
        training.step(batch=batch)
        assert len(card.waits) <= 3, collections.Counter(card.waits)
    before = len(card.waits)
    with autocast(torch.bfloat16):
        pixel_values = torch.empty(2, 3, 64, 64, device=DEVICE)
        training.model(pixel_values, targets=targets_of([2, 1], DEVICE))
    assert card.waits[before:] == []


def test_bytes_become_numbers_in_their_own_light_without_a_wait(card):
    training = Training(card)
    targets = targets_of([2, 1])
    for kind in ({}, {"light": torch.tensor([1.1, 0.9, 1.2, 0.01, 1.0, 2.0, 0.0, 1.0])}):
        lit = [target | kind for target in targets]
        pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        in_parts(training, pixels, lit)  # the first copies what the others keep
        card.waits.clear()
        ((pixel_values, _),) = in_parts(training, pixels, lit, size=96)
        assert pixel_values.device == DEVICE and pixel_values.dtype == torch.float32
        assert pixel_values.shape == (2, 3, 96, 96)
        assert card.waits == []


# Most operations that a step of M may ask of a card, without views: 4,000 in all.
BUDGET = {
    "backward": 2100,
    "backbone": 430,
    "criterion": 420,
    "encoder": 330,
    "decoder layers": 300,
    "heads": 290,
    "step": 70,
    "clip": 10,
    "ema": 5,
}


def test_a_step_of_m_keeps_its_budget_of_operations(card):
    training = Training(card, "m")
    stays_on_the_card(training, training.second_step(batch=16, size=640))
    assert set(card.ops) == set(BUDGET)
    assert not {part: n for part, n in card.ops.items() if n > BUDGET[part]}, card.ops
    assert sum(card.ops.values()) <= 4000 and len(card.waits) <= 3


def test_the_average_is_torchs_and_resumes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    def update(averages, currents, n):
        weight = max(1 / 10, 1 / (1 + (int(n) + 1) / 4))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, weight)
        else:
            torch._foreach_copy_(averages, currents)

    expected = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    ema = Ema(model, 10)
    for _ in range(5):
        model(torch.randn(4, 3)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected.update_parameters(model)
        ema.update_parameters(model)
        resumed = Ema(model, 10)
        resumed.load_state_dict(ema.state_dict())
        ema = resumed
    kept = ema.state_dict()
    assert list(kept) == list(expected.state_dict())
    assert all(torch.equal(value, kept[k]) for k, value in expected.state_dict().items())


def test_loading_leaves_the_cards_generators_alone(smoke_data, monkeypatch):
    def seeded(seed):
        raise AssertionError("a loader has seeded the generators of the cards")

    config = TrainConfig(str(smoke_data), model="tiny", image_size=64, batch_size=4)
    view = augmented(load_dataset(smoke_data, "train"), config)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded)
    assert len(list(epoch_batches(view, config, 0))) > 1


def test_batches_and_generators_do_not_depend_on_the_number_of_workers(smoke_data):
    seen = []
    for workers, first in ((0, 0), (2, 0), (0, 1)):
        config = TrainConfig(str(smoke_data), image_size=64, batch_size=4, num_workers=workers)
        view = augmented(load_dataset(smoke_data, "train"), config, light_later=True)
        torch.manual_seed(3)
        found = []
        for pixels, targets in epoch_batches(view, config, 0, first):
            found += [pixels, torch.stack([target["light"] for target in targets])]
        seen.append([*found, torch.rand(3)])
    whole, with_workers, from_the_second = seen
    assert len(set(torch.cat(whole[1:-1:2])[:, 0].tolist())) > 2
    assert all(torch.equal(a, b) for a, b in zip(whole, with_workers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], from_the_second, strict=True))
