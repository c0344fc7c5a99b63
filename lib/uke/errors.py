"""The error of bad input, the error of an edit that diverges, and the nearest valid name."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one line that names the file, the place in it and what was expected."""


@contextmanager
def about(place: str) -> Iterator[None]:
    """Begin the line of an InputError inside with the place that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


class Diverged(FloatingPointError):
    """Writing these edits (ids) gave a number that is not finite; one line says what to change."""

    def __init__(self, message: str, edits: Iterable[str]) -> None:
        super().__init__(message)
        self.edits = list(edits)


def nearest(name: str, valid: Iterable[str]) -> str:
    """End of an error message about an unknown `name`: the closest valid one, or all of them."""
    valid = sorted(valid)
    if close := difflib.get_close_matches(name, valid, n=1):
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of {', '.join(valid)}" if valid else ""
