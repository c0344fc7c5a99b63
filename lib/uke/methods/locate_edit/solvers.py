"""Solve for weights that give the anchors their target vectors.

MEMIT and AlphaEdit do so in closed form, UnKE by gradient steps on one block. A solver writes edits
together (`solve`), or finds the weights (N, ...) of N edits of which each is written alone
(`solve_each`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from uke.errors import Diverged, InputError
from uke.methods.lanes import Lanes
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import Located, Site, chunks, locate, look, sites, states
from uke.methods.locate_edit.targets import Targets, find_targets
from uke.methods.method import Edits, Progress, Tokenizer, Training, Written, write_one_by_one
from uke.models.model import wide
from uke.models.prompts import PASS_TOKENS

if TYPE_CHECKING:
    from uke.methods.recipes import LocateRecipe


def weights(model: nn.Module, recipe: LocateRecipe) -> dict[str, nn.Parameter]:
    """Return what a recipe changes: the `down_proj` of its layers, or UnKE's whole block."""
    chosen = sites(model, recipe.layers)
    if recipe.solver != "unke":
        return {f"{site.name}.weight": site.projection.weight for site in chosen}
    inside = {id(parameter) for parameter in chosen[-1].block.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in inside}


def write(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: LocateRecipe, progress: Progress
) -> Training:
    """Write the edits together into the model, in place: locate, find targets, solve.

    `progress(steps, loss)` follows the search for targets, whose losses (nats per token) the
    training records. InputError, before any weight moves, for an edit longer than the context, a
    missing covariance or preservation text and a layer out of range; later, for a singular system
    and, as published, a division by zero. Raises Diverged for targets that are not finite.
    """
    started = time.perf_counter()
    solver, located, targets = _prepare(model, tokenizer, edits, recipe, progress)
    training = solver.solve(located, targets)
    training.seconds = time.perf_counter() - started
    return training


def write_each(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: LocateRecipe
) -> Written:
    """Write each edit alone: the targets of all are found together, then each is solved.

    Edits that diverge are left out, and the others begin anew.
    """
    failed: dict[str, str] = {}
    while True:
        started = time.perf_counter()
        left = [edit for edit in edits if edit.id not in failed]
        try:
            solver, located, targets = _prepare(model, tokenizer, left, recipe)
            written = solver.solve_each(list(targets.split(located)))
            break
        except Diverged as error:
            failed |= dict.fromkeys(error.edits, str(error))
            if len(failed) == len(edits):
                raise Diverged("; ".join(dict.fromkeys(failed.values())), failed) from None
    for training in written.trainings:
        training.seconds = (time.perf_counter() - started) / len(left)
    return written._replace(failed=failed)


def _prepare(
    model: nn.Module,
    tokenizer: Tokenizer,
    edits: Edits,
    recipe: LocateRecipe,
    progress: Progress = None,
) -> tuple[ClosedForm | BlockSteps, Located, Targets]:
    chosen = sites(model, recipe.layers)
    solver = SOLVERS[recipe.solver](model, tokenizer, chosen, recipe)
    located = locate(model, recipe.examples(model, tokenizer, edits), recipe)
    return solver, located, find_targets(model, located, chosen[-1], recipe, progress)


def _training(
    recipe: LocateRecipe, located: Located, targets: Targets, steps: int = 0, note: str = ""
) -> Training:
    notes = [*located.notes(recipe), *filter(None, [note])]
    return Training(targets.losses, targets.steps + steps, stopped=targets.stopped, notes=notes)


class System(NamedTuple):
    """What the keys of one layer meet: a ridge (W, W), and AlphaEdit's null-space projector."""

    ridge: Tensor
    projector: Tensor | None = None


def ridge(residual: Tensor, keys: Tensor, others: Tensor, system: System) -> Tensor:
    """Return the change D (d, W) = R K^T (ridge + K K^T + K_p K_p^T)^-1, in float64.

    For residuals R (n, d), keys K (n, W) and kept keys K_p (m, W), D minimises |D K - R|^2 +
    |D K_p|^2 + tr(D ridge D^T): MEMIT (arXiv 2210.07229) with a ridge of lambda C. With keys
    projected by P and a ridge of L2 I it is AlphaEdit's R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1
    (arXiv 2410.02355). ValueError for a singular system.
    """
    keys, others, residual = keys.double(), others.double(), residual.double()
    if system.projector is not None:
        keys, others = keys @ system.projector, others @ system.projector
    matrix = system.ridge + keys.T @ keys + others.T @ others  # (W, W)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve(keys.T, factor)  # (W, n)
    change = (solved @ residual).T  # (d, W)
    tiny = torch.finfo(torch.float64).tiny
    error = (matrix @ solved - keys.T).norm() / keys.norm().clamp(min=tiny)
    if failed or not change.isfinite().all() or not error < 1e-6:
        raise ValueError("singular or not finite")
    return change


