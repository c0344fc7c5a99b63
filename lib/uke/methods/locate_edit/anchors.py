"""Where locate-then-edit methods write: sites, anchors with their windows, and the hidden states there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from uke.models.generate import surprisals
from uke.models.model import blocks, module_names, wide
from uke.models.prompts import Example, group_by_length

if TYPE_CHECKING:
    from uke.methods.recipes import LocateRecipe


class Site(NamedTuple):
    """One place to write: a block and its `down_proj`, with the norm that follows it in some architectures (Gemma)."""

    name: str
    block: nn.Module
    projection: nn.Module
    norm: nn.Module | None

    def through(self, output: Tensor) -> Tensor:
        """What the block adds to the hidden state for an output of its projection."""
        return output if self.norm is None else self.norm(output)

    def back(self, output: Tensor, change: Tensor) -> Tensor:
        """The change of the projection's output (n, D) that changes what the block adds by `change`.

        A norm gives every output the same length: behind one the direction is met, and the length as far as it can be.
        """
        if self.norm is None:
            return change
        output = wide(output)
        gain = self.through(torch.ones_like(output[:1]))  # (1, D)
        wanted = (self.through(output) + change) / gain
        return wanted * output.pow(2).mean(-1, keepdim=True).sqrt() - output


def sites(model: nn.Module, layers: Sequence[int | float]) -> list[Site]:
    """The places that `layers` name, from the bottom; InputError for a layer out of range or without `down_proj`."""
    every = blocks(model)
    found = []
    for name in module_names(model, layers, ("down_proj",)):
        block = next(block for prefix, block in every if name.startswith(f"{prefix}."))
        after = (
            part
            for own, part in block.named_children()
            if own.startswith("post_") and ("feedforward" in own or "mlp" in own)
        )
        found.append(Site(name, block, model.get_submodule(name), next(after, None)))
    return found


class Window(NamedTuple):
    """Positions of some target tokens, `start` to before `stop`, and of the anchor just before them."""

    anchor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Located:
    """The edits as token ids, and the windows of each; anchors are counted through, edit by edit.

    `nested`: the loss of an anchor covers every later window too.
    """

    ids: list[str]
    examples: list[Example]
    windows: list[list[Window]]
    nested: bool = False

    @property
    def anchors(self) -> list[tuple[int, int]]:
        """Edit and position of each anchor."""
        return [
            (edit, window.anchor) for edit, windows in enumerate(self.windows) for window in windows
        ]

    def notes(self, peer: LocateRecipe) -> list[str]:
        """Where an answer is too short for the method's rule, so that one window holds it."""
        if peer.anchors == "last":
            return []
        short = [
            edit
            for edit, one in zip(self.ids, self.examples, strict=True)
            if len(one.ids) - one.prompt_length < peer.window
        ]
        return [
            f"edit '{edit}': the answer is shorter than a window of {peer.window} tokens; one window"
            for edit in short
        ]


def locate(model: nn.Module, examples: Mapping[str, Example], peer: LocateRecipe) -> Located:
    """Anchors and windows of every edit by the peer's rule; `examples` is what `finetune.prepare` gives."""
    every = list(examples.values())
    spans = [range(one.prompt_length, len(one.ids)) for one in every]
    if peer.anchors == "last":
        cuts = [[span.start] for span in spans]
    elif peer.anchors == "surprisal":
        surprisal = surprisals(model, every, list(examples))
        cuts = [
            _peaks(values, peer.window, span.start)
            for values, span in zip(surprisal, spans, strict=True)
        ]
    else:
        cuts = [list(span[:: peer.window]) for span in spans]
    windows = [
        [
            Window(start - 1, start, stop)
            for start, stop in zip(starts, [*starts[1:], span.stop], strict=True)
        ]
        for starts, span in zip(cuts, spans, strict=True)
    ]
    return Located(list(examples), every, windows, peer.anchors == "nested")


def _peaks(surprisal: Tensor, window: int, first: int) -> list[int]:
    """Where windows begin: at the most surprising token half a window to one and a half after the last beginning.

    The anchor is then the state that should have foreseen that token. The range is this project's choice.
    """
    starts = [0]
    while len(surprisal) - starts[-1] > window:
        low = starts[-1] + max(1, window // 2)
        ahead = surprisal[low : starts[-1] + max(1, window * 3 // 2) + 1]
        starts.append(low + int(ahead.argmax()))
    return [first + start for start in starts]


def by_window(model: nn.Module, located: Located) -> list[list[float]]:
    """Mean log-probability (nats) of a token of each window of each edit: how far a method came, and where."""
    return [
        [
            -float(nll[window.start - one.prompt_length : window.stop - one.prompt_length].mean())
            for window in windows
        ]
        for nll, one, windows in zip(
            surprisals(model, located.examples, located.ids),
            located.examples,
            located.windows,
            strict=True,
        )
    ]


def chunks(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of like length with their ids (B, T), padded right: causality alone keeps padding from what is read."""
    for rows in group_by_length([len(sequence) for sequence in sequences]):
        yield rows, padded([sequences[row] for row in rows], device)


def padded(sequences: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> Tensor:
    """Token ids (B, T), zeros where a sequence is shorter than the longest."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_side="left" if left else "right"
    ).to(device)


class Call(NamedTuple):
    """What a module was given, and what it gave."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


class _Enough(Exception):
    """Everything wanted was seen: the rest of the forward pass can be spared."""


@torch.no_grad()
def look(model: nn.Module, ids: Tensor, modules: Sequence[nn.Module]) -> list[Call]:
    """What each module is given and gives in one forward pass over `ids` (B, T), which ends when all were seen."""
    seen: dict[nn.Module, Call] = {}

    def keep(module, args, kwargs, output):
        seen[module] = Call(args, kwargs, output[0] if isinstance(output, tuple) else output)
        if len(seen) == len(set(modules)):
            raise _Enough

    with ExitStack() as hooks:
        for module in dict.fromkeys(modules):
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        try:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        except _Enough:
            pass
    return [seen[module] for module in modules]


class States(NamedTuple):
    """At the anchors: keys (n, W) and outputs (n, D) of a site's projection, hidden states (n, D) after the last site.

    `others` (m, W): keys at all other positions of the edits.
    """

    keys: Tensor
    outputs: Tensor
    hidden: Tensor
    others: Tensor


def states(model: nn.Module, located: Located, site: Site, last: Site) -> States:
    """Read with the weights as they are; n anchors in the order of `located.anchors`."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    others = []
    for rows, ids in chunks([one.ids for one in located.examples], model.device):
        inner, outer = look(model, ids, (site.projection, last.block))
        rest = torch.arange(ids.shape[1])[None] < torch.tensor(
            [[len(located.examples[row].ids)] for row in rows]
        )
        for place, row in enumerate(rows):
            for window in located.windows[row]:
                at = (place, window.anchor)
                rest[at] = False
                found[row, window.anchor] = [inner.args[0][at], inner.output[at], outer.output[at]]
        others.append(inner.args[0][rest.to(ids.device)])
    columns = zip(*(found[anchor] for anchor in located.anchors), strict=True)
    return States(*(torch.stack(column) for column in columns), torch.cat(others))
