"""The error of bad input, in one line; the error of an edit that diverges; the nearest name."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from reprlib import repr as short
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)


class InputError(ValueError):
    """Bad input: one line that names the file, the place in it and what was expected."""


@contextmanager
def about(place: str) -> Iterator[None]:
    """Begin the line of an InputError inside with the place that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


@contextmanager
def located(place: str, fields: Iterable[str] = ()) -> Iterator[None]:
    """Turn the first thing wrong with a record into an InputError of one line.

    A name that is none of `fields` comes with the nearest one.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        where = f"{place}, field '{name}'" if name else place
        unknown = first["type"] == "extra_forbidden"
        more = nearest(name, fields) if unknown else f"; found {short(first['input'])}"
        raise InputError(" ".join(f"{where}: {first['msg']}{more}".split())) from None
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{place}: field {error} is missing") from None
    except (LookupError, TypeError, AttributeError, ValueError, SyntaxError, OSError) as error:
        raise InputError(" ".join(f"{place}: not of the expected form: {error}".split())) from None


class Told(type(BaseModel)):
    """A class whose call with wrong fields ends in an InputError of one line."""

    def __call__(cls, *values: Any, **fields: Any) -> Any:
        with located(cls.__name__, cls.model_fields):
            return super().__call__(*values, **fields)


def typed(function: Callable) -> Callable:
    """Refuse arguments of other types than the signature has, in one line and before the call."""
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    fields = {name: (hints[name], None) for name in signature.parameters if name in hints}
    arguments = create_model(function.__name__, __config__=ANY_TYPE, **fields)

    @functools.wraps(function)
    def call(*given: Any, **options: Any) -> Any:
        with located(function.__name__):
            arguments.model_validate(signature.bind(*given, **options).arguments, strict=True)
        return function(*given, **options)

    return call


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
