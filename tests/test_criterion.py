"""The criterion: parity with the reference, and what must hold whatever the numbers are."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from deimv2_tfg.criterion import (
    LIMIT,
    Criterion,
    NonFiniteLossError,
    assign,
    box_overlap,
    matching_cost,
    pack_targets,
    random_outputs,
    union_of_matches,
)

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
SMALL = Path(__file__).parent / "vectors" / "criterion_small.json"


def load_reference(name):
    path = REFERENCE / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no reference numbers at {path}")
    arrays, meta = np.load(path), json.loads(path.with_suffix(".json").read_text())
    outputs = {n: torch.from_numpy(arrays[n]) for n in arrays.files if "/" not in n}
    images = range(outputs["layer_logits"].shape[1])
    outputs["dn_positive_idx"] = [torch.from_numpy(arrays[f"dn_positive_idx/{i}"]) for i in images]
    targets = [
        {
            "labels": torch.from_numpy(arrays[f"target_labels/{i}"]),
            "boxes": torch.from_numpy(arrays[f"target_boxes/{i}"]),
            "image_id": i,
        }
        for i in images
    ]
    return outputs, targets, meta


class Rule:
    "Numbers from a rule (RandomState), so that only the expected terms need to be stored."

    def __init__(self):
        self.rng = np.random.RandomState(5)

    def normal(self, *shape):
        return torch.from_numpy(self.rng.standard_normal(shape)).float()

    def boxes(self, *shape):
        smaller = torch.tensor([0, 0, -1.0, -1.0])
        return (self.normal(*shape, 4) + smaller).sigmoid()

    def heads(self, layers, queries, classes):
        return {
            "layer_logits": self.normal(layers, 3, queries, classes),
            "layer_boxes": self.boxes(layers, 3, queries),
            "layer_corners": self.normal(layers, 3, queries, 132),
            "layer_refs": self.boxes(layers, 3, queries),
            "pre_logits": self.normal(3, queries, classes),
            "pre_boxes": self.boxes(3, queries),
        }


def small_case():
    "Outputs and targets of 3 images with 2, 0 and 1 targets."
    rule = Rule()
    counts, classes, queries, layers, groups = (2, 0, 1), 3, 8, 3, 2
    outputs = {"enc_logits": rule.normal(3, queries, classes), "enc_boxes": rule.boxes(3, queries)}
    outputs |= {"up": torch.tensor([0.5]), "reg_scale": torch.tensor([4.0])}
    outputs |= rule.heads(layers, queries, classes)
    noisy = rule.heads(layers, 2 * max(counts) * groups, classes)
    outputs |= {f"dn_{name}": value for name, value in noisy.items()}
    starts = torch.arange(groups)[:, None] * 2 * max(counts)
    outputs["dn_num_group"] = groups
    outputs["dn_positive_idx"] = [(starts + torch.arange(n)).flatten() for n in counts]
    targets = []
    for i, n in enumerate(counts):
        labels = torch.from_numpy(rule.rng.randint(0, classes, n))
        targets.append({"labels": labels, "boxes": rule.boxes(n), "image_id": 10 + i})
    return outputs, targets


def assert_terms(losses, expected, tolerance=1e-4):
    assert set(losses) == set(expected)
    wrong = {
        n: (float(losses[n]), v)
        for n, v in expected.items()
        if abs(float(losses[n]) - v) > tolerance * max(abs(v), 1e-6)
    }
    assert not wrong


@pytest.mark.parametrize("epoch", [0, 100])
@pytest.mark.parametrize("name", ["criterion_a", "criterion_b"])
def test_every_term_agrees_with_the_reference(name, epoch):
    outputs, targets, meta = load_reference(name)
    assert_terms(
        Criterion(meta["num_classes"])(outputs, targets, epoch), meta["losses"][f"epoch_{epoch}"]
    )


@pytest.mark.parametrize("epoch", [0, 100])
def test_small_frozen_vectors(epoch):
    outputs, targets = small_case()
    assert_terms(
        Criterion(3)(outputs, targets, epoch), json.loads(SMALL.read_text())[f"epoch_{epoch}"]
    )


def test_the_matcher_changes_at_its_epoch():
    outputs, targets = small_case()
    criterion = Criterion(3, change_epoch=7)
    first, before, at, after = (criterion(outputs, targets, epoch) for epoch in (0, 6, 7, 100))
    assert before == first and at == after and before != at


@pytest.mark.parametrize("late", [False, True])
def test_assignment_is_the_cheapest_of_all(late):
    g = torch.Generator().manual_seed(3)
    logits, boxes = (
        torch.randn(2, 2, 6, 4, generator=g),
        torch.rand(2, 2, 6, 4, generator=g) * 0.5 + 0.2,
    )
    truth = pack_targets(
        [
            {
                "labels": torch.randint(4, (n,), generator=g),
                "boxes": torch.rand(n, 4, generator=g) * 0.5 + 0.2,
            }
            for n in (3, 2)
        ]
    )
    cost = matching_cost(logits, boxes, truth.labels, truth.boxes, truth.image, late=late).numpy()
    head, image, query, target = assign(cost, truth.counts)
    assert len(head) == 2 * 5
    for h, (i, (start, n)) in itertools.product(range(2), enumerate(((0, 3), (3, 2)))):
        best = min(
            sum(cost[h, start + t, q] for t, q in enumerate(qs))
            for qs in itertools.permutations(range(6), n)
        )
        mine = (head == h) & (image == i)
        assert sorted(target[mine]) == list(range(start, start + n)) and len(set(query[mine])) == n
        assert math.isclose(
            cost[h, target[mine], query[mine]].sum(), best, rel_tol=1e-5, abs_tol=1e-6
        )


def test_cost_by_hand():
    p, box, goal = 0.3, [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]
    logits = torch.full((1, 1, 1, 2), math.log(p / (1 - p)))
    args = (
        logits,
        torch.tensor(box)[None, None, None],
        torch.tensor([1]),
        torch.tensor([goal]),
        np.array([0]),
    )
    focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    assert math.isclose(matching_cost(*args).item(), 2 * focal + 5 * 0.2 - 2 * 0.5, rel_tol=1e-5)
    assert math.isclose(matching_cost(*args, late=True).item(), -p * 0.5**4, rel_tol=1e-5)


def test_more_targets_than_queries():
    pairs = assign(np.random.RandomState(0).rand(1, 5, 3), [5])
    assert pairs.shape == (4, 3) and len(set(pairs[2])) == 3


def test_union_against_a_plain_loop():
    rng = np.random.RandomState(1)
    owner = rng.randint(0, 3, 9)  # the image of each of 9 targets
    target = rng.randint(0, 9, 60)
    pairs = np.stack([rng.randint(0, 6, 60), owner[target], rng.randint(0, 7, 60), target])
    votes = {}
    for _, i, q, t in pairs.T:
        votes.setdefault((i, q), []).append(t)
    expected = {
        (i, q, min(t for t in ts if ts.count(t) == max(map(ts.count, ts))))
        for (i, q), ts in votes.items()
    }
    assert set(map(tuple, union_of_matches(pairs, 7).T)) == expected
    assert union_of_matches(np.zeros((4, 0), np.int64), 7).shape == (3, 0)


def test_no_target_in_one_image_or_in_any():
    outputs, targets = small_case()
    empty = [t | {"labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in targets]
    outputs = {
        n: v.requires_grad_() if torch.is_tensor(v) and n not in ("up", "reg_scale") else v
        for n, v in outputs.items()
        if not n.startswith("dn_")
    }
    losses = Criterion(3)(outputs, empty)
    assert all(v.isfinite() and v.requires_grad for v in losses.values())
    assert (
        all(v.item() == 0 for n, v in losses.items() if n.split("_")[1] in ("bbox", "giou", "fgl"))
        and losses["loss_mal"].item() > 0
    )
    sum(losses.values()).backward()
    assert all(
        outputs[n].grad.isfinite().all()
        for n in outputs
        if n not in ("up", "reg_scale", "layer_refs")
    )
    with_denoising = small_case()[0] | {
        "dn_positive_idx": [torch.zeros(0, dtype=torch.int64)] * 3
    }  # and with denoising queries that carry nothing
    assert all(v.isfinite() for v in Criterion(3)(with_denoising, empty).values())


def test_degenerate_boxes_stay_finite():
    outputs, targets = small_case()
    outputs["layer_boxes"][:, :, :, 2:] = 0
    outputs["layer_refs"][:, :, :, 2:] = 0
    outputs["layer_boxes"].requires_grad_()
    targets[0]["boxes"][:, 2:] = 0
    targets[0]["boxes"][:, :2] = outputs["layer_boxes"][0, 0, :2, :2].detach()
    losses = Criterion(3)(outputs, targets)
    sum(losses.values()).backward()
    assert outputs["layer_boxes"].grad.isfinite().all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("layer_boxes", math.nan),
        ("layer_corners", math.inf),
        ("layer_logits", -math.inf),
        ("layer_logits", 1e30),
        ("dn_layer_corners", math.nan),
    ],
)
def test_broken_layer_outputs_are_named(name, value):
    outputs, targets = small_case()
    outputs[name][1, 2, 0, 1] = value
    with pytest.raises(
        NonFiniteLossError, match=rf"{name} of layer 1 \(images \[12\]\).*\[10, 11, 12\]"
    ) as error:
        Criterion(3)(outputs, targets)
    assert (
        isinstance(error.value, FloatingPointError)
        and error.value.image_ids == [10, 11, 12]
        and len(error.value.found) == 1
    )


@pytest.mark.parametrize("name", ["pre_logits", "enc_boxes", "dn_pre_boxes"])
def test_broken_head_outputs_are_named(name):
    outputs, targets = small_case()
    outputs[name][0, 1] = math.nan
    with pytest.raises(NonFiniteLossError, match=rf"{name} \(images \[10\]\)"):
        Criterion(3)(outputs, targets)


def test_outputs_at_the_limit_give_finite_terms():
    outputs, targets = small_case()
    for name in outputs:
        if name.endswith(("logits", "boxes", "corners", "refs")):
            outputs[name] = outputs[name].sub(0.5).sign() * LIMIT * 0.99
    assert all(
        v.isfinite() for epoch in (0, 100) for v in Criterion(3)(outputs, targets, epoch).values()
    )


def test_broken_targets_are_named():
    outputs, targets = small_case()
    bad = [targets[0] | {"labels": torch.tensor([0, 3])}, *targets[1:]]
    with pytest.raises(ValueError, match=r"label outside 0..2: images \[10\]"):
        Criterion(3)(outputs, bad)
    bad = [*targets[:2], targets[2] | {"boxes": torch.full((1, 4), math.nan)}]
    with pytest.raises(ValueError, match=r"not finite: images \[12\]"):
        Criterion(3)(outputs, bad)
    with pytest.raises(ValueError, match="do not fit"):
        Criterion(3)(outputs, targets[:2])
    with pytest.raises(ValueError, match="dn_positive_idx"):
        Criterion(3)(outputs | {"dn_num_group": 3}, targets)
    with pytest.raises(KeyError, match="enc_logits"):
        Criterion(3)({n: v for n, v in outputs.items() if n != "enc_logits"}, targets)


def test_every_head_gets_a_gradient():
    outputs, targets = random_outputs(batch=2, queries=30, groups=3, boxes=3)
    sum(Criterion(6)(outputs, targets).values()).backward()
    for name, x in outputs.items():
        if not torch.is_tensor(x) or not x.requires_grad:
            continue
        norms = x.grad.flatten(1).norm(dim=1) if "layer_" in name else x.grad.norm()[None]
        assert (norms > 0).all(), name


def test_what_is_detached():
    outputs, targets = small_case()
    for name in ("layer_boxes", "layer_corners", "layer_logits", "layer_refs"):
        outputs[name].requires_grad_()
    losses = Criterion(3)(outputs, targets)

    def grad(term, name):
        kept = {"retain_graph": True, "materialize_grads": True}
        return torch.autograd.grad(losses[term], outputs[name], **kept)[0]

    assert not grad("loss_mal", "layer_boxes").any()
    assert not grad("loss_fgl", "layer_boxes").any()
    assert not grad("loss_fgl", "layer_refs").any()
    teacher = grad("loss_ddf_aux_0", "layer_corners")
    assert teacher[0].any() and not teacher[1:].any()
    assert not grad("loss_ddf_aux_0", "layer_logits").any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_outputs_are_computed_in_float32(dtype):
    outputs, targets = small_case()
    half = {
        n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for n, v in outputs.items()
    }
    full = {
        n: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in half.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        losses = Criterion(3)(half, targets)
    expected = Criterion(3)(full, targets)
    assert all(v.dtype == torch.float32 and v == expected[n] for n, v in losses.items())


class Looks(TorchDispatchMode):
    """Notes every operation whose result the host must wait for."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "equal.default",
        "is_nonzero",
        "masked_select",
        "cdist",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        mask = "index" in name and any(
            torch.is_tensor(i) and i.dtype == torch.bool
            for a in args
            if isinstance(a, (list, tuple))
            for i in a
        )
        if any(w in name for w in self.WAITS) or mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch):
    outputs, targets = random_outputs(batch=2, queries=30, groups=3)
    transfers = []
    to_host = torch.Tensor.cpu

    def noted(tensor):
        transfers.append(tensor.numel())
        return to_host(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    # on a GPU the trainer checks the terms, when it logs
    monkeypatch.setattr("deimv2_tfg.criterion.check_terms", lambda *_: None)
    with Looks() as looks:
        Criterion(6)(outputs, targets)
    assert looks.seen == [] and len(transfers) == 1


def part_of(outputs, part):
    "The outputs of some of the images."
    cut = {}
    for name, value in outputs.items():
        if "layer_" in name:
            cut[name] = value[:, part]
        elif name.startswith(("pre", "enc", "dn_pre")) or name == "dn_positive_idx":
            cut[name] = value[part]
        else:
            cut[name] = value
    return cut


def test_normalisers_are_shared_by_processes(monkeypatch):
    """The mean over two processes is the loss of the whole batch.

    `all_reduce` is played by adding what the other process counted.
    """
    outputs, targets = small_case()
    parts = [(part_of(outputs, p), targets[p]) for p in (slice(0, 1), slice(1, 3))]
    counted = []
    others = []

    def all_reduce(counts):
        counted.append(counts.clone())
        if others:
            counts.add_(others.pop(0))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    for part in parts:
        Criterion(3)(*part)
    others[:] = [counted[1], counted[0]]
    first, second = (Criterion(3)(*part) for part in parts)
    monkeypatch.undo()
    for name, value in Criterion(3)(outputs, targets).items():
        if "_ddf" in name:
            continue  # a mean over the queries of a process, not a sum over targets
        both = (first[name] + second[name]).item() / 2
        assert math.isclose(both, value.item(), rel_tol=1e-4), name


def test_a_process_group_of_one_changes_nothing(tmp_path):
    outputs, targets = small_case()
    alone = Criterion(3)(outputs, targets)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        assert_terms(Criterion(3)(outputs, targets), {n: v.item() for n, v in alone.items()}, 1e-6)
    finally:
        dist.destroy_process_group()


def test_overlap_against_torchvision():
    from torchvision.ops import box_convert, box_iou, generalized_box_iou

    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(20, 4, generator=g), torch.rand(30, 4, generator=g)
    iou, giou = box_overlap(a[:, None], b)
    corners = [box_convert(x, "cxcywh", "xyxy") for x in (a, b)]
    torch.testing.assert_close(iou, box_iou(*corners))
    torch.testing.assert_close(giou, generalized_box_iou(*corners))
