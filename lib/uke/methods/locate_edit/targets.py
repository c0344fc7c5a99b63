"""Target values: the change of a hidden state that makes the text after it likely, for all edits of a batch at once."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from uke.errors import Diverged
from uke.methods.lanes import Below, constant_below
from uke.methods.locate_edit.anchors import Located, Site, padded, states
from uke.models.model import kept, wide
from uke.models.prompts import group_by_length

if TYPE_CHECKING:
    from uke.methods.recipes import LocateRecipe


@dataclass
class Values:
    """Wanted hidden states after the last site (n, D), and how they were found.

    `losses`: mean over the edits, for each step of each round of windows; `stopped` "loss" if every anchor ended below
    the peer's `stop_loss`. `courses` and `ended`: of each edit by its id, its own losses, and how many of its anchors ended so.
    """

    hidden: Tensor
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    stopped: str = "loss"
    courses: dict[str, list[float]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    progress: Callable[[int, float], None] | None = None

    def note(self, courses: Mapping[str, Sequence[float]], ended: Collection[str]) -> None:
        """The losses of each edit in one round, and the edits that ended below the peer's `stop_loss`; they count with their last loss."""
        for edit, course in courses.items():
            self.courses.setdefault(edit, []).extend(course)
        self.ended.update(ended)
        self.steps += max(len(course) - (edit in ended) for edit, course in courses.items())
        every = list(courses.values())
        self.losses += [
            sum(course[min(step, len(course) - 1)] for course in every) / len(every)
            for step in range(max(map(len, every)))
        ]


def target_values(
    model: nn.Module,
    located: Located,
    site: Site,
    peer: LocateRecipe,
    progress: Callable[[int, float], None] | None = None,
) -> Values:
    """Hidden states that the anchors should have after `site`, in the order of `located.anchors`.

    Window by window, all edits together: each has its own delta, added to what the site's projection gives at the
    anchor, its own loss, clamp and end, and Adam is element-wise, so this is one edit at a time but for rounding.
    Earlier deltas stay in place, frozen; the text so far is teacher-forced. FloatingPointError names an edit whose
    loss is not finite. `progress(steps, loss)` follows each step.
    """
    here = states(model, located, site, site)
    state = wide(
        here.hidden if site.norm is None else here.outputs
    )  # what a delta is measured against
    values = Values(state, progress=progress)
    deltas = torch.zeros_like(state)  # (n, D)
    first = [
        0,
        *itertools.accumulate(map(len, located.windows)),
    ]  # number of each edit's first anchor
    with kept(model, {}):
        model.requires_grad_(False)
        for turn in range(max(map(len, located.windows))):
            chunks: list[_Chunk] = []
            for rows in _rows(located, turn):
                chunks.append(chunk := _Chunk(model, located, site, rows, turn))
                chunk.read_before([deltas[first[row] : first[row] + turn] for row in rows])
                places = [first[row] + turn for row in rows]
                with constant_below(model, [site.name]) as chunk.below:
                    deltas[places] = _optimise(chunk, state[places].norm(dim=-1), peer, values)
            values.note(
                {edit: one for chunk in chunks for edit, one in chunk.courses.items()},
                [edit for chunk in chunks for edit in chunk.ended],
            )
    with torch.no_grad():
        before, after = (site.through(wide(here.outputs) + change) for change in (0, deltas))
    values.hidden = here.hidden.double() + (deltas if site.norm is None else after - before)
    return values


def _rows(located: Located, turn: int) -> Iterator[list[int]]:
    """Edits that have a window of this number, those of like length together, as many as a forward pass holds."""
    rows = [row for row, windows in enumerate(located.windows) if len(windows) > turn]
    # What an edit's rows end with: the last window in the loss.
    ends = [located.windows[row][-1 if located.nested else turn].stop for row in rows]
    return ([rows[place] for place in part] for part in group_by_length(ends))