class ClosedForm:
    """MEMIT and AlphaEdit: each layer takes its share of what the last layer still lacks."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, chosen: Sequence[Site], recipe: LocateRecipe
    ) -> None:
        self.model, self.sites, self.recipe = model, chosen, recipe
        if recipe.solver == "memit":
            found = covariance.covariances(model, chosen)
            self.systems = [System(recipe.memit_lambda * one) for one in found]
        else:
            found = covariance.projectors(model, chosen, recipe.null_threshold)
            self.systems = [
                System(recipe.alphaedit_l2 * torch.eye(len(one)).to(one), one) for one in found
            ]

    @torch.no_grad()
    def solve(self, located: Located, targets: Targets) -> Training:
        for number, site in enumerate(self.sites):
            share, system = self._share(number, len(located.ids))
            now = states(self.model, located, site, self.sites[-1])
            residual = (targets.hidden - now.hidden.double()) / share  # (n, D)
            others = now.others if self.recipe.keep_keys else now.others[:0]
            try:
                change = ridge(site.back(now.outputs, residual), now.keys, others, system)
            except ValueError as error:
                raise InputError(
                    f"{self.recipe.name}: the system of {site.name} is {error}; "
                    "expected the covariance of more texts, or a larger ridge"
                ) from None
            site.projection.weight.copy_(site.projection.weight.double() + change)
        return _training(self.recipe, located, targets)

    def solve_each(self, alone: Sequence[tuple[Located, Targets]]) -> Written:
        """Solve one after another: the systems take a small part of an edit's time."""
        writes = {one.ids[0]: partial(self.solve, one, targets) for one, targets in alone}
        return write_one_by_one(self.model, weights(self.model, self.recipe), writes)

    def _share(self, number: int, edits: int) -> tuple[int, System]:
        """Return what a layer divides the residual by, and its system.

        As published, both follow the number of edits, by the overwritten counter.
        """
        recipe, depth = self.recipe, len(self.sites)
        if not recipe.as_published:
            return depth - number, self.systems[number]
        where, counter = f"{recipe.name} as published: batch of {edits} edits", edits - 1
        if counter == depth:
            raise InputError(
                f"{where}: the counter of layers is overwritten by that of edits, so the residual "
                f"is divided by {depth} - {counter} = 0; expected another batch size, or "
                "as_published: false"
            )
        if recipe.solver == "alphaedit" and edits > depth:
            raise InputError(
                f"{where}: the projector is that of layer {counter} of {depth}, which is none; "
                f"expected at most {depth} edits, or as_published: false"
            )
        return depth - counter, self.systems[number if recipe.solver == "memit" else counter]


class _Part(NamedTuple):
    """Calls of the block to reproduce: R rows of T positions.

    `lanes`: the lane of each row. `wanted`: outputs (R, T, D). `share` (R, T): what the error at a
    position counts in its lane.
    """

    lanes: list[int]
    args: tuple
    kwargs: dict
    wanted: Tensor
    share: Tensor


