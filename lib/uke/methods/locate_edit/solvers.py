"""The solvers of locate-then-edit methods: MEMIT and AlphaEdit in closed form, UnKE by gradient steps on one block.

A solver writes the edits into the model (`solve`), or finds the weights (N, ...) of N edits of which each is written alone (`apart`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import Diverged, InputError
from uke.methods.lanes import Lanes
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import Located, Site, chunks, locate, look, sites, states
from uke.methods.locate_edit.targets import Values, target_values
from uke.methods.method import Progress, Training, Written
from uke.models.model import wide
from uke.models.prompts import PASS_TOKENS

if TYPE_CHECKING:
    from uke.methods.recipes import LocateRecipe


def weights(model: nn.Module, peer: LocateRecipe) -> dict[str, nn.Parameter]:
    """The parameters a peer writes to, by name: the `down_proj` of its layers, or UnKE's whole block."""
    places = sites(model, peer.layers)
    if peer.solver != "unke":
        return {f"{site.name}.weight": site.projection.weight for site in places}
    inside = {id(parameter) for parameter in places[-1].block.parameters()}
    return {
        name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside
    }


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    peer: LocateRecipe,
    progress: Progress | None = None,
) -> Training:
    """Write the edits into the model in place: locate, find target values, solve.

    `progress(steps, loss)` follows each step towards the target values. The record holds their losses (nats per token),
    and in its notes what else a reader must know.
    InputError, before any weight moves, for an edit longer than the context, for missing second moments or texts, and
    for a layer out of range; after some layers may have moved, for a singular system and, as published, a division by
    zero. FloatingPointError names an edit whose target value diverges. Restoring is the caller's (`editing.edited`).
    """
    started = time.perf_counter()
    places = sites(model, peer.layers)
    solver = SOLVERS[peer.solver](model, tokenizer, places, peer)
    located = locate(model, peer.examples(model, tokenizer, edits), peer)
    values = target_values(model, located, places[-1], peer, progress)
    notes = solver.solve(located, values)
    training = Training(
        values.losses, values.steps, stopped=values.stopped, notes=[*located.notes(peer), *notes]
    )
    training.steps += solver.steps
    training.seconds = time.perf_counter() - started
    return training


def write_each(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], peer: LocateRecipe
) -> Written:
    """As `_solve`; edits that diverge are left out, and the others begun anew."""
    failed: dict[str, str] = {}
    while True:
        try:
            left = [edit for edit in edits if edit.id not in failed]
            return Written(*_solve(model, tokenizer, left, peer), failed)
        except Diverged as error:
            failed |= dict.fromkeys(error.edits, str(error))
            if len(failed) == len(edits):
                raise Diverged("; ".join(dict.fromkeys(failed.values())), failed) from None


def _solve(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], peer: LocateRecipe
) -> tuple[Lanes, list[Training]]:
    """Target values of all edits together, which is one edit at a time but for rounding; then what the solver makes of each."""
    started = time.perf_counter()
    places = sites(model, peer.layers)
    solver = SOLVERS[peer.solver](model, tokenizer, places, peer)
    located = locate(model, peer.examples(model, tokenizer, edits), peer)
    alone = list(_one_by_one(located, target_values(model, located, places[-1], peer)))
    stacks, notes = solver.apart(alone)
    trainings = [
        Training(
            found.losses,
            found.steps + solver.steps,
            stopped=found.stopped,
            notes=[*one.notes(peer), *own],
        )
        for (one, found), own in zip(alone, notes, strict=True)
    ]
    for training in trainings:
        training.seconds = (time.perf_counter() - started) / len(edits)
    return Lanes(model, located.ids, stacks), trainings


def _one_by_one(located: Located, values: Values) -> Iterator[tuple[Located, Values]]:
    """Each edit with its own anchors, target values and their course."""
    first = 0
    for edit, one, windows in zip(located.ids, located.examples, located.windows, strict=True):
        own = values.hidden[first : first + len(windows)]
        first += len(windows)
        course, ended = values.courses[edit], values.ended[edit]
        found = replace(
            values,
            hidden=own,
            losses=course,
            steps=len(course) - ended,
            stopped="loss" if ended == len(windows) else "steps",
        )
        yield replace(located, ids=[edit], examples=[one], windows=[windows]), found