def _optimise(chunk: "_Chunk", scale: Tensor, peer: LocateRecipe, values: Values) -> Tensor:
    """Deltas (B, D) of one chunk; `scale` (B,) is the norm of the state that each is added to."""
    weights = chunk.weights(peer)  # (B, M)
    delta = torch.zeros(
        len(scale), chunk.width, device=scale.device, dtype=scale.dtype, requires_grad=True
    )
    adam = torch.optim.Adam([delta], lr=peer.learning_rate, fused=True)
    last = torch.full_like(scale, math.inf)  # (B,) the loss each row had when it was last read
    going = torch.arange(len(scale), device=scale.device)
    for step in range(peer.steps):
        here = delta[going]
        losses = (chunk.losses(here) * weights[going]).sum(-1) + peer.decay * here.norm(
            dim=-1
        ) / scale[going] ** 2  # (G,)
        _refuse(chunk, losses, peer)
        last[going] = losses.detach()
        for edit, value in zip(chunk.ids, losses.tolist(), strict=True):
            chunk.courses[edit].append(value)
        if values.progress:
            values.progress(len(values.losses) + step + 1, last.mean().item())
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        if (stay := losses.detach() >= peer.stop_loss).logical_not().any():
            chunk.ended += [
                edit for edit, stays in zip(chunk.ids, stay.tolist(), strict=True) if not stays
            ]
            going = going[stay]
            if not len(going):
                return delta.detach()
            chunk.keep(stay.nonzero().squeeze(1))
        before = delta.detach().clone()
        adam.step()
        with torch.no_grad():
            norm = delta[going].norm(dim=-1)  # (G,)
            _refuse(chunk, norm, peer)
            short = (
                peer.clamp * scale[going] / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            ).clamp(max=1)
            # Whoever has ended stays: what Adam adds by momentum is taken back.
            delta.copy_(before.index_copy(0, going, delta[going] * short[:, None]))
    values.stopped = "steps"
    return delta.detach()


def _refuse(chunk: "_Chunk", values: Tensor, peer: LocateRecipe) -> None:
    if broken := [
        edit
        for edit, value in zip(chunk.ids, values.tolist(), strict=True)
        if not math.isfinite(value)
    ]:
        raise Diverged(
            f"{peer.name}: the target value of edit {', '.join(map(repr, broken))} diverges: "
            f"its loss is not finite; expected a learning_rate below {peer.learning_rate:g}",
            broken,
        )


