"""The cost of a size is what is counted there, and the recommendation follows its rule."""

import pandas as pd
import pytest
import torch
from page_code import page_module

from deimv2_tfg.detector import DetectorConfig, build_detector

page = page_module("03e_input_size")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = build_detector(DetectorConfig.small(num_classes=6))
    return model, page.step_cost(model)


def test_a_fourth_size_is_predicted(small):
    model, cost = small
    flop, kept = page.count_step(model, 384)
    assert cost.gflop(384) == pytest.approx(flop, rel=0.01)
    assert cost.kept_mb(384) == pytest.approx(kept, rel=0.03)


def test_the_published_network_costs_what_is_published():
    """DEIMv2-M at 640 px: 52.2 GFLOP without denoising queries, 10.2 GB."""
    cost = page.step_cost(build_detector(DetectorConfig.m(num_classes=80)))
    peak = page.PEAK * cost.memory_gb(640, 8, half=True)
    assert 10.2 / 2 < peak < 2 * 10.2
    assert 50 < cost.gflop(640) < 60


def test_shares_of_small_boxes():
    boxes = pd.DataFrame({"relative size": [0.02] * 3 + [0.1] * 97})
    shares = page.size_shares(boxes)
    assert shares["under 8 px"][320] == 0.03 and shares["under 8 px"][480] == 0
    assert shares["smallest"][320] == pytest.approx(6.4)
    assert shares["median"][320] == pytest.approx(32)


def test_recommendation():
    shares = page.size_shares(pd.DataFrame({"relative size": [0.02] * 3 + [0.1] * 97}))
    costs = page.cost_table(page.StepCost((0, 0.01, 0), (0, 0.5, 0), 100), 10, 8, 100)
    assert page.recommend(shares, costs, 1000)[0] == 480
    assert "enlarged" in page.recommend(shares, costs, 200)[1]
    least = costs["peak, 16 bit (GB)"][320]
    assert page.recommend(shares, costs, 1000, memory_gb=least)[0] == 320
    assert "no size fits" in page.recommend(shares, costs, 1000, memory_gb=0.01)[1]
    hopeless = page.size_shares(pd.DataFrame({"relative size": [0.001]}))
    size, reason = page.recommend(hopeless, costs, 5000)
    assert size == 1408 and "tiles" in reason
