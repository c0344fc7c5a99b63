"""Single editing of many edits at once: each is written alone into the unedited weights, all of them side by side in lanes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import Diverged, InputError
from uke.methods.catalog import find
from uke.methods.edited import METHODS, EditRecord, Solver, change, edited
from uke.methods.finetune import Training, prepare, weights
from uke.methods.lane_training import adapter, train_apart
from uke.methods.lanes import Lanes, LowRank
from uke.methods.locate_edit import solvers
from uke.methods.locate_edit.anchors import Located, locate, sites
from uke.methods.locate_edit.targets import Values, target_values
from uke.methods.peers import Peer
from uke.methods.recipes import Recipe
from uke.models.model import kept, module_names

LANE_MIB, LOGITS = (
    64,
    3 * 128,
)  # what a lane's activations and cache take at least; logits held for an answer, with their gradients


@contextmanager
def edited_apart(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    method: str | Recipe | Peer | Solver,
) -> Iterator[nn.Module]:
    """The model with every edit written alone, in a lane of its own; `edit_records` has an EditRecord by the edit's id.

    What `edited` yields for one edit after another, but for rounding: probes are asked all together, each of the lane of
    its `edit` (`answering`). An edit that comes to a number that is not finite has no lane: `failed` says why, by its id.
    Seconds of a record are an equal share. Fine-tuning trains side by side (AdaLoRA, whose ranks are pruned by step, one by
    one); of peers the target values are found together, blocks trained side by side (UnKE), systems solved one by one.
    On exit the model is as before. Raises as `edited` does, Diverged where no edit is left.
    """
    method = find(method, METHODS) if isinstance(method, str) else method
    if not isinstance(method, Recipe | Peer):
        raise InputError(
            "edited_apart: a method of one's own writes one edit at a time; expected a recipe or a peer"
        )
    prepare(model, tokenizer, edits, method)
    if isinstance(method, Peer) and method.solver == "in_context":
        with edited(model, tokenizer, edits, method) as m:
            with _told(m, {edit.id: m.edit_record for edit in edits}, {}):
                yield m
        return
    write = (
        _solved
        if isinstance(method, Peer)
        else _adapted
        if method.adapter == "adalora"
        else train_apart
    )
    with kept(model, {}):
        lanes, trainings, failed = write(model.eval(), tokenizer, edits, method)
        records = {
            edit: EditRecord(**vars(training), change_norm=norms)
            for edit, training, norms in zip(lanes.ids, trainings, _norms(lanes), strict=True)
        }
        with lanes.laid(), _told(model, records, failed):
            yield model


@contextmanager
def _told(
    model: nn.Module, records: dict[str, EditRecord], failed: dict[str, str]
) -> Iterator[None]:
    model.edit_records, model.failed = records, failed
    try:
        yield
    finally:
        del model.edit_records, model.failed


Written = tuple[
    Lanes, list[Training], dict[str, str]
]  # the edits that were written, what each training did; why others failed


def lane_mib(model: nn.Module, method: Recipe | Peer) -> float:
    """Mebibytes that one more lane takes while it is trained: value, gradient, two moments and the copy of a lane that ended."""
    if isinstance(method, Peer):
        trained = (
            0
            if method.solver == "in_context"
            else sum(weight.numel() for weight in solvers.weights(model, method).values())
        )
    elif method.adapter:
        projections = [
            model.get_submodule(name)
            for name in module_names(model, method.layers, method.components)
        ]
        trained = sum(method.rank * (one.in_features + one.out_features) for one in projections)
    else:
        trained = sum(weight.numel() for weight in weights(model, method).values())
    return (
        LANE_MIB + 4 * (5 * trained + LOGITS * model.get_input_embeddings().num_embeddings) / 2**20
    )


def _norms(lanes: Lanes) -> list[dict[str, float]]:
    """Of each lane the relative norm of the change, by weight."""
    own = dict(lanes.model.named_parameters())
    found: list[dict[str, float]] = [{} for _ in lanes.ids]
    for lane, norms in enumerate(found):
        for name, stack in lanes.weights.items():
            norms[name] = change(stack[lane] - own[name].detach(), own[name].detach())
        for name, added in lanes.low_rank.items():
            norms[f"{name}.weight"] = change(
                added.scale * added.up[lane] @ added.down[lane], own[f"{name}.weight"].detach()
            )
    return found


def _adapted(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> Written:
    """Adapters trained one by one."""
    trainings, found, failed = {}, [], {}
    for edit in edits:
        try:
            with edited(model, tokenizer, [edit], recipe) as wrapped:
                record = wrapped.edit_record
                trainings[edit.id] = Training(
                    **{name: value for name, value in vars(record).items() if name != "change_norm"}
                )
                found.append(adapter(wrapped))
        except Diverged as error:
            failed[edit.id] = str(error)
    if not found:
        raise Diverged("; ".join(failed.values()), failed)
    scaled = {name: [one[name] for one in found] for name in found[0]}
    low_rank = {
        name: LowRank(
            torch.cat([one.down for one in each]),
            torch.cat([one.scale * one.up for one in each]),
            1.0,
        )
        for name, each in scaled.items()
    }
    return Lanes(model, list(trainings), {}, low_rank), list(trainings.values()), failed


def _solved(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], peer: Peer
) -> Written:
    """As `_solve`; edits that diverge are left out, and the others begun anew."""
    failed: dict[str, str] = {}
    while True:
        try:
            return *_solve(
                model, tokenizer, [edit for edit in edits if edit.id not in failed], peer
            ), failed
        except Diverged as error:
            failed |= dict.fromkeys(error.edits, str(error))
            if len(failed) == len(edits):
                raise Diverged("; ".join(dict.fromkeys(failed.values())), failed) from None


def _solve(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], peer: Peer
) -> tuple[Lanes, list[Training]]:
    """Target values of all edits together, which is one edit at a time but for rounding; then what the solver makes of each."""
    started = time.perf_counter()
    places = sites(model, peer.layers)
    solver = solvers.SOLVERS[peer.solver](model, tokenizer, places, peer)
    located = locate(model, prepare(model, tokenizer, edits, peer), peer)
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
