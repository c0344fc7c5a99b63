"""Find where locate-then-edit methods write: sites, anchors and their windows, hidden states.

An anchor is the position whose hidden state is set; its window holds the target tokens that this
state should make likely. A key is what a site's `down_proj` reads at a position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from uke.models.generate import surprisals
from uke.models.model import blocks, module_names, wide
from uke.models.prompts import Example, group_by_length, padded

if TYPE_CHECKING:
    from uke.methods.locate_edit.solvers import LocateRecipe


class Site(NamedTuple):
    """A block and its `down_proj`, with the norm that follows it in some architectures (Gemma)."""

    name: str
    block: nn.Module
    projection: nn.Module
    norm: nn.Module | None

    def through(self, output: Tensor) -> Tensor:
        """Return what the block adds to the hidden state for an output of its projection."""
        return output if self.norm is None else self.norm(output)

    def back(self, output: Tensor, change: Tensor) -> Tensor:
        """Return the change of the projection's output (n, D) that adds `change` to the block's.

        Behind a norm, which fixes the length, the direction is met exactly.
        """
        if self.norm is None:
            return change
        output = wide(output)
        gain = self.through(torch.ones_like(output[:1]))  # (1, D)
        wanted = (self.through(output) + change) / gain
        return wanted * output.pow(2).mean(-1, keepdim=True).sqrt() - output


def sites(model: nn.Module, layers: Sequence[int | float]) -> list[Site]:
    """Return the sites of these layers, lowest first; InputError for one without `down_proj`."""
    every, found = blocks(model), []
    for name in module_names(model, layers, ("down_proj",)):
        block = next(block for prefix, block in every if name.startswith(f"{prefix}."))
        parts = dict(block.named_children())
        norm = next((own for own in parts if re.match("post_.*(feedforward|mlp)", own)), None)
        found.append(Site(name, block, model.get_submodule(name), parts.get(norm)))
    return found


class Window(NamedTuple):
    """Positions of some target tokens (`start` to before `stop`) and of the anchor before them."""

    anchor: int
    start: int
    stop: int


class Located(NamedTuple):
    """An edit by its id, as token ids, with its windows in order."""

    edit: str
    example: Example
    windows: list[Window]


def locate(model: nn.Module, given: Mapping[str, Example], recipe: LocateRecipe) -> list[Located]:
    """Find anchors and windows of every edit by the recipe's rule; `given` by id of the edit."""
    found = []
    if recipe.anchors == "surprisal":
        values = surprisals(model, list(given.values()), list(given))
    for number, (edit, one) in enumerate(given.items()):
        span = range(one.prompt_length, len(one.ids))
        if recipe.anchors == "last":
            starts = [span.start]
        elif recipe.anchors == "surprisal":
            starts = _peaks(values[number], recipe.window, span.start)
        else:
            starts = list(span[:: recipe.window])
        spans = zip(starts, [*starts[1:], span.stop], strict=True)
        found.append(Located(edit, one, [Window(start - 1, start, stop) for start, stop in spans]))
    return found


def _peaks(surprisal: Tensor, window: int, first: int) -> list[int]:
    """Begin each window at the most surprising token, 0.5 to 1.5 windows after the last beginning.

    The anchor is then the state that should have foreseen that token. The range is our choice.
    """
    starts = [0]
    while len(surprisal) - starts[-1] > window:
        low = starts[-1] + max(1, window // 2)
        ahead = surprisal[low : starts[-1] + max(1, window * 3 // 2) + 1]
        starts.append(low + int(ahead.argmax()))
    return [first + start for start in starts]


def chunks(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield indices of sequences of similar length, their ids (B, T), and which are no padding.

    Padding stands to the right: causality alone keeps it from what is read.
    """
    for rows in group_by_length([len(sequence) for sequence in sequences]):
        ids = padded([sequences[row] for row in rows])
        lengths = torch.tensor([[len(sequences[row])] for row in rows])
        real = torch.arange(ids.shape[1]) < lengths  # (B, T)
        yield rows, ids.to(device), real.to(device)


class Call(NamedTuple):
    """What a module was given, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


class _AllSeen(Exception):
    """Every module was called: the rest of the forward pass can be spared."""


@torch.no_grad()
def look(model: nn.Module, ids: Tensor, modules: Sequence[nn.Module]) -> list[Call]:
    """Return the call of each module in one forward pass over `ids` (B, T)."""
    seen: dict[nn.Module, Call] = {}

    def keep(module, args, kwargs, output):
        seen[module] = Call(args, kwargs, output[0] if isinstance(output, tuple) else output)
        if len(seen) == len(set(modules)):
            raise _AllSeen

    with ExitStack() as hooks, suppress(_AllSeen):
        for module in dict.fromkeys(modules):
            hooks.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [seen[module] for module in modules]


class States(NamedTuple):
    """What stands at n anchors: keys (n, W) and outputs (n, D) of a site, hidden states (n, D).

    `hidden` is read after the last site; `others` (m, W) are the keys at all other positions.
    """

    keys: Tensor
    outputs: Tensor
    hidden: Tensor
    others: Tensor


def states(model: nn.Module, located: Sequence[Located], site: Site, last: Site) -> States:
    """Read the states by edit and window, with the weights as they are, on the site's device."""
    at_anchors: dict[int, tuple[Tensor, ...]] = {}
    others = []
    for rows, ids, real in chunks([one.example.ids for one in located], model.device):
        inner, outer = look(model, ids, (site.projection, last.block))
        keys = inner.args[0]
        real = real.to(keys.device)
        for index, row in enumerate(rows):
            anchors = [window.anchor for window in located[row].windows]
            real[index, anchors] = False
            read = (keys, inner.output, outer.output)
            at_anchors[row] = tuple(one[index, anchors].to(keys.device) for one in read)
        others.append(keys[real])
    columns = zip(*(at_anchors[row] for row in range(len(located))), strict=True)
    return States(*map(torch.cat, columns), torch.cat(others))
