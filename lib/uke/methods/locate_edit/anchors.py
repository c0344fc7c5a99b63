"""Find where locate-then-edit methods write: sites, anchors and their windows, hidden states.

An anchor is the position whose hidden state is set; its window holds the target tokens that this
state should make likely. A key is what a site's `down_proj` reads at a position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from uke.models.generate import surprisals
from uke.models.model import blocks, module_names, wide
from uke.models.prompts import Example, group_by_length, padded

if TYPE_CHECKING:
    from uke.methods.recipes import LocateRecipe


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

        A norm gives every output the same length. Behind one, the direction is met exactly and the
        length as far as possible.
        """
        if self.norm is None:
            return change
        output = wide(output)
        gain = self.through(torch.ones_like(output[:1]))  # (1, D)
        wanted = (self.through(output) + change) / gain
        return wanted * output.pow(2).mean(-1, keepdim=True).sqrt() - output


def sites(model: nn.Module, layers: Sequence[int | float]) -> list[Site]:
    """Return the sites of these layers, lowest first.

    InputError for a layer out of range or without `down_proj`.
    """
    every, found = blocks(model), []
    for name in module_names(model, layers, ("down_proj",)):
        block = next(block for prefix, block in every if name.startswith(f"{prefix}."))
        parts = dict(block.named_children())
        norms = [part for part in parts if re.match("post_.*(feedforward|mlp)", part)]
        norm = parts[norms[0]] if norms else None
        found.append(Site(name, block, model.get_submodule(name), norm))
    return found


class Window(NamedTuple):
    """Positions of some target tokens (`start` to before `stop`) and of the anchor before them."""

    anchor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Located:
    """Edits as token ids, with the windows of each; anchors are numbered through, edit by edit.

    `nested`: the loss of an anchor covers every later window too.
    """

    ids: list[str]
    examples: list[Example]
    windows: list[list[Window]]
    nested: bool = False

    @property
    def anchors(self) -> list[tuple[int, int]]:
        """Index of the edit and position of each anchor."""
        return [
            (edit, window.anchor) for edit, windows in enumerate(self.windows) for window in windows
        ]

    def split(self) -> Iterator[Located]:
        """Yield each edit alone."""
        for edit, one, windows in zip(self.ids, self.examples, self.windows, strict=True):
            yield Located([edit], [one], [windows], self.nested)

    def notes(self, recipe: LocateRecipe) -> list[str]:
        """Name the edits whose answer is too short for the method's rule: one window holds it."""
        if recipe.anchors == "last":
            return []
        return [
            f"edit '{edit}': the answer is shorter than a window of {recipe.window} tokens; "
            "one window"
            for edit, one in zip(self.ids, self.examples, strict=True)
            if len(one.ids) - one.prompt_length < recipe.window
        ]


def locate(model: nn.Module, examples: Mapping[str, Example], recipe: LocateRecipe) -> Located:
    """Find anchors and windows of every edit by the recipe's rule; `examples` by id of the edit."""
    every, windows = list(examples.values()), []
    if recipe.anchors == "surprisal":
        values = surprisals(model, every, list(examples))
    for number, one in enumerate(every):
        span = range(one.prompt_length, len(one.ids))
        if recipe.anchors == "last":
            starts = [span.start]
        elif recipe.anchors == "surprisal":
            starts = _peaks(values[number], recipe.window, span.start)
        else:
            starts = list(span[:: recipe.window])
        stops = [*starts[1:], span.stop]
        windows.append(
            [Window(start - 1, start, stop) for start, stop in zip(starts, stops, strict=True)]
        )
    return Located(list(examples), every, windows, recipe.anchors == "nested")


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


def by_window(model: nn.Module, located: Located) -> list[list[float]]:
    """Return the mean log-probability (nats) of a token of each window of each edit."""
    values, found = surprisals(model, located.examples, located.ids), []
    for surprisal, one, windows in zip(values, located.examples, located.windows, strict=True):
        spans = [
            (start - one.prompt_length, stop - one.prompt_length) for _, start, stop in windows
        ]
        found.append([-float(surprisal[start:stop].mean()) for start, stop in spans])
    return found


def chunks(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices of sequences of similar length with their ids (B, T), padded right.

    Causality alone keeps padding from what is read.
    """
    for rows in group_by_length([len(sequence) for sequence in sequences]):
        yield rows, padded([sequences[row] for row in rows]).to(device)


class Call(NamedTuple):
    """What a module was given, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


class _AllSeen(Exception):
    """Every module was called: the rest of the forward pass can be spared."""


@torch.no_grad()
def look(model: nn.Module, ids: Tensor, modules: Sequence[nn.Module]) -> list[Call]:
    """Return the call of each module in one forward pass over `ids` (B, T).

    The pass ends as soon as all of them were called.
    """
    seen: dict[nn.Module, Call] = {}

    def keep(module, args, kwargs, output):
        seen[module] = Call(args, kwargs, output[0] if isinstance(output, tuple) else output)
        if len(seen) == len(set(modules)):
            raise _AllSeen

    with ExitStack() as hooks:
        for module in dict.fromkeys(modules):
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        try:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        except _AllSeen:
            pass
    return [seen[module] for module in modules]


class States(NamedTuple):
    """What stands at n anchors: keys (n, W) and outputs (n, D) of a site, hidden states (n, D).

    `hidden` is read after the last site; `others` (m, W) are the keys at all other positions.
    """

    keys: Tensor
    outputs: Tensor
    hidden: Tensor
    others: Tensor


def states(model: nn.Module, located: Located, site: Site, last: Site) -> States:
    """Read the states with the weights as they are, in the order of `located.anchors`."""
    at_anchor: dict[tuple[int, int], list[Tensor]] = {}
    others = []
    for rows, ids in chunks([one.ids for one in located.examples], model.device):
        inner, outer = look(model, ids, (site.projection, last.block))
        keys = inner.args[0]
        lengths = torch.tensor([[len(located.examples[row].ids)] for row in rows])
        rest = torch.arange(ids.shape[1])[None] < lengths  # (B, T)
        for index, row in enumerate(rows):
            for window in located.windows[row]:
                at = (index, window.anchor)
                rest[at] = False
                at_anchor[row, window.anchor] = [keys[at], inner.output[at], outer.output[at]]
        others.append(keys[rest.to(ids.device)])
    columns = zip(*(at_anchor[anchor] for anchor in located.anchors), strict=True)
    return States(*(torch.stack(column) for column in columns), torch.cat(others))