class System(NamedTuple):
    """What the keys of one layer meet: a ridge (W, W), and for AlphaEdit the projector (W, W) of its null space."""

    ridge: Tensor
    projector: Tensor | None = None


def ridge(residual: Tensor, keys: Tensor, others: Tensor, system: System) -> Tensor:
    """The change D (d, W) that is R K^T (ridge + K K^T + K_p K_p^T)^-1, for R (n, d), K (n, W) and K_p (m, W).

    It minimises |D K - R|^2 + |D K_p|^2 + tr(D ridge D^T): MEMIT (arXiv 2210.07229) with a ridge of lambda C. With keys
    projected by P and a ridge of L2 I it is AlphaEdit's R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1 (arXiv 2410.02355) with
    a symmetric system. In float64. ValueError where the system is singular or not finite.
    """
    keys, others, residual = keys.double(), others.double(), residual.double()
    if system.projector is not None:
        keys, others = keys @ system.projector, others @ system.projector
    matrix = system.ridge + keys.T @ keys + others.T @ others  # (W, W)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve(keys.T, factor)  # (W, n)
    change = (solved @ residual).T  # (d, W)
    left = (matrix @ solved - keys.T).norm() / keys.norm().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    if failed or not change.isfinite().all() or not left < 1e-6:
        raise ValueError("singular or not finite")
    return change


class ClosedForm:
    """MEMIT and AlphaEdit: each layer takes its share of what the last is still short of; the last takes all of it."""

    steps = 0

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        places: Sequence[Site],
        peer: LocateRecipe,
    ) -> None:
        self.model, self.places, self.peer = model, places, peer
        if peer.solver == "memit":
            self.systems = [
                System(peer.memit_lambda * moment)
                for moment in covariance.second_moments(model, places)
            ]
        else:
            found = covariance.projectors(model, places, peer.null_threshold)
            self.systems = [
                System(
                    peer.alphaedit_l2 * torch.eye(len(one), dtype=one.dtype, device=one.device), one
                )
                for one in found
            ]

    @torch.no_grad()
    def solve(self, located: Located, values: Values) -> list[str]:
        for number, site in enumerate(self.places):
            share, system = self._share(number, len(located.ids))
            now = states(self.model, located, site, self.places[-1])
            residual = (values.hidden - now.hidden.double()) / share  # (n, D)
            others = now.others if self.peer.keep_keys else now.others[:0]
            try:
                change = ridge(site.back(now.outputs, residual), now.keys, others, system)
            except ValueError as error:
                raise InputError(
                    f"{self.peer.name}: the system of {site.name} is {error}; expected second moments of more texts, or a larger ridge"
                ) from None
            site.projection.weight.copy_(site.projection.weight.double() + change)
        return []

    def apart(
        self, alone: Sequence[tuple[Located, Values]]
    ) -> tuple[dict[str, Tensor], list[list[str]]]:
        """One after another: the systems are a small part of what an edit takes."""
        own = weights(self.model, self.peer)
        before = {name: weight.detach().clone() for name, weight in own.items()}
        stacks: dict[str, list[Tensor]] = {name: [] for name in own}
        notes = []
        try:
            for located, values in alone:
                notes.append(self.solve(located, values))
                for name, weight in own.items():
                    stacks[name].append(weight.detach().clone())
                    weight.data.copy_(before[name])
        finally:
            for name, weight in own.items():
                weight.data.copy_(before[name])
        return {name: torch.stack(each) for name, each in stacks.items()}, notes

    def _share(self, number: int, edits: int) -> tuple[int, System]:
        """What the residual is divided by at a layer, and the layer's system; as published, both by the wrong counter."""
        if not self.peer.as_published:
            return len(self.places) - number, self.systems[number]
        share = len(self.places) - (edits - 1)
        if share == 0:
            raise InputError(
                f"{self.peer.name} as published: batch of {edits} edits: the counter of layers is overwritten by that of edits, "
                f"so the residual is divided by {len(self.places)} - {edits - 1} = 0; expected another batch size, or as_published: false"
            )
        if self.peer.solver == "alphaedit" and edits > len(self.places):
            raise InputError(
                f"{self.peer.name} as published: batch of {edits} edits: the projector is that of layer {edits - 1} of {len(self.places)}, "
                f"which is none; expected at most {len(self.places)} edits, or as_published: false"
            )
        return share, self.systems[number if self.peer.solver == "memit" else edits - 1]


