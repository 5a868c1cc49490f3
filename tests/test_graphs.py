"""One graph a step: counted with dynamo on a CPU; what capturing is given, without a card."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from deimv2_tfg.criterion import Criterion
from deimv2_tfg.detector import DetectorConfig, build_detector, encode
from deimv2_tfg.graphs import (
    EncoderPart,
    capture_encoder,
    compile_detector,
    faster,
    fixed_pass,
    map_shapes,
    padded_forward,
)
from deimv2_tfg.recipes import TrainConfig

COUNTS = [(2, 2), (1, 3), (5, 0), (0, 0), (8, 1), (1, 1)]


def targets_of(counts) -> list[dict]:
    targets = []
    for i, n in enumerate(counts):
        labels = torch.arange(n) % 6
        boxes = torch.linspace(0.2, 0.4, 4 * n).reshape(n, 4)
        targets.append({"labels": labels, "boxes": boxes, "image_id": i})
    return targets


def outputs_of(model, pixel_values, targets, seed=1) -> dict:
    torch.manual_seed(seed)
    return dict(model(pixel_values, targets))


def largest_difference(output, other) -> float:
    assert list(output) == list(other)
    pairs = [(value, other[name]) for name, value in output.items() if torch.is_tensor(value)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.tiny(decoder_layers=1, vit_depth=3))
    for parameter in model.parameters():  # heads that start at zero would hide what they get
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_six_counts_of_boxes_share_one_graph_without_a_break(model, monkeypatch):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    pixel_values = torch.randn(2, 3, 64, 64)
    plain = [outputs_of(model, pixel_values, targets_of(counts)) for counts in COUNTS]
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "0")
    monkeypatch.setitem(model.__dict__, "forward", model.forward)
    torch._dynamo.reset()
    counters.clear()
    compile_detector(model, backend=count)
    for counts, expected in zip(COUNTS, plain, strict=True):
        output = outputs_of(model, pixel_values, targets_of(counts))
        assert largest_difference(expected, output) < 1e-5
    assert len(graphs) == 1 and not counters["graph_break"]
    losses = Criterion(6)(output, targets_of(counts))
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_backbone_and_encoder_alone_are_one_graph_without_a_break(model, monkeypatch):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    torch._dynamo.reset()
    counters.clear()
    part = EncoderPart(model).eval()
    compiled = torch.compile(part, backend=count, dynamic=False)
    for _ in range(3):
        pixel_values = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(compiled(pixel_values), part(pixel_values), atol=1e-5)
    model.train()
    assert len(graphs) == 1 and not counters["graph_break"]


def test_padded_denoising_queries_change_neither_answers_nor_gradients(model):
    pixel_values = torch.randn(2, 3, 64, 64)
    padded = functools.partial(padded_forward, model, fixed_pass)
    for counts in [*COUNTS, (20, 3)]:
        found = []
        for forward in (model, padded):
            model.zero_grad()
            targets = targets_of(counts)
            output = outputs_of(forward, pixel_values, targets)
            sum(Criterion(6)(output, targets).values()).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            found.append((output, torch.cat([grad.flatten() for grad in grads])))
        assert largest_difference(found[0][0], found[1][0]) < 1e-5
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "n"])
def test_sizes_of_maps_follow_from_the_photographs(name):
    model = build_detector(DetectorConfig.named(name)).eval()
    pixel_values = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        assert map_shapes(model, pixel_values) == encode(model, pixel_values)[1]


def test_padding_leaves_evaluation_as_it_is(model):
    pixel_values = torch.randn(1, 3, 64, 96)
    model.eval()
    with torch.no_grad():
        output = padded_forward(model, fixed_pass, pixel_values)
        assert largest_difference(dict(model(pixel_values)), dict(output)) == 0
    model.train()


def test_a_captured_encoder_serves_its_own_shape_in_training_alone(model, monkeypatch):
    "The card's own function is replaced by one that runs the module and counts."
    calls = []

    def graphed(part, sample, **_):
        part(sample[0].as_subclass(torch.Tensor))  # warming up: running statistics move
        return lambda pixel_values: calls.append(pixel_values.shape) or part(pixel_values)

    class OnCard(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setitem(model.__dict__, "forward", model.forward)
    sample = torch.randn(2, 3, 64, 64)
    buffers = [buffer.clone() for buffer in model.buffers()]
    targets = targets_of((2, 1))
    plain = outputs_of(model, sample, targets)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    with pytest.raises(ValueError, match="CUDA card, not on a cpu"):
        capture_encoder(model, sample)
    capture_encoder(model, sample.as_subclass(OnCard))
    assert all(map(torch.equal, model.buffers(), buffers))
    assert largest_difference(plain, outputs_of(model, sample, targets)) == 0
    assert calls == [(2, 3, 64, 64)]
    outputs_of(model, torch.randn(1, 3, 64, 64), targets[:1])
    model.eval()(sample)
    model.train()
    assert len(calls) == 1


def test_a_training_asks_for_one_or_the_other(model, monkeypatch):
    asked = []
    monkeypatch.setattr("deimv2_tfg.graphs.compile_detector", asked.append)
    monkeypatch.setattr(
        "deimv2_tfg.graphs.capture_encoder",
        lambda model, sample, dtype: asked.append((tuple(sample.shape), dtype)),
    )
    monkeypatch.setitem(model.__dict__, "to", lambda device: model)
    fields = {"image_size": 64, "batch_size": 8}
    assert faster(model, TrainConfig("", **fields), "cpu") is model
    faster(model, TrainConfig("", compile=True, **fields), "cpu")
    fields |= {"micro_batch": 4, "precision": "bf16"}
    faster(model, TrainConfig("", cuda_graphs=True, **fields), "cpu")
    assert asked == [model, ((4, 3, 64, 64), torch.bfloat16)]
    with pytest.raises(ValueError, match="choose one"):
        TrainConfig("", compile=True, cuda_graphs=True)
