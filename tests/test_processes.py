"""Two processes against one: the same batch, the same step, one record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from deimv2_tfg.runs import Run

SCRIPT = Path(__file__).with_name("two_processes.py")


def launched(data, where):
    """The script with two processes, by torchrun as `accelerate launch` calls it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(SCRIPT), str(data), str(where)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "IN_TEST": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=where,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def both(smoke_data, tmp_path_factory):
    "What the script leaves with one and with two processes."
    folders = [tmp_path_factory.mktemp(f"processes{n}") for n in (1, 2)]
    two_processes.main(smoke_data, folders[0])
    launched(smoke_data, folders[1])
    found = []
    for folder in folders:
        about = json.loads((folder / "done.json").read_text())
        found.append((folder, about, torch.load(folder / "step.pt")))
    return found


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
