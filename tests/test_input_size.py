"""The cost of a size is what is counted there, and the recommendation follows its rule."""

import numpy as np
import pandas as pd
import pytest
import torch

from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.input_size import (
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
    assert cost.gflop(384) == pytest.approx(flop, rel=0.01) and cost.kept_mb(384) == pytest.approx(
        kept, rel=0.03
    )


def test_the_published_network_costs_what_is_published():
    "DEIMv2-M at 640 px: 52.2 GFLOP without denoising queries."
    cost = step_cost(build_detector(DetectorConfig.m(num_classes=80)))
    assert 2 * 10.2 > cost.memory_gb(640, 8, half=True) * 2.9 > 10.2 / 2
    assert 50 < cost.gflop(640) < 60


def test_shares_and_recommendation():
    boxes = pd.DataFrame({"relative size": np.concatenate([np.full(3, 0.02), np.full(97, 0.1)])})
    shares = size_shares(boxes)
    assert (
        shares.loc[320, "under 8 px"] == 0.03
        and shares.loc[480, "under 8 px"] == 0
        and shares.loc[320, "smallest"] == pytest.approx(6.4)
    )
    costs = cost_table(StepCost((0, 0.01, 0), (0, 0.5, 0), 100), 10, 8, 100)
    assert recommend(shares, costs, 1000)[0] == 480
    assert "enlarged" in recommend(shares, costs, 200)[1]
    assert (
        recommend(shares, costs, 1000, memory_gb=float(costs.loc[320, "GB peak 16 bit"]))[0] == 320
    )
    assert "no size fits" in recommend(shares, costs, 1000, memory_gb=0.01)[1]
    hopeless = size_shares(pd.DataFrame({"relative size": [0.001]}))
    assert (
        recommend(hopeless, costs, 5000)[0] == 1408
        and "tiles" in recommend(hopeless, costs, 5000)[1]
    )
