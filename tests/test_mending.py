"""`doctor --fix` over damage by chance: nothing is lost without a name, nothing is guessed."""

import random

import pytest
from damage import DAMAGE, check_invariants, damaged_set, sound_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deimv2_tfg.doctor import check_dataset, fix_dataset

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.lists(st.sampled_from(sorted(DAMAGE)), max_size=4), st.integers(0, 2**32 - 1))
def test_nothing_is_lost_or_guessed_whatever_the_damage(tmp_path_factory, names, seed):
    root = damaged_set(tmp_path_factory.mktemp("damage") / "set", names, seed)
    check_invariants(root)


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_each_kind_of_damage_alone(tmp_path, name):
    check_invariants(damaged_set(tmp_path / "set", [name], seed=1))


def test_a_sound_set_comes_out_byte_for_byte(tmp_path):
    root = sound_set(tmp_path / "set", random.Random(0))
    assert check_dataset(root).errors == []
    out, changes = fix_dataset(root)
    assert changes.empty
    for file in root.glob("*/*.json"):
        assert (out / file.relative_to(root)).read_bytes() == file.read_bytes()
