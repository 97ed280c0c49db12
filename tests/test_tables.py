"""Laws of tables for a terminal."""

import pytest

from bnnflow.tables import in_columns


def test_cells_of_a_column_stand_below_one_another():
    lines = in_columns([["", "elpd"], ["a", "-1.5"], ["longer", "-10.25"]], right=[1])
    assert lines == ["          elpd", "a         -1.5", "longer  -10.25"]


def test_lines_have_no_spaces_at_their_end():
    assert in_columns([["a", "note"], ["bc", ""]]) == ["a   note", "bc"]
    assert in_columns([]) == []


def test_rows_have_the_same_columns():
    with pytest.raises(ValueError, match="zip"):
        in_columns([["a", "b"], ["c"]])
