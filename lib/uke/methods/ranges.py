"""Types of a method's choices: numbers in a range, and layers."""

from typing import Annotated

from pydantic import BeforeValidator, Field, StrictInt

# Strict: neither text nor true and false.
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1)]
Counted = Annotated[StrictInt, Field(ge=0)]
Layer = Annotated[StrictInt, Field(ge=0)] | Annotated[float, Field(strict=True, ge=0, le=1)]
# One layer number becomes a list of one, so that equal choices have equal fingerprints.
Several = BeforeValidator(lambda value: (value,) if type(value) in (int, float) else value)
Layers = Annotated[tuple[Layer, ...], Field(min_length=1), Several]
