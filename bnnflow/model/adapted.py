"""Interfaces that a caller's object may meet by its members alone: it is adapted once, where it
comes in.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["Adapted", "Interface"]


class Interface:
    """A base class with defaults, some members of which an object may or may not have."""

    @property
    def given(self) -> Any:
        """The object that `of` was given; this itself, as a rule."""
        return self

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self.given).__name__


class Adapted(Interface):
    """What an adapter does beside being of the interface: it takes the object's own members in
    place of defaults.
    """

    _optional: ClassVar[tuple[str, ...]]

    def __init__(self, given: Any) -> None:
        self._given = given
        for member in self._optional:
            if hasattr(given, member):
                setattr(self, member, getattr(given, member))

    def __repr__(self) -> str:
        return repr(self._given)

    @property
    def given(self) -> Any:
        """The object that was adapted."""
        return self._given

    def _has(self, member: str) -> bool:
        return member in vars(self)
