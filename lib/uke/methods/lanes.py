"""Lanes: N independent copies of some weights of a model, all of them in one forward pass.

Each row of a batch is read with the weights of its own edit.
"""

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
    """What an adapter adds to a projection in N lanes: `scale` B A; A (N, r, in), B (N, out, r)."""

    down: Tensor
    up: Tensor
    scale: float


class Grouping(NamedTuple):
    """Rows of a batch by lane: A lanes in use, K slots for each; spare slots are thrown away."""

    active: Tensor | None  # (A,) the lanes in use, None for all of them in order
    lanes: int
    take: Tensor | None  # (A * K,) the row in each slot, None where rows are sorted and K each
    slot: Tensor | None  # (B,) the slot of each row

    def split(self, x: Tensor) -> Tensor:
        """Arrange rows (B, ...) by lane, (A, K, ...)."""
        x = x if self.take is None else x[self.take.to(x.device)]
        return x.reshape(self.lanes, -1, *x.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        x = x.reshape(-1, *x.shape[2:])
        return x if self.slot is None else x[self.slot.to(x.device)]


def grouping(rows: Sequence[int], count: int, device: torch.device) -> Grouping:
    """Arrange a batch, of which `rows` are the lanes row by row, for a model of `count` lanes."""
    lanes = torch.tensor(rows)
    active, index, held = lanes.unique(return_inverse=True, return_counts=True)
    slots = int(held.max())
    used = None if len(active) == count else active.to(device)
    if bool((held == slots).all()) and bool((lanes[1:] >= lanes[:-1]).all()):
        return Grouping(used, len(active), None, None)
    order = index.argsort(stable=True)
    within = torch.empty_like(index)
    within[order] = torch.arange(len(rows)) - (held.cumsum(0) - held).repeat_interleave(held)
    slot = index * slots + within  # (B,)
    take = torch.zeros(len(active) * slots, dtype=torch.long)
    take[slot] = torch.arange(len(rows))
    return Grouping(used, len(active), take.to(device), slot.to(device))


class Lanes:
    """The weights of N edits of a model.

        lanes = Lanes(model, ["ada", "alan"], {"model.layers.2.mlp.down_proj.weight": stack})
        lanes.read(["alan", "alan", "ada"])  # the lanes of the next batch, row by row
        with lanes.laid() as m:
            logits = m(input_ids=ids).logits

    `weights` holds whole parameters by name (N, *shape), `low_rank` what is added to a projection
    by its name. Everything else of the model is there once and shared.
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
        """Every stack of weights (N, ...), in a fixed order."""
        low_rank = (part for added in self.low_rank.values() for part in (added.down, added.up))
        return [*self.weights.values(), *low_rank]

    def hold(self, ids: Sequence[str], stacks: Sequence[Tensor]) -> None:
        """Hold these edits from here on, with these `stacks`."""
        following = iter(stacks)
        self.weights = {name: next(following) for name in self.weights}
        self.low_rank = {
            name: LowRank(next(following), next(following), added.scale)
            for name, added in self.low_rank.items()
        }
        self.ids = list(ids)
        self.index = {edit: lane for lane, edit in enumerate(self.ids)}
        self.read(self.ids)

    def read(self, ids: Sequence[str]) -> None:
        """Let the next forward passes have one row for each of these edits, in this order."""
        device = self.model.get_input_embeddings().weight.device
        self.grouping = grouping([self.index[edit] for edit in ids], len(self.ids), device)
        self._chosen: dict[str, Tensor] = {}

    def weights_of(self, lane: int) -> list[Tensor]:
        """Copy one lane's part of every stack."""
        return [stack.detach()[lane].clone() for stack in self.stacks]

    def change_norms(self) -> list[dict[str, float]]:
        """Return of each lane, by weight, the relative Frobenius norm of the change."""
        own = {name: weight.detach() for name, weight in self.model.named_parameters()}
        norms: list[dict[str, float]] = []
        for lane in range(len(self.ids)):
            deltas = {name: stack[lane] - own[name] for name, stack in self.weights.items()}
            for name, added in self.low_rank.items():
                deltas[f"{name}.weight"] = added.scale * added.up[lane] @ added.down[lane]
            norms.append({name: relative_norm(one, own[name]) for name, one in deltas.items()})
        return norms

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Apply a share of every lane's change, or more than all of it; undone on exit."""
        own, whole = dict(self.model.named_parameters()), (self.weights, self.low_rank)
        try:
            self.weights = {
                name: torch.lerp(own[name].expand_as(stack), stack, strength)
                for name, stack in self.weights.items()
            }
            self.low_rank = {
                name: added._replace(scale=strength * added.scale)
                for name, added in self.low_rank.items()
            }
            self.read(self.ids)  # which forgets the parts that the last batch chose
            yield
        finally:
            self.weights, self.low_rank = whole
            self.read(self.ids)

    @contextmanager
    def laid(self) -> Iterator[nn.Module]:
        """Put the lanes in place of the model's weights; undone on exit, also by an exception."""
        if "lanes" in vars(self.model):
            raise RuntimeError("the model has lanes already; expected one set of them at a time")
        names = [*self.low_rank, *(name.rpartition(".")[0] for name in self.weights)]
        forwards = {}
        for name in dict.fromkeys(names):
            module = self.model.get_submodule(name)
            forward = self._linear if isinstance(module, nn.Linear) else self._each
            forwards[module] = partial(forward, name)
        with replaced(forwards), attached(self.model, lanes=self):
            yield self.model

    def _of(self, name: str, stack: Tensor) -> Tensor:
        """Return the part of a stack that the lanes in use hold."""
        if self.grouping.active is None:
            return stack
        if name not in self._chosen:
            self._chosen[name] = stack[self.grouping.active.to(stack.device)]
        return self._chosen[name]

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        by_lane = self.grouping.split(x)  # (A, K, ..., in)
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
            down = self._of(f"{name} down", added.down).to(x.dtype)  # (A, r, in)
            up = self._of(f"{name} up", added.up).to(x.dtype)  # (A, out, r)
            inner = torch.bmm(flat, down.transpose(1, 2))  # (A, K * T, r)
            out = out + added.scale * torch.bmm(inner, up.transpose(1, 2))
        return self.grouping.join(out.reshape(*by_lane.shape[:-1], -1))

    def _own(self, name: str, module: nn.Module, own: str) -> Tensor | None:
        stack = self.weights.get(f"{name}.{own}")
        return getattr(module, own) if stack is None else self._of(f"{name}.{own}", stack)

    def _each(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """Compute a module of another kind (a norm) lane after lane."""
        stacks = {
            own.removeprefix(f"{name}."): self._of(own, stack)
            for own, stack in self.weights.items()
            if own.startswith(f"{name}.")
        }
        out = []
        for lane, rows in enumerate(self.grouping.split(x)):
            weights = {own: stack[lane].to(x.dtype) for own, stack in stacks.items()}
            out.append(functional_call(module, weights, (rows,)))
        return self.grouping.join(torch.stack(out))


def relative_norm(difference: Tensor, weight: Tensor) -> float:
    """Return the Frobenius norm of a difference relative to that of the weight it changes."""
    tiny = torch.finfo(torch.float32).tiny
    return float(difference.float().norm() / weight.float().norm().clamp(min=tiny))


class LowerBlocks:
    """The states that leave the blocks below the trained ones: computed once, then handed out.

    `part`: which of several batches, each with states of its own, the next forward pass is on.
    """

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        self.part = 0

    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows of the batch."""
        if self.part in self.states:
            self.states[self.part] = self.states[self.part][rows]

    def forward(self, is_highest: bool, block: nn.Module, states: Tensor, *args, **kwargs) -> Any:
        """Stand in for a block; a batch that was cut on its right gets what it needs."""
        if self.part in self.states:
            return self.states[self.part][:, : states.shape[1]] if is_highest else states
        output = block(states, *args, **kwargs)
        if is_highest and isinstance(output, Tensor):
            self.states[self.part] = output.detach()
        return output


@contextmanager
def lower_blocks_once(model: nn.Module, names: Sequence[str]) -> Iterator[LowerBlocks]:
    """Compute the blocks below the lowest one with any of these modules or parameters only once.

    Every forward pass inside is on the tokens of its part, or their beginnings, in the rows kept.
    """
    lower, every = LowerBlocks(), blocks(model)
    lowest = min(
        number
        for number, (prefix, _) in enumerate(every)
        if any(name.startswith(f"{prefix}.") for name in names)
    )
    forwards = {
        block: partial(lower.forward, number == lowest - 1)
        for number, (_, block) in enumerate(every[:lowest])
    }
    with replaced(forwards):
        yield lower


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules; each function gets the module as it was, then arguments."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            # A shallow copy, made before: it shares everything but the replaced `forward`.
            module.forward = partial(forward, copy.copy(module))
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


@contextmanager
def attached(model: nn.Module, **attributes: Any) -> Iterator[None]:
    """Give the model these attributes; on exit it has those of before."""
    before = {name: vars(model)[name] for name in attributes if name in vars(model)}
    vars(model).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(model)[name]
        vars(model).update(before)