class _Part(NamedTuple):
    """Calls of the block to reproduce: rows of the lanes `of`, output (R, T, D) wanted, `share` (R, T) what a position's error counts in its lane."""

    of: list[int]
    args: tuple
    kwargs: dict
    wanted: Tensor
    share: Tensor


class BlockSteps:
    """UnKE: AdamW on every parameter of one block, whose output is to be the target values and else what it was.

    Squared error, mean over positions and width: over the edits up to their last anchor, and over the preservation
    texts, with equal weight (arXiv 2405.15349). Edits apart are trained side by side, each in a lane of its own: AdamW is element-wise.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        places: Sequence[Site],
        peer: LocateRecipe,
    ) -> None:
        self.model, self.site, self.peer = model, places[-1], peer
        self.texts = (
            covariance.preservation(model, tokenizer, peer.preservation, peer.seed)
            if peer.preservation
            else []
        )
        self.steps = peer.unke_steps

    def solve(self, located: Located, values: Values) -> list[str]:
        stacks, courses = self._fit([(located, values)], self._held())
        with torch.no_grad():
            for name, weight in weights(self.model, self.peer).items():
                weight.copy_(stacks[name][0])
        return self._notes(courses)

    def apart(
        self, alone: Sequence[tuple[Located, Values]]
    ) -> tuple[dict[str, Tensor], list[list[str]]]:
        """As many lanes at once as a forward pass holds, with all the preservation texts in each."""
        held, longest = (
            self._held(),
            max(len(one.ids) for located, _ in alone for one in located.examples),
        )
        size = max(1, PASS_TOKENS // max([longest, *(part.share.numel() for part in held)]))
        fitted = [
            self._fit(alone[start : start + size], held) for start in range(0, len(alone), size)
        ]
        dtypes = {name: weight.dtype for name, weight in weights(self.model, self.peer).items()}
        stacks = {
            name: torch.cat([stacks[name].to(dtype) for stacks, _ in fitted])
            for name, dtype in dtypes.items()
        }
        return stacks, [[note] for _, courses in fitted for note in self._notes(courses)]

    def _notes(self, courses: Sequence[Sequence[float]]) -> list[str]:
        return [
            f"block: squared error {one[0]:.3g} at first, {one[-1]:.3g} before the last of {len(one)} steps"
            for one in courses
        ]

    def _held(self) -> list[_Part]:
        """What the block is given and gives on the preservation texts, the same for every edit."""
        return list(self._parts([0] * len(self.texts), self.texts, {}))

    def _fit(
        self, edits: Sequence[tuple[Located, Values]], held: Sequence[_Part]
    ) -> tuple[dict[str, Tensor], list[list[float]]]:
        """The block's weights, one lane for each entry (N, *shape), in float32 or better whatever the model's precision, and the errors of each."""
        of, asked, wanted = [], [], {}
        for lane, (located, values) in enumerate(edits):
            for (row, position), value in zip(located.anchors, values.hidden, strict=True):
                wanted.setdefault(len(of) + row, []).append((position, value))
            of += [lane] * len(located.ids)
            asked += [
                one.ids[: windows[-1].anchor + 1]
                for one, windows in zip(located.examples, located.windows, strict=True)
            ]
        parts = [*self._parts(of, asked, wanted), *(_repeated(part, len(edits)) for part in held)]
        leaves = {
            name: nn.Parameter(wide(weight.detach()).expand(len(edits), *weight.shape).clone())
            for name, weight in weights(self.model, self.peer).items()
        }
        lanes = Lanes(self.model, [str(lane) for lane in range(len(edits))], leaves)
        errors = self._descend(lanes, parts, [located.ids for located, _ in edits])
        return {name: leaf.detach() for name, leaf in leaves.items()}, torch.stack(
            errors
        ).T.tolist()

    def _parts(
        self,
        of: Sequence[int],
        sequences: Sequence[Sequence[int]],
        wanted: Mapping[int, Sequence[tuple[int, Tensor]]],
    ) -> Iterator[_Part]:
        """What the block is to give on sequences, of each of which it is said whose lane it is in."""
        tokens = Counter()
        for lane, sequence in zip(of, sequences, strict=True):
            tokens[lane] += len(sequence)
        for rows, ids in chunks(sequences, self.model.device):
            (call,) = look(self.model, ids, (self.site.block,))
            output = wide(call.output).clone()
            share = torch.zeros(ids.shape, dtype=output.dtype)
            for place, row in enumerate(rows):
                share[place, : len(sequences[row])] = 1 / (tokens[of[row]] * output.shape[-1])
                for position, value in wanted.get(row, ()):
                    output[place, position] = value.to(output.dtype)
            yield _Part(
                [of[row] for row in rows],
                _widened(call.args),
                _widened(call.kwargs),
                output,
                share.to(ids.device),
            )

    def _descend(
        self, lanes: Lanes, parts: Sequence[_Part], ids: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """The error of each lane (N,) before each step; Diverged names the edits of those that are not finite."""
        norms = [leaf for name, leaf in lanes.weights.items() if "norm" in name]
        rest = [leaf for name, leaf in lanes.weights.items() if "norm" not in name]
        groups = [
            {"params": rest, "weight_decay": self.peer.unke_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.peer.unke_rate, fused=True
        )
        errors: list[Tensor] = []
        with lanes.laid():
            for _ in range(self.peer.unke_steps):
                adam.zero_grad()
                error = torch.zeros(len(ids))
                for part in parts:
                    lanes.read([lanes.ids[lane] for lane in part.of])
                    output = self.site.block(*part.args, **part.kwargs)
                    output = output[0] if isinstance(output, tuple) else output
                    by_row = ((output - part.wanted).square().sum(-1) * part.share).sum(-1)  # (R,)
                    by_row.sum().backward()
                    error.index_add_(0, torch.tensor(part.of), by_row.detach().to(error))
                if not error.isfinite().all():
                    broken = [
                        edit
                        for own, finite in zip(ids, error.isfinite().tolist(), strict=True)
                        if not finite
                        for edit in own
                    ]
                    raise Diverged(
                        f"{self.peer.name}: the block's error of edit {', '.join(map(repr, broken))} is not finite after {len(errors)} steps; "
                        f"expected an unke_rate below {self.peer.unke_rate:g}",
                        broken,
                    )
                errors.append(error)
                adam.step()
        return errors


def _widened(value: Any) -> Any:
    """Tensors of a call in float32 or better, whatever holds them."""
    return _each(value, lambda one: wide(one) if one.is_floating_point() else one)


def _repeated(part: _Part, count: int) -> _Part:
    """The same rows for each of so many lanes, lane after lane; what the rows of a part share goes on being shared."""
    rows = len(part.of)
    args, kwargs, wanted, share = _each(
        tuple(part[1:]),
        lambda one: (
            one.repeat(count, *[1] * (one.dim() - 1)) if one.dim() > 1 and len(one) == rows else one
        ),
    )
    return _Part([lane for lane in range(count) for _ in range(rows)], args, kwargs, wanted, share)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return tuple(_each(one, change) for one in value)
    return (
        {name: _each(one, change) for name, one in value.items()}
        if isinstance(value, dict)
        else value
    )


SOLVERS = {"memit": ClosedForm, "alphaedit": ClosedForm, "unke": BlockSteps}
