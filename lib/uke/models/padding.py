"""Rows of like length share a forward pass, so that little of it is padding."""

from collections.abc import Sequence

import torch

# Of one forward pass: tokens at most, with padding, and the share of them that padding may have.
TOKENS, PADDING = 8192, 0.15
# Of one that is trained by a CPU: all its states are kept, and more rows at once were measured to cost time, not to save it.
TRAINING_TOKENS = 1024


def training_tokens(device: torch.device) -> int:
    """Tokens of one forward pass that a backward pass follows, at most."""
    return min(TOKENS, TRAINING_TOKENS) if device.type == "cpu" else TOKENS


def parts(lengths: Sequence[int], tokens: int | None = None) -> list[list[int]]:
    """Places of rows that are read together, the longest first; each part within `tokens` (TOKENS if None), but never empty."""
    tokens = TOKENS if tokens is None else tokens
    found: list[list[int]] = []
    longest = real = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        rows = len(found[-1]) + 1 if found else 0
        if (
            not rows
            or rows * longest > tokens
            or real + lengths[place] < (1 - PADDING) * rows * longest
        ):
            found.append([])
            longest, real = lengths[place], 0
        found[-1].append(place)
        real += lengths[place]
    return found
