import os
from pathlib import Path

import pytest

os.environ.setdefault("IN_TEST", "1")  # the smoke profile, no progress bars

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def smoke_data():
    "The built-in data set of the smoke profile."
    from deimv2_tfg.core import open_study
    from deimv2_tfg.synthetic import study_data

    return study_data(open_study("smoke"))
