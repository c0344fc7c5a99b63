"""Find target vectors: hidden states that make the text after them likely, for a batch of edits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from uke.errors import Diverged
from uke.methods.lanes import LowerBlocks, lower_blocks_once
from uke.methods.locate_edit.anchors import Located, Site, Window, states
from uke.methods.method import Training
from uke.models.generate import surprisals
from uke.models.model import kept, wide
from uke.models.prompts import group_by_length, padded

if TYPE_CHECKING:
    from uke.methods.locate_edit.solvers import LocateRecipe


def find_targets(
    model: nn.Module,
    located: Sequence[Located],
    site: Site,
    recipe: LocateRecipe,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, list[Training]]:
    """Find the hidden states (n, D) that the anchors, in their order, should have after `site`.

    Return them and the training of each edit, window by window: losses, and updates as its steps.
    Its target loss is that of the whole text with all of its deltas in place.

    Window by window, all edits together. Each edit has its own delta (added to the output of the
    site's projection at the anchor), loss, clamp and end, and Adam is element-wise: this is one
    edit at a time but for rounding. Earlier deltas stay in place, frozen. `progress(steps, loss)`
    follows each loss. Diverged names the edits whose loss is not finite.
    """
    here = states(model, located, site, site)
    # What a delta is measured against, (n, D).
    state = wide(here.hidden if site.norm is None else here.outputs)
    trainings = {one.edit: Training() for one in located}
    deltas, steps = torch.zeros_like(state), itertools.count(1)
    counts = [len(one.windows) for one in located]
    first = [0, *itertools.accumulate(counts)]  # anchor of each edit

    def follow(loss: float) -> None:
        if progress:
            progress(next(steps), loss)

    with kept(model, {}):
        model.requires_grad_(False)
        for turn in range(max(counts)):
            for rows in _rows(located, turn, recipe):
                earlier = [deltas[first[row] : first[row] + turn] for row in rows]
                chunk = _Chunk(model, [located[row] for row in rows], site, earlier, recipe)
                anchors = [first[row] + turn for row in rows]
                with lower_blocks_once(model, [site.name]) as chunk.lower:
                    deltas[anchors] = _optimise(chunk, state[anchors], recipe, trainings, follow)
    with torch.no_grad():
        for one, own in zip(located, deltas.split(counts), strict=True):
            at = [(0, window.anchor) for window in one.windows]
            with injected(site, at, own):
                (losses,) = surprisals(model, [one.example], [one.edit])
            trainings[one.edit].target_loss = losses.mean().item()
        before, after = (site.through(wide(here.outputs) + change) for change in (0, deltas))
    hidden = here.hidden.double() + (deltas if site.norm is None else after - before)
    return hidden, list(trainings.values())


def _in_loss(one: Located, turn: int, recipe: LocateRecipe) -> list[Window]:
    """Return the window of this number and, if nested, all later ones."""
    return one.windows[turn : None if recipe.anchors == "nested" else turn + 1]


def _rows(located: Sequence[Located], turn: int, recipe: LocateRecipe) -> Iterator[list[int]]:
    """Yield the edits that have a window of this number, as many as one forward pass holds."""
    windows = {row: _in_loss(one, turn, recipe) for row, one in enumerate(located)}
    ends = {row: own[-1].stop for row, own in windows.items() if own}
    return ([list(ends)[index] for index in group] for group in group_by_length([*ends.values()]))


def _optimise(
    chunk: _Chunk,
    state: Tensor,
    recipe: LocateRecipe,
    trainings: Mapping[str, Training],
    follow: Callable[[float], None],
) -> Tensor:
    """Return deltas (B, D) of one chunk, which are added to `state` (B, D)."""
    scale, delta = state.norm(dim=-1), torch.zeros_like(state).requires_grad_()  # (B,), (B, D)
    adam = torch.optim.Adam([delta], lr=recipe.learning_rate, fused=True)
    last = torch.full_like(scale, math.inf)  # (B,) the loss each row had when it was last read
    running = torch.arange(len(scale), device=scale.device)
    for step in range(1, recipe.steps + 1):
        here = delta[running]
        decay = recipe.decay * here.norm(dim=-1) / scale[running] ** 2
        losses = chunk.losses(here) + decay  # (R,)
        _check_finite(chunk, losses, recipe)
        last[running] = losses.detach()
        stay = (losses.detach() >= recipe.stop_loss) & (step < recipe.steps)  # last: read only
        for edit, loss, stays in zip(chunk.ids, losses.tolist(), stay.tolist(), strict=True):
            trainings[edit].losses.append(loss)
            trainings[edit].steps += stays
        follow(last.mean().item())
        if not stay.any():
            break
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        if not stay.all():
            running = running[stay]
            chunk.keep(stay.nonzero().squeeze(1))
        before = delta.detach().clone()
        adam.step()
        with torch.no_grad():
            norm = delta[running].norm(dim=-1)  # (R,)
            _check_finite(chunk, norm, recipe)
            longest = recipe.clamp * scale[running]
            shrink = (longest / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
            # An edit that has ended stays: what Adam adds by momentum is taken back.
            delta.copy_(before.index_copy(0, running, delta[running] * shrink[:, None]))
    return delta.detach()


def _check_finite(chunk: _Chunk, values: Tensor, recipe: LocateRecipe) -> None:
    pairs = zip(chunk.ids, values.tolist(), strict=True)
    if broken := [edit for edit, value in pairs if not math.isfinite(value)]:
        where = f"the target vector of edit {', '.join(map(repr, broken))} diverges"
        expected = f"expected a learning_rate below {recipe.learning_rate:g}"
        raise Diverged(f"{recipe.name}: {where}: its loss is not finite; {expected}", broken)


class _Chunk:
    """One round of windows of B edits: what stands before the anchors is read only once.

    Rows begin at their anchors: S tokens from there to the end of the last window in the loss.
    Before, `earlier[row]` (turn, D) stand at the anchors of earlier rounds.
    """

    def __init__(
        self,
        model: nn.Module,
        located: Sequence[Located],
        site: Site,
        earlier: Sequence[Tensor],
        recipe: LocateRecipe,
    ) -> None:
        self.model, self.site, self.ids = model, site, [one.edit for one in located]
        turn = len(earlier[0])
        windows = [_in_loss(one, turn, recipe) for one in located]
        spans = [
            (one.example.ids, own[0].anchor, own[-1].stop)
            for one, own in zip(located, windows, strict=True)
        ]
        tokens = padded([ids[start : stop - 1] for ids, start, stop in spans])  # (B, S)
        labels = padded([ids[start + 1 : stop] for ids, start, stop in spans])  # (B, S)
        before = padded([ids[:start] for ids, start, _ in spans], side="left")  # (B, P)
        lengths = torch.tensor([start for _, start, _ in spans])  # (B,)
        # What each label counts in the loss, (B, S): the mean of its window, times the share of the
        # prefixes (those that end with window 0, 1, ...) that hold it.
        shares = torch.zeros(labels.shape, dtype=torch.float64)
        for row, own in enumerate(windows):
            for number, (_, start, stop) in enumerate(own):
                weight = (len(own) - number) / sum(range(len(own) + 1))
                first = own[0].start
                shares[row, start - first : stop - first] = weight / (stop - start)
        self.tokens, self.labels, self.before, self.lengths, self.shares = (
            one.to(model.device) for one in (tokens, labels, before, lengths, shares)
        )
        self.cache, self.lower = DynamicCache(), LowerBlocks()
        longest = before.shape[1]
        if longest:
            at = [
                (row, longest - spans[row][1] + window.anchor)
                for row, one in enumerate(located)
                for window in one.windows[:turn]
            ]
            every = torch.arange(longest, device=model.device)
            positions = every - (longest - self.lengths)[:, None]
            with torch.no_grad(), injected(site, at, torch.cat(list(earlier))):
                self._forward(self.before, positions.clamp(min=0), self.cache, 1)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but those at `rows` (R,)."""
        rows = rows.cpu()  # an index that every device takes
        self.ids = [self.ids[row] for row in rows]
        for name in ("tokens", "labels", "before", "lengths", "shares"):
            setattr(self, name, getattr(self, name)[rows])
        self.lower.keep(rows)
        if self.before.shape[1]:
            self.cache.batch_select_indices(rows)

    def losses(self, delta: Tensor) -> Tensor:
        """Return each edit's weighted mean of -log p (nats), (B,), with `delta` (B, D) in place."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        positions = self.lengths[:, None] + steps  # (B, S)
        last = int(self.lengths.max()) + self.tokens.shape[1] - 1
        # Reading puts new tensors into the layers of the copy, in place of the old ones.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        with injected(self.site, [(row, 0) for row in range(len(delta))], delta):
            logits = self._forward(self.tokens, positions.clamp(max=last), cache, 0)
        # Flattened, since along another axis than the last the softmax is three times slower.
        nll = F.cross_entropy(wide(logits).flatten(0, 1), self.labels.flatten(), reduction="none")
        nll = nll.view_as(self.labels)  # (B, S)
        return torch.einsum("bs,bs->b", self.shares.to(nll.dtype), nll).to(delta.device)

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        padding = self.before.shape[1] - self.lengths[:, None]  # (B, 1)
        width = self.before.shape[1] + (ids.shape[1] if ids is self.tokens else 0)
        mask = (torch.arange(width, device=ids.device) >= padding).long()  # (B, width)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return output.logits


def injected(site: Site, at: Sequence[tuple[int, int]], deltas: Tensor) -> AbstractContextManager:
    """Add `deltas` (n, D) to the output of the site's projection at each (row, position)."""

    def add(module, args, output):
        rows, columns = (torch.tensor(one, device=output.device) for one in zip(*at, strict=True))
        return output.index_put((rows, columns), deltas.to(output), accumulate=True)

    return site.projection.register_forward_hook(add) if at else nullcontext()
