"""A bar shows to a person, at a terminal or in a notebook, and to nobody else."""

from __future__ import annotations

import io

import pytest

from bnnflow.progress import progress_bar


class Notebook(io.StringIO):
    """What a notebook puts in the place of stderr: no terminal, and a module of its own."""

    __module__ = "ipykernel.iostream"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown"), [(Notebook, True), (Terminal, True), (io.StringIO, False)]
)
@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_to_a_person(stream, shown: bool, progress: bool, monkeypatch) -> None:
    written = stream()
    monkeypatch.setattr("sys.stderr", written)
    with progress_bar(3, "climbing", progress) as bar:
        bar.update(3)
    assert ("climbing" in written.getvalue()) == (shown and progress)
