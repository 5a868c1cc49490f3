import os
from pathlib import Path

import pytest

os.environ.setdefault("IN_TEST", "1")  # the smoke profile, no progress bars

ROOT = Path(__file__).resolve().parents[1]


FIRST = ("test_chapters", "test_workflow")  # the longest files: what is left at the end is short


def pytest_collection_modifyitems(items):
    """Longest files first: two processes that take files in turn then end together."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def smoke_data():
    "The built-in data set of the smoke profile."
    from deimv2_tfg.core import open_study
    from deimv2_tfg.synthetic import study_data

    return study_data(open_study("smoke"))
