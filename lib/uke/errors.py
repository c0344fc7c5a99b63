"""The one error a user's input can cause, and the nearest valid name to a misspelt one."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one line that names the file, the place in it and what was expected."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """End of an error message about an unknown `name`: the closest valid one, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(valid)}"
