import os
from pathlib import Path

import pytest

os.environ.setdefault("IN_TEST", "1")  # the smoke profile, no progress bars

ROOT = Path(__file__).resolve().parents[1]


FIRST = ("test_chapters", "test_workflow")  # the longest files: what is left at the end is short


def pytest_collection_modifyitems(items):
    """Longest files first: two processes that take files in turn then end together."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_configure(config):
    line = 'finding(row, ...): reports that the test answers, as "data.md:F1" or "training.md:A3"'
    config.addinivalue_line("markers", line)


def pytest_runtest_setup(item):
    """The rows travel with the test's report, from worker processes too."""
    for marker in item.iter_markers("finding"):
        item.user_properties += [("finding", row) for row in marker.args]


def pytest_terminal_summary(terminalreporter):
    """Counts the rows whose every test that ran has passed."""
    outcomes = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            rows = [row for key, row in report.user_properties if key == "finding"]
            for row in rows:
                outcomes.setdefault(row, set()).add(outcome)
    covered = {row for row, found in outcomes.items() if found == {"passed"}}
    counts = [
        sum(row.startswith(f"{page}:") for row in covered) for page in ("data.md", "training.md")
    ]
    if outcomes:
        terminalreporter.write_line(
            f"findings covered: {counts[0]} rows of data.md, {counts[1]} of training.md"
        )


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def smoke_data():
    "The built-in data set of the smoke profile."
    from deimv2_tfg.core import open_study
    from deimv2_tfg.synthetic import study_data

    return study_data(open_study("smoke"))
