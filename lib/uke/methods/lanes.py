"""Lanes: many edits of one model side by side; each row of a batch is read with the weights of its own edit."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from uke.models.model import blocks


class LowRank(NamedTuple):
    """What an adapter adds to one projection in each of N lanes: `scale` B A, with A (N, r, in) and B (N, out, r)."""

    down: Tensor
    up: Tensor
    scale: float


class Grouping(NamedTuple):
    """Rows of a batch by lane: A lanes in use, K slots for each; slots that no row needs are read and thrown away.

    `active` (A,): the lanes in use, None for all of them in order. `take` (A * K,): the row in each slot; None where
    the rows are sorted and each lane has K. `place` (B,): the slot of each row.
    """

    active: Tensor | None
    lanes: int
    take: Tensor | None
    place: Tensor | None

    def apart(self, x: Tensor) -> Tensor:
        """Rows (B, ...) by lane, (A, K, ...)."""
        x = x if self.take is None else x[self.take]
        return x.reshape(self.lanes, -1, *x.shape[1:])

    def together(self, x: Tensor) -> Tensor:
        """The inverse of `apart`."""
        x = x.reshape(-1, *x.shape[2:])
        return x if self.place is None else x[self.place]


def grouping(rows: Sequence[int], count: int, device: torch.device) -> Grouping:
    """How a batch, of which `rows` are the lanes row by row, is read by `count` lanes."""
    lanes = torch.tensor(rows)
    active, place, held = lanes.unique(return_inverse=True, return_counts=True)
    slots = int(held.max())
    used = None if len(active) == count else active.to(device)
    if bool((held == slots).all()) and bool((lanes[1:] >= lanes[:-1]).all()):
        return Grouping(used, len(active), None, None)
    order = place.argsort(stable=True)
    within = torch.empty_like(place)
    within[order] = torch.arange(len(rows)) - (held.cumsum(0) - held).repeat_interleave(held)
    slot = place * slots + within  # (B,)
    take = torch.zeros(len(active) * slots, dtype=torch.long)
    take[slot] = torch.arange(len(rows))
    return Grouping(used, len(active), take.to(device), slot.to(device))


class Lanes:
    """The weights of N edits of a model; while they are `laid`, the model reads row b with those of `rows[b]`.

    `weights` holds whole parameters by their name (N, *shape), `low_rank` what is added to a projection by its name.
    Everything else of the model is there once and shared.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Sequence[str],
        weights: Mapping[str, Tensor],
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> None:
        self.model, self.weights, self.low_rank = model, dict(weights), dict(low_rank or {})
        self.hold(ids, self.stacks)

    @property
    def stacks(self) -> list[Tensor]:
        """Every stack of weights, (N, ...), in one order."""
        return [
            *self.weights.values(),
            *(part for added in self.low_rank.values() for part in (added.down, added.up)),
        ]

    def hold(self, ids: Sequence[str], stacks: Sequence[Tensor]) -> None:
        """From here on these edits, with these `stacks`."""
        following = iter(stacks)
        self.weights = {name: next(following) for name in self.weights}
        self.low_rank = {
            name: LowRank(next(following), next(following), added.scale)
            for name, added in self.low_rank.items()
        }
        self.ids = list(ids)
        self.places = {edit: place for place, edit in enumerate(self.ids)}
        self.read(self.ids)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def read(self, ids: Sequence[str]) -> None:
        """The next forward passes have one row for each of these edits, in this order."""
        self.grouping = grouping([self.places[edit] for edit in ids], len(self.ids), self.device)
        self._chosen: dict[str, Tensor] = {}

    def weights_of(self, lane: int) -> list[Tensor]:
        """Copies of one lane's part of every stack, in the order of `stacks`."""
        return [stack.detach()[lane].clone() for stack in self.stacks]

    def change_norms(self) -> list[dict[str, float]]:
        """Of each lane, the relative Frobenius norm of the change of each weight."""
        own = {name: weight.detach() for name, weight in self.model.named_parameters()}
        found: list[dict[str, float]] = [{} for _ in self.ids]
        for lane, norms in enumerate(found):
            for name, stack in self.weights.items():
                norms[name] = relative_norm(stack[lane] - own[name], own[name])
            for name, added in self.low_rank.items():
                delta = added.scale * added.up[lane] @ added.down[lane]
                norms[f"{name}.weight"] = relative_norm(delta, own[f"{name}.weight"])
        return found

    @contextmanager
    def laid(self) -> Iterator[nn.Module]:
        """The model with these lanes in place of its own weights; it is as before on exit, also after an exception."""
        inner: dict[str, set[str]] = {name: set() for name in self.low_rank}
        for name in self.weights:
            module, _, own = name.rpartition(".")
            inner.setdefault(module, set()).add(own)
        modules = {name: self.model.get_submodule(name) for name in inner}
        taken = [name for name, module in modules.items() if "forward" in vars(module)]
        if taken or "lanes" in vars(self.model):
            raise RuntimeError(
                f"{''.join(taken[:1]) or 'the model'}: another call has replaced how it reads"
            )
        reads = {
            module: partial(self._linear if isinstance(module, nn.Linear) else self._each, name)
            for name, module in modules.items()
        }
        with replaced(reads):
            self.model.lanes = self
            try:
                yield self.model
            finally:
                del self.model.lanes

    def _of(self, name: str, stack: Tensor) -> Tensor:
        """The part of a stack that the lanes in use hold."""
        if self.grouping.active is None:
            return stack
        if torch.is_grad_enabled():
            # Used once in a forward pass; held, it would not be taken again where a block is computed again.
            return stack[self.grouping.active]
        if name not in self._chosen:
            self._chosen[name] = stack[self.grouping.active]
        return self._chosen[name]

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        by_lane = self.grouping.apart(x)  # (A, K, ..., in)
        flat = by_lane.flatten(1, -2)  # (A, K * T, in)
        weight, bias = (self._own(name, module, own) for own in ("weight", "bias"))
        if weight.dim() == 2:
            out = F.linear(flat, weight)  # (A, K * T, out)
        else:
            out = torch.bmm(flat, weight.to(x.dtype).transpose(1, 2))
        if bias is not None:
            out = out + (bias if bias.dim() == 1 else bias.to(x.dtype)[:, None])
        if name in self.low_rank:
            added = self.low_rank[name]
            down, up = (
                self._of(f"{name} {part}", getattr(added, part)).to(x.dtype)
                for part in ("down", "up")
            )
            out = out + added.scale * torch.bmm(
                torch.bmm(flat, down.transpose(1, 2)), up.transpose(1, 2)
            )
        return self.grouping.together(out.reshape(*by_lane.shape[:-1], -1))

    def _own(self, name: str, module: nn.Module, own: str) -> Tensor | None:
        stack = self.weights.get(f"{name}.{own}")
        return getattr(module, own) if stack is None else self._of(f"{name}.{own}", stack)

    def _each(self, name: str, plain: nn.Module, x: Tensor) -> Tensor:
        """A module of another kind (a norm), lane after lane."""
        start = f"{name}."
        stacks = {
            own.removeprefix(start): self._of(own, stack)
            for own, stack in self.weights.items()
            if own.startswith(start)
        }
        by_lane = self.grouping.apart(x)
        out = [
            functional_call(
                plain, {own: stack[lane].to(x.dtype) for own, stack in stacks.items()}, (one,)
            )
            for lane, one in enumerate(by_lane)
        ]
        return self.grouping.together(torch.stack(out))


