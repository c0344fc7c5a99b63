"""The solvers of locate-then-edit methods: MEMIT and AlphaEdit in closed form, UnKE by gradient steps on one block."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from uke import moments
from uke.edits import Edit
from uke.errors import InputError
from uke.finetune import Progress, Training, prepare
from uke.locate import Located, Site, chunks, locate, look, sites, states, wide
from uke.peers import Peer
from uke.values import Values, target_values


def weights(model: nn.Module, peer: Peer) -> dict[str, nn.Parameter]:
    """The parameters a peer writes to, by name: the `down_proj` of its layers, or UnKE's whole block."""
    places = sites(model, peer.layers)
    if peer.solver != "unke":
        return {f"{site.name}.weight": site.projection.weight for site in places}
    inside = {id(parameter) for parameter in places[-1].block.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], peer: Peer, progress: Progress | None = None
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
    located = locate(model, prepare(model, tokenizer, edits, peer), peer)
    values = target_values(model, located, places[-1], peer, progress)
    notes = solver.solve(located, values)
    training = Training(values.losses, values.steps, stopped=values.stopped, notes=[*located.notes(peer), *notes])
    training.steps += solver.steps
    training.seconds = time.perf_counter() - started
    return training


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
    left = (matrix @ solved - keys.T).norm() / keys.norm().clamp(min=torch.finfo(torch.float64).tiny)
    if failed or not change.isfinite().all() or not left < 1e-6:
        raise ValueError("singular or not finite")
    return change


class ClosedForm:
    """MEMIT and AlphaEdit: each layer takes its share of what the last is still short of; the last takes all of it."""

    steps = 0

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, places: Sequence[Site], peer: Peer) -> None:
        self.model, self.places, self.peer = model, places, peer
        if peer.solver == "memit":
            self.systems = [System(peer.memit_lambda * moment) for moment in moments.second_moments(model, places)]
        else:
            found = moments.projectors(model, places, peer.null_threshold)
            self.systems = [System(peer.alphaedit_l2 * torch.eye(len(one), dtype=one.dtype, device=one.device), one) for one in found]

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
                raise InputError(f"{self.peer.name}: the system of {site.name} is {error}; expected second moments of more texts, or a larger ridge") from None
            site.projection.weight.copy_(site.projection.weight.double() + change)
        return []

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
    """Calls of the block to reproduce: output (B, T, D) wanted where `real` (B, T), each element counting `share`."""

    args: tuple
    kwargs: dict
    wanted: Tensor
    real: Tensor
    share: float


class BlockSteps:
    """UnKE: AdamW on every parameter of one block, whose output is to be the target values and else what it was.

    Squared error, mean over positions and width: over the edits up to their last anchor, and over the preservation
    texts, with equal weight (arXiv 2405.15349).
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, places: Sequence[Site], peer: Peer) -> None:
        self.model, self.site, self.peer = model, places[-1], peer
        self.texts = moments.preservation(model, tokenizer, peer.preservation, peer.seed) if peer.preservation else []
        self.steps = peer.unke_steps

    def solve(self, located: Located, values: Values) -> list[str]:
        asked = [one.ids[: windows[-1].anchor + 1] for one, windows in zip(located.examples, located.windows, strict=True)]
        wanted: dict[int, list[tuple[int, Tensor]]] = {}
        for (row, position), value in zip(located.anchors, values.hidden, strict=True):
            wanted.setdefault(row, []).append((position, value))
        parts = [*self._parts(asked, wanted), *self._parts(self.texts, {})]
        # The block is trained as float32 copies, on float32 inputs, whatever the model's own precision.
        copies = {name: wide(p.detach()).clone().requires_grad_() for name, p in self.site.block.named_parameters()}
        losses = self._fit(copies, parts)
        with torch.no_grad():
            for name, parameter in self.site.block.named_parameters():
                parameter.copy_(copies[name])
        return [f"block: squared error {losses[0]:.3g} at first, {losses[-1]:.3g} before the last of {len(losses)} steps"]

    def _parts(self, sequences: Sequence[Sequence[int]], wanted: Mapping[int, Sequence[tuple[int, Tensor]]]) -> Iterator[_Part]:
        tokens = sum(map(len, sequences))
        for rows, ids in chunks(sequences, self.model.device):
            (call,) = look(self.model, ids, (self.site.block,))
            output = wide(call.output).clone()
            for place, row in enumerate(rows):
                for position, value in wanted.get(row, ()):
                    output[place, position] = value.to(output.dtype)
            lengths = torch.tensor([len(sequences[row]) for row in rows], device=ids.device)
            real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            yield _Part(_widened(call.args), _widened(call.kwargs), output, real, 1 / (tokens * output.shape[-1]))

    def _fit(self, copies: Mapping[str, Tensor], parts: Sequence[_Part]) -> list[float]:
        """The error before each step; FloatingPointError where it is not finite."""
        norms = [value for name, value in copies.items() if "norm" in name]
        rest = [value for name, value in copies.items() if "norm" not in name]
        groups = [{"params": rest, "weight_decay": self.peer.unke_decay}, {"params": norms, "weight_decay": 0.0}]
        adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.peer.unke_rate, fused=True)
        losses = []
        for _ in range(self.peer.unke_steps):
            adam.zero_grad()
            losses.append(0.0)
            for part in parts:
                output = functional_call(self.site.block, dict(copies), part.args, part.kwargs)
                output = output[0] if isinstance(output, tuple) else output
                loss = (output - part.wanted)[part.real].square().sum() * part.share
                loss.backward()
                losses[-1] += loss.item()
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{self.peer.name}: the block's error is not finite after {len(losses) - 1} steps; expected an unke_rate below {self.peer.unke_rate:g}")
            adam.step()
        return losses


def _widened(value):
    """Tensors of a call in float32 or better, whatever holds them."""
    if isinstance(value, Tensor):
        return wide(value) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return tuple(_widened(one) for one in value)
    return {name: _widened(one) for name, one in value.items()} if isinstance(value, dict) else value


SOLVERS = {"memit": ClosedForm, "alphaedit": ClosedForm, "unke": BlockSteps}