class BlockSteps:
    """UnKE: AdamW on every parameter of one block, whose outputs at the anchors become the targets.

    Elsewhere its outputs stay. The loss is the squared error, mean over positions and width: over
    the edits up to their last anchor, and over the preservation texts, with equal weight (arXiv
    2405.15349). Edits written alone are trained side by side, each in its own lane: AdamW is
    element-wise.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, chosen: Sequence[Site], recipe: LocateRecipe
    ) -> None:
        self.model, self.site, self.recipe, self.texts = model, chosen[-1], recipe, []
        if recipe.preservation:
            drawn = recipe.preservation, recipe.seed
            self.texts = covariance.preservation(model, tokenizer, *drawn)

    def solve(self, located: Located, targets: Targets) -> Training:
        stacks, (curve,) = self._fit([(located, targets)], self._preserved())
        with torch.no_grad():
            for name, weight in weights(self.model, self.recipe).items():
                weight.copy_(stacks[name][0])
        return self._training(located, targets, curve)

    def solve_each(self, alone: Sequence[tuple[Located, Targets]]) -> Written:
        """Fit as many lanes at once as a pass holds, all the preservation texts in each of them."""
        preserved = self._preserved()
        longest = max(len(one.ids) for located, _ in alone for one in located.examples)
        count = max(1, PASS_TOKENS // max([longest, *(part.share.numel() for part in preserved)]))
        starts = range(0, len(alone), count)
        fits = [self._fit(alone[start : start + count], preserved) for start in starts]
        stacks = {
            name: torch.cat([stack[name].to(weight.dtype) for stack, _ in fits])
            for name, weight in weights(self.model, self.recipe).items()
        }
        curves = [curve for _, every in fits for curve in every]
        trainings = [self._training(*one, curve) for one, curve in zip(alone, curves, strict=True)]
        lanes = Lanes(self.model, [located.ids[0] for located, _ in alone], stacks)
        return Written(lanes, trainings, {})

    def _training(self, located: Located, targets: Targets, curve: Sequence[float]) -> Training:
        note = (
            f"block: squared error {curve[0]:.3g} at first, {curve[-1]:.3g} before the last "
            f"of {len(curve)} steps"
        )
        return _training(self.recipe, located, targets, len(curve), note)

    def _preserved(self) -> list[_Part]:
        """Return the block's calls on the preservation texts, the same for every edit."""
        return list(self._parts([0] * len(self.texts), self.texts, {}))

    def _fit(
        self, alone: Sequence[tuple[Located, Targets]], preserved: Sequence[_Part]
    ) -> tuple[dict[str, Tensor], list[list[float]]]:
        """Return the block's weights (N, *shape), a lane for each entry, and the errors of each.

        Weights are float32 or better, whatever the model's precision.
        """
        lanes_of, texts, wanted = [], [], {}
        for lane, (located, targets) in enumerate(alone):
            for (row, position), value in zip(located.anchors, targets.hidden, strict=True):
                wanted.setdefault(len(texts) + row, []).append((position, value))
            lanes_of += [lane] * len(located.ids)
            for one, windows in zip(located.examples, located.windows, strict=True):
                texts.append(one.ids[: windows[-1].anchor + 1])
        parts = list(self._parts(lanes_of, texts, wanted))
        parts += [_repeated(part, len(alone)) for part in preserved]
        leaves = {
            name: nn.Parameter(wide(weight.detach()).expand(len(alone), *weight.shape).clone())
            for name, weight in weights(self.model, self.recipe).items()
        }
        lanes = Lanes(self.model, [str(lane) for lane in range(len(alone))], leaves)
        errors = self._descend(lanes, parts, [located.ids for located, _ in alone])
        stacks = {name: leaf.detach() for name, leaf in leaves.items()}
        return stacks, torch.stack(errors).T.tolist()

    def _parts(
        self,
        lanes: Sequence[int],
        texts: Sequence[Sequence[int]],
        wanted: Mapping[int, Sequence[tuple[int, Tensor]]],
    ) -> Iterator[_Part]:
        """Yield the block's calls on texts, one lane for each; `wanted` outputs by text."""
        tokens = Counter()
        for lane, text in zip(lanes, texts, strict=True):
            tokens[lane] += len(text)
        for rows, ids in chunks(texts, self.model.device):
            (call,) = look(self.model, ids, (self.site.block,))
            output = wide(call.output).clone()  # (R, T, D)
            share = torch.zeros(ids.shape, dtype=output.dtype)
            for index, row in enumerate(rows):
                share[index, : len(texts[row])] = 1 / (tokens[lanes[row]] * output.shape[-1])
                for position, value in wanted.get(row, ()):
                    output[index, position] = value.to(output.dtype)
            args, kwargs = _map((call.args, call.kwargs), _widened)
            yield _Part([lanes[row] for row in rows], args, kwargs, output, share.to(ids.device))

    def _descend(
        self, lanes: Lanes, parts: Sequence[_Part], ids: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Return the error of each lane (N,) before each step; Diverged if one is not finite."""
        groups = [
            {"params": [leaf], "weight_decay": 0.0 if "norm" in name else self.recipe.unke_decay}
            for name, leaf in lanes.weights.items()
        ]
        adam = torch.optim.AdamW(groups, lr=self.recipe.unke_rate, fused=True)
        errors: list[Tensor] = []
        with lanes.laid():
            for _ in range(self.recipe.unke_steps):
                adam.zero_grad()
                error = torch.zeros(len(ids))
                for part in parts:
                    lanes.read([lanes.ids[lane] for lane in part.lanes])
                    output = self.site.block(*part.args, **part.kwargs)
                    output = output[0] if isinstance(output, tuple) else output
                    squares = (output - part.wanted).square().sum(-1)  # (R, T)
                    by_row = (squares * part.share).sum(-1)  # (R,)
                    by_row.sum().backward()
                    error.index_add_(0, torch.tensor(part.lanes), by_row.detach().to(error))
                self._check_finite(error, ids, len(errors))
                errors.append(error)
                adam.step()
        return errors

    def _check_finite(self, error: Tensor, ids: Sequence[Sequence[str]], steps: int) -> None:
        pairs = zip(ids, error.isfinite().tolist(), strict=True)
        if broken := [edit for own, finite in pairs if not finite for edit in own]:
            raise Diverged(
                f"{self.recipe.name}: the block's error of edit {', '.join(map(repr, broken))} is "
                f"not finite after {steps} steps; expected an unke_rate below "
                f"{self.recipe.unke_rate:g}",
                broken,
            )


def _widened(tensor: Tensor) -> Tensor:
    return wide(tensor) if tensor.is_floating_point() else tensor


def _repeated(part: _Part, count: int) -> _Part:
    """Return the same rows for `count` lanes, lane after lane; what rows share stays shared."""
    rows = len(part.lanes)

    def repeat(one: Tensor) -> Tensor:
        by_row = one.dim() > 1 and len(one) == rows
        return one.repeat(count, *[1] * (one.dim() - 1)) if by_row else one

    lanes = [lane for lane in range(count) for _ in range(rows)]
    return _Part(lanes, *_map(tuple(part[1:]), repeat))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return tuple(_map(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _map(one, change) for name, one in value.items()}
    return value


SOLVERS = {"memit": ClosedForm, "alphaedit": ClosedForm, "unke": BlockSteps}
