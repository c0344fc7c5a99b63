"""Locate-then-edit recipes, and how they solve for weights that give anchors their targets.

MEMIT and AlphaEdit do so in closed form, UnKE by gradient steps on one block.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, StrictBool, StrictInt
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from uke.data.edits import Edits
from uke.errors import Diverged, InputError
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import Located, Site, chunks, locate, look, sites, states
from uke.methods.locate_edit.targets import find_targets
from uke.methods.method import Method, Progress, Tokenizer, Training, Written, write_one_by_one
from uke.methods.ranges import Count, Layers, NotNegative, Positive
from uke.models.model import kept, wide


class LocateRecipe(Method):
    """Every choice of one locate-then-edit method: anchors, target vectors, and a solver.

    `anchors` says whose hidden states are set: that of the last prompt token (`last`), that before
    each window of `window` tokens (`windows`), or before each window that begins where surprisal
    peaks (`surprisal`). `nested` is `windows` with a loss on all later windows too, weighted by the
    share of prefixes that hold them (`weighting`).

    Target vectors: Adam at `learning_rate` on nats per token of the window + `decay` |delta| /
    |h|^2, with |delta| at most `clamp` |h|. `steps` counts losses: as published the last is only
    read, so one update fewer is made. An edit ends below `stop_loss`.

    `solver` writes them. `memit`: ridge `memit_lambda` times the covariance; `alphaedit`: ridge
    `alphaedit_l2` on directions with a variance below `null_threshold`; with `keep_keys` either
    also holds the keys of all other positions of the edits. `unke`: `unke_steps` of AdamW on the
    last of `layers`, held to `preservation` texts, drawn anew for every batch.

    Sources: the published code of each, and arXiv 2210.07229, 2410.02355, 2405.15349, 2502.05628.
    Not copied: plain MEMIT and AlphaEdit of AnyEdit's code overwrite their counter of layers.
    """

    solver: Literal["memit", "alphaedit", "unke"]
    anchors: Literal["last", "windows", "surprisal", "nested"] = "last"
    window: Count = 40
    weighting: Literal["prefix"] = "prefix"
    layers: Layers
    learning_rate: Positive = 0.5
    steps: Annotated[StrictInt, Field(ge=2)] = 25
    stop_loss: NotNegative = 1e-2
    clamp: Positive = 4.0
    decay: NotNegative = 1e-3
    memit_lambda: Positive = 15_000.0
    keep_keys: StrictBool = False
    alphaedit_l2: Positive = 10.0
    null_threshold: Positive = 2e-2
    unke_steps: Count = 50
    unke_rate: Positive = 2e-4
    unke_decay: NotNegative = 1e-2
    preservation: Annotated[StrictInt, Field(ge=0)] = 20
    # One value alone, as `weighting`: the fingerprints of stored rows count it.
    as_published: Literal[False] = False

    family: ClassVar[str] = "locate-then-edit"

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The `down_proj` of the layers, or UnKE's whole block."""
        chosen = sites(model, self.layers)
        if self.solver != "unke":
            return {f"{site.name}.weight": site.projection.weight for site in chosen}
        inside = {id(parameter) for parameter in chosen[-1].block.parameters()}
        return {name: weight for name, weight in model.named_parameters() if id(weight) in inside}

    @property
    def measured(self) -> Layers:
        """Every layer that it changes."""
        return self.layers

    def write(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Training:
        """Locate, find target vectors, solve.

        `progress(steps, loss)` follows the search for targets, and the training has its losses: the
        mean over the edits, each with its last loss when it has ended. InputError, before any
        weight moves, for a missing covariance or preservation text and a layer out of range; later,
        for a singular system. Diverged for targets that are not finite.
        """
        solver, located, hidden, trainings = self._prepare(model, tokenizer, edits, progress)
        losses = [
            sum(one.losses[min(step, len(one.losses) - 1)] for one in trainings) / len(trainings)
            for step in range(max(len(one.losses) for one in trainings))
        ]
        steps = max(one.steps for one in trainings)
        target_loss = sum(one.target_loss for one in trainings) / len(trainings)
        return Training(losses, steps + solver.solve(located, hidden), target_loss)

    def write_each(self, model: nn.Module, tokenizer: Tokenizer, edits: Edits) -> Written:
        """Find the targets of all edits together, then solve for each.

        Edits whose targets diverge are left out, and the others begin anew.
        """
        failed: dict[str, str] = {}
        while True:
            left = [edit for edit in edits if edit.id not in failed]
            try:
                solver, located, hidden, trainings = self._prepare(model, tokenizer, left)
                break
            except Diverged as error:
                failed |= dict.fromkeys(error.edits, str(error))
                if len(failed) == len(edits):
                    raise Diverged("; ".join(dict.fromkeys(failed.values())), failed) from None

        def solve(one: Located, wanted: Tensor, training: Training) -> Training:
            training.steps += solver.solve([one], wanted)
            return training

        wanted = hidden.split([len(one.windows) for one in located])
        each = zip(located, wanted, trainings, strict=True)
        writes = {one[0].edit: partial(solve, *one) for one in each}
        written = write_one_by_one(model, self.weights(model), writes)
        return written._replace(failed=failed | written.failed)

    def _prepare(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> tuple[ClosedForm | BlockSteps, list[Located], Tensor, list[Training]]:
        chosen = sites(model, self.layers)
        solver = SOLVERS[self.solver](model, tokenizer, chosen, self)
        located = locate(model, self.examples(model, tokenizer, edits), self)
        return solver, located, *find_targets(model, located, chosen[-1], self, progress)


def least_squares(
    residual: Tensor, keys: Tensor, others: Tensor, ridge: Tensor, projector: Tensor | None = None
) -> Tensor:
    """Return the change D (d, W) = R K^T (ridge + K K^T + K_p K_p^T)^-1, in float64.

    For residuals R (n, d), keys K (n, W), kept keys K_p (m, W) and a ridge (W, W), D minimises
    |D K - R|^2 + |D K_p|^2 + tr(D ridge D^T): MEMIT (arXiv 2210.07229) with a ridge of lambda C.
    With keys projected by P and a ridge of L2 I it is AlphaEdit's R K^T P (K_p K_p^T P + K K^T P +
    L2 I)^-1 (arXiv 2410.02355). ValueError for a singular system.
    """
    keys, others, residual = keys.double(), others.double(), residual.double()
    if projector is not None:
        keys, others = keys @ projector, others @ projector
    matrix = ridge + keys.T @ keys + others.T @ others  # (W, W)
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
            self.systems = [(recipe.memit_lambda * one, None) for one in found]
        else:
            found = covariance.projectors(model, chosen, recipe.null_threshold)
            self.systems = [(recipe.alphaedit_l2 * torch.eye(len(p)).to(p), p) for p in found]

    @torch.no_grad()
    def solve(self, located: Sequence[Located], hidden: Tensor) -> int:
        """Write the wanted states `hidden` (n, D) of all anchors; return the steps taken: none."""
        for number, (site, system) in enumerate(zip(self.sites, self.systems, strict=True)):
            now = states(self.model, located, site, self.sites[-1])
            lacking = hidden.to(now.hidden.device) - now.hidden.double()  # (n, D)
            residual = lacking / (len(self.sites) - number)
            others = now.others if self.recipe.keep_keys else now.others[:0]
            try:
                change = least_squares(site.back(now.outputs, residual), now.keys, others, *system)
            except ValueError as error:
                where = f"{self.recipe.name}: the system of {site.name} is {error}"
                expected = "expected the covariance of more texts, or a larger ridge"
                raise InputError(f"{where}; {expected}") from None
            site.projection.weight.copy_(site.projection.weight.double() + change)
        return 0


# A call of the block to reproduce, the outputs it should have (B, T, D), and what the error at a
# position counts (B, T).
_Part = tuple[Callable[[], Any], Tensor, Tensor]


class BlockSteps:
    """UnKE: AdamW on every parameter of one block, whose outputs at the anchors become the targets.

    Elsewhere its outputs stay. The loss is the squared error, mean over positions and width: over
    the edits, and over the preservation texts, with equal weight (arXiv 2405.15349). Of an edit it
    covers the question, and the whole answer where that has anchors too (arXiv 2502.05628).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, chosen: Sequence[Site], recipe: LocateRecipe
    ) -> None:
        self.model, self.block, self.recipe = model, chosen[-1].block, recipe
        self.token_ids = partial(covariance.token_ids, model, tokenizer)
        self.pool = covariance.preservation(model) if recipe.preservation else []

    def solve(self, located: Sequence[Located], hidden: Tensor) -> int:
        """Train the block, in float32 or better, and return the steps taken."""
        edits, whole = [one.edit for one in located], self.recipe.anchors != "last"
        texts = [one.example.ids[: None if whole else one.windows[0].start] for one in located]
        wanted = hidden.split([len(one.windows) for one in located])
        # Drawn by the batch, so that an edit has its own texts alone and side by side with others.
        drawn = random.Random(f"{self.recipe.seed} {edits}").sample(self.pool, len(self.pool))
        held = [self.token_ids(text) for text in drawn[: self.recipe.preservation]]
        parts = [*self._parts(texts, located, wanted), *self._parts(held)]
        storages = {weight: weight.data for weight in self.block.parameters()}
        with kept(self.model, {}):
            for weight, storage in storages.items():
                weight.data = wide(storage)
            self.model.requires_grad_(False)
            self.block.requires_grad_(True)
            self._descend(parts, edits)
            for weight, storage in storages.items():
                storage.copy_(weight.data)
                weight.data = storage
        return self.recipe.unke_steps

    def _parts(
        self,
        texts: Sequence[Sequence[int]],
        located: Sequence[Located] = (),
        wanted: Sequence[Tensor] = (),
    ) -> Iterator[_Part]:
        """Yield the block's calls on B texts, in float32 or better; `wanted` stands at anchors."""
        tokens = sum(map(len, texts))
        for rows, ids, real in chunks(texts, self.model.device):
            (call,) = look(self.model, ids, (self.block,))
            output = wide(call.output).clone()  # (B, T, D)
            for index, row in enumerate(rows):
                if located:
                    anchors = [window.anchor for window in located[row].windows]
                    output[index, anchors] = wanted[row].to(output)
            args, kwargs = tree_map_only(
                Tensor, lambda x: wide(x) if x.is_floating_point() else x, (call.args, call.kwargs)
            )
            share = real.to(output) / (tokens * output.shape[-1])
            yield partial(self.block, *args, **kwargs), output, share

    def _descend(self, parts: Sequence[_Part], edits: Sequence[str]) -> None:
        recipe = self.recipe
        groups = [
            {"params": [weight], "weight_decay": 0.0 if "norm" in name else recipe.unke_decay}
            for name, weight in self.block.named_parameters()
        ]
        adam = torch.optim.AdamW(groups, lr=recipe.unke_rate, fused=True)
        for step in range(recipe.unke_steps):
            adam.zero_grad()
            error = 0.0
            for call, wanted, share in parts:
                output = call()
                output = output[0] if isinstance(output, tuple) else output
                squares = (output - wanted).square().sum(-1)  # (B, T)
                loss = (squares * share).sum()
                loss.backward()
                error += loss.item()
            if not math.isfinite(error):
                where = f"the block's error of edit {', '.join(map(repr, edits))} is not finite"
                expected = f"expected an unke_rate below {recipe.unke_rate:g}"
                raise Diverged(f"{recipe.name}: {where} after {step} steps; {expected}", edits)
            adam.step()


SOLVERS = {"memit": ClosedForm, "alphaedit": ClosedForm, "unke": BlockSteps}