class Below:
    """What the blocks below a place give: read in the first forward pass, handed out in every later one.

    `part`: which of several batches, each with states of its own, the next forward pass is on.
    """

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self.part = 0

    @property
    def states(self) -> Tensor | None:
        return self.held.get(self.part)

    def keep(self, places: Tensor | Sequence[int]) -> None:
        """The rows of the batch that go on."""
        if self.states is not None:
            self.held[self.part] = self.states[places]

    def highest(self, block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the highest of the blocks; a batch that was cut on its right gets what it needs."""
        if self.states is not None:
            return self.states[:, : states.shape[1]]
        given = block(states, *args, **kwargs)
        if isinstance(given, Tensor):
            self.held[self.part] = given.detach()
        return given

    def lower(self, block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the others."""
        return block(states, *args, **kwargs) if self.states is None else states


@contextmanager
def constant_below(model: nn.Module, names: Sequence[str]) -> Iterator[Below]:
    """Blocks below the lowest one that holds one of these modules or parameters are read once: nothing in them changes here.

    Every forward pass inside is on the same rows of its part (or those that `keep` leaves) and the same tokens, or their beginnings.
    """
    below, every = Below(), blocks(model)
    lowest = min(
        number
        for number, (prefix, _) in enumerate(every)
        if any(name.startswith(f"{prefix}.") for name in names)
    )
    with replaced(
        {
            block: below.highest if number == lowest - 1 else below.lower
            for number, (_, block) in enumerate(every[:lowest])
        }
    ):
        yield below


@contextmanager
def replaced(reads: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module reads through its function, which is given the module as it read before, then what it is called with.

    On exit, also after an exception, each reads as before; one inside another therefore leaves the outer one in place.
    """
    before = {module: vars(module).get("forward") for module in reads}
    try:
        for module, read in reads.items():
            # A shallow copy, made before: it shares everything but the replaced `forward`.
            module.forward = partial(read, copy.copy(module))
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def relative_norm(difference: Tensor, weight: Tensor) -> float:
    """Frobenius norm of a difference relative to that of the weight it changes."""
    tiny = torch.finfo(torch.float32).tiny
    return float(difference.float().norm() / weight.float().norm().clamp(min=tiny))
