"""Another number of processes may change the sequences of a step: said, with what keeps them."""

import re

import pytest

from torchtitan.components.checkpoint.batch_change import warn_of_other_batch


@pytest.mark.parametrize("before, local, ranks", [(4, 2, 1), (4, 2, 2), (4, 4, 2), (12, 8, 3)])
def test_the_settings_that_it_names_keep_the_sequences(caplog, before, local, ranks):
    warn_of_other_batch(before, 99, local_batch_size=local, dp_degree=ranks)
    (line,) = caplog.messages
    assert line.startswith(f"A step has 99 sequences from now on; it had {before} ")
    assert f"training.global_batch_size = {before}" in line
    named = re.search(r"local_batch_size = (\d+)", line)
    assert before % ((int(named[1]) if named else local) * ranks) == 0


def test_ranks_that_cannot_share_them_are_told_how_many_could(caplog):
    warn_of_other_batch(4, 6, local_batch_size=2, dp_degree=3)
    assert "3 data-parallel ranks can't share 4 evenly" in caplog.text
    assert "a number that divides 4" in caplog.text


def test_phases_have_a_key_of_their_own(caplog):
    warn_of_other_batch(4, 6, local_batch_size=2, dp_degree=1, in_phase=True)
    assert "batch_size of [[schedule.phase]]" in caplog.text


def test_nothing_is_said_where_nothing_has_changed(caplog):
    warn_of_other_batch(4, 4, local_batch_size=2, dp_degree=2)
    assert not caplog.messages
