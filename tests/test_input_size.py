"""The cost of a size is what is counted there, and the recommendation follows its rule."""

import pandas as pd
import pytest
import torch

from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.input_size import (
    PEAK,
    StepCost,
    cost_table,
    count_step,
    recommend,
    size_shares,
    step_cost,
)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.small(num_classes=6))
    return model, step_cost(model)


def test_a_fourth_size_is_predicted(small):
    model, cost = small
    flop, kept = count_step(model, 384)
    assert cost.gflop(384) == pytest.approx(flop, rel=0.01)
    assert cost.kept_mb(384) == pytest.approx(kept, rel=0.03)


def test_the_published_network_costs_what_is_published():
    """DEIMv2-M at 640 px: 52.2 GFLOP without denoising queries, 10.2 GB."""
    cost = step_cost(build_detector(DetectorConfig.m(num_classes=80)))
    peak = PEAK * cost.memory_gb(640, 8, half=True)
    assert 10.2 / 2 < peak < 2 * 10.2
    assert 50 < cost.gflop(640) < 60


def test_shares_of_small_boxes():
    boxes = pd.DataFrame({"relative size": [0.02] * 3 + [0.1] * 97})
    shares = size_shares(boxes)
    assert shares["under 8 px"][320] == 0.03 and shares["under 8 px"][480] == 0
    assert shares["smallest"][320] == pytest.approx(6.4)
    assert shares["median"][320] == pytest.approx(32)


def test_recommendation():
    shares = size_shares(pd.DataFrame({"relative size": [0.02] * 3 + [0.1] * 97}))
    costs = cost_table(StepCost((0, 0.01, 0), (0, 0.5, 0), 100), 10, 8, 100)
    assert recommend(shares, costs, 1000)[0] == 480
    assert "enlarged" in recommend(shares, costs, 200)[1]
    least = costs["peak, 16 bit (GB)"][320]
    assert recommend(shares, costs, 1000, memory_gb=least)[0] == 320
    assert "no size fits" in recommend(shares, costs, 1000, memory_gb=0.01)[1]
    hopeless = size_shares(pd.DataFrame({"relative size": [0.001]}))
    size, reason = recommend(hopeless, costs, 5000)
    assert size == 1408 and "tiles" in reason