class _Chunk:
    """One round of windows of some edits (B): what stands before the anchors is read once, the rest at every step.

    Rows begin at their anchors: S tokens from there to the end of the last of the M windows in the loss.
    """

    def __init__(
        self, model: nn.Module, located: Located, site: Site, rows: Sequence[int], turn: int
    ) -> None:
        self.model, self.site, self.ids = model, site, [located.ids[row] for row in rows]
        self.width = site.projection.weight.shape[0]
        self.earlier = [[window.anchor for window in located.windows[row][:turn]] for row in rows]
        self.windows = [
            located.windows[row][turn:] if located.nested else located.windows[row][turn : turn + 1]
            for row in rows
        ]
        every = [located.examples[row].ids for row in rows]
        ends = [(windows[0].anchor, windows[-1].stop) for windows in self.windows]
        self.tokens = padded(
            [ids[anchor : stop - 1] for ids, (anchor, stop) in zip(every, ends, strict=True)],
            model.device,
        )
        self.labels = padded(
            [ids[anchor + 1 : stop] for ids, (anchor, stop) in zip(every, ends, strict=True)],
            model.device,
        )  # (B, S)
        self.before = padded(
            [ids[:anchor] for ids, (anchor, _) in zip(every, ends, strict=True)],
            model.device,
            left=True,
        )  # (B, P)
        self.lengths = torch.tensor([anchor for anchor, _ in ends], device=model.device)  # (B,)
        self.shares = self._shares()
        self.cache = DynamicCache()
        self.below = Below()
        self.courses: dict[str, list[float]] = {edit: [] for edit in self.ids}
        self.ended: list[str] = []

    def _shares(self) -> Tensor:
        """What each label counts in the mean of each window, shape (B, M, S)."""
        shares = torch.zeros(
            len(self.windows),
            max(map(len, self.windows)),
            self.labels.shape[1],
            dtype=torch.float64,
        )
        for row, windows in enumerate(self.windows):
            for number, (_, start, stop) in enumerate(windows):
                first = windows[0].start
                shares[row, number, start - first : stop - first] = 1 / (stop - start)
        return shares.to(self.labels.device)

    @torch.no_grad()
    def read_before(self, deltas: Sequence[Tensor]) -> None:
        """Fill the cache with the tokens before the anchors, `deltas[row]` (turn, D) in place at the earlier ones."""
        longest = self.before.shape[1]
        if not longest:
            return
        at = [
            (row, longest - int(self.lengths[row]) + anchor)
            for row, anchors in enumerate(self.earlier)
            for anchor in anchors
        ]
        positions = torch.arange(longest, device=self.before.device) - (
            longest - self.lengths[:, None]
        )  # (B, P)
        with injected(self.site, at, torch.cat(list(deltas))):
            self._forward(self.before, positions.clamp(min=0), self.cache, 1)

    def keep(self, places: Tensor) -> None:
        """Drop every row but those at `places` (G,)."""
        self.ids = [self.ids[place] for place in places.tolist()]
        for name in ("tokens", "labels", "before", "lengths", "shares"):
            setattr(self, name, getattr(self, name)[places])
        self.below.keep(places)
        if self.before.shape[1]:
            self.cache.batch_select_indices(places)

    def losses(self, delta: Tensor) -> Tensor:
        """Mean -log p (nats) over the tokens of each window, shape (B, M), with `delta` (B, D) at the anchors."""
        positions = self.lengths[:, None] + torch.arange(
            self.tokens.shape[1], device=delta.device
        )  # (B, S)
        cache = copy.copy(
            self.cache
        )  # reading puts new tensors into its layers, in place of the old ones
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        with injected(self.site, [(row, 0) for row in range(len(delta))], delta):
            logits = self._forward(
                self.tokens,
                positions.clamp(max=int(self.lengths.max()) + self.tokens.shape[1] - 1),
                cache,
                0,
            )
        # Flat, since along another axis than the last the softmax is three times slower.
        nll = F.cross_entropy(
            wide(logits).flatten(0, 1), self.labels.flatten(), reduction="none"
        ).view_as(self.labels)  # (B, S)
        return torch.einsum("bms,bs->bm", self.shares.to(nll.dtype), nll)

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        padding = self.before.shape[1] - self.lengths[:, None]  # (B, 1)
        width = self.before.shape[1] + (ids.shape[1] if ids is self.tokens else 0)
        mask = (torch.arange(width, device=ids.device) >= padding).long()  # (B, width)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    def weights(self, peer: LocateRecipe) -> Tensor:
        """What each window counts in an edit's loss, shape (B, M), sum 1; the windows a row lacks count nothing."""
        counts = self.shares.any(-1).sum(-1, keepdim=True)  # (B, 1)
        number = torch.arange(self.shares.shape[1], device=counts.device)  # (M,)
        # Of the prefixes that end with window 0, 1, ... those from `number` on hold this window.
        weights = self._unlike() if peer.weighting == "gradient" else (counts - number) / counts
        weights = weights.where(number < counts, 0.0)
        return weights / weights.sum(-1, keepdim=True)

    def _unlike(self) -> Tensor:
        """2 - cosine of each window's gradient with that of the own window, where no delta stands yet, (B, M)."""
        delta = torch.zeros(
            len(self.ids), self.width, device=self.labels.device, requires_grad=True
        )
        sums = self.losses(delta).sum(0)  # (M,)
        gradients = [torch.autograd.grad(one, delta, retain_graph=True)[0] for one in sums]
        return torch.stack(
            [2 - F.cosine_similarity(one, gradients[0], dim=-1) for one in gradients], dim=-1
        )


@contextmanager
def injected(site: Site, at: Sequence[tuple[int, int]], deltas: Tensor) -> Iterator[None]:
    """In forward passes inside, `deltas` (n, D) are added to what the site's projection gives at (row, position)."""

    def add(module, args, output):
        rows, columns = (torch.tensor(one, device=output.device) for one in zip(*at, strict=True))
        return output.index_put((rows, columns), deltas.to(output.dtype), accumulate=True)

    handle = site.projection.register_forward_hook(add) if at else None
    try:
        yield
    finally:
        if handle:
            handle.remove()
