"""The seam: `with edited(model, tokenizer, edits, method) as m:`, undone on exit; and edits saved and loaded."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import InputError, nearest
from uke.methods.catalog import PUBLISHED, find
from uke.methods.finetune import Progress, Training, adapt, prepare, train, weights
from uke.methods.locate_edit import solvers
from uke.methods.peers import Peer
from uke.methods.recipes import Recipe
from uke.models.model import fingerprint, kept

# A method that is neither recipe nor peer: it takes model, tokenizer and edits, and gives the edited model until it is left.
Solver = Callable[
    [nn.Module, PreTrainedTokenizerBase, Sequence[Edit]], AbstractContextManager[nn.Module]
]
METHODS: dict[str, Recipe | Peer | Solver] = dict(PUBLISHED)

RECORD, WEIGHTS, ADAPTER = "edit.json", "edit.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class EditRecord:
    """What an edit did: `Training`'s fields, and each changed weight's relative Frobenius norm of the change."""

    losses: list[float]
    steps: int
    seconds: float
    stopped: str
    change_norm: dict[str, float]
    notes: list[str] = field(default_factory=list)


@contextmanager
def edited(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    method: str | Recipe | Peer | Solver,
    progress: Progress | None = None,
) -> Iterator[nn.Module]:
    """The model with the edits written into it; its `edit_record` (EditRecord) says what was done.

    `method` is a name in METHODS, a recipe, a peer, or a solver. Direct recipes and peers yield the model itself,
    adapter recipes peft's wrapper around it. The in-context peer moves no weight: its `passages` say by the id of an
    edit what stands before every question about it (`answering`), that of its locality probes too. On exit, also
    after an exception, every weight is bit for bit as before, as are buffers, `requires_grad` and the training mode;
    only the weights that change are copied for that. `progress(steps, loss)` follows every pass of a training, or step
    towards a peer's target values; what it raises ends the edit like any other exception.
    Raises InputError for an unknown method, a method that selects no weight and an edit longer than the context, all
    before training, and as `baselines.write` does; FloatingPointError for a loss that is not finite.
    """
    method = find(method, METHODS) if isinstance(method, str) else method
    if not isinstance(method, Recipe | Peer):
        with method(model, tokenizer, edits) as solved:
            yield solved
        return
    prepare(model, tokenizer, edits, method)
    way = (
        _in_context
        if getattr(method, "solver", "") == "in_context"
        else _adapted
        if getattr(method, "adapter", "")
        else _direct
    )
    with (
        kept(model, {}),
        way(model.eval(), tokenizer, edits, method, progress) as (changed, training, norms),
    ):
        changed.edit_record = EditRecord(**vars(training), change_norm=norms)
        try:
            yield changed
        finally:
            del changed.edit_record


Change = tuple[nn.Module, Training, dict[str, float]]


@contextmanager
def _direct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    method: Recipe | Peer,
    progress: Progress | None,
) -> Iterator[Change]:
    choose, write = (
        (weights, train) if isinstance(method, Recipe) else (solvers.weights, solvers.write)
    )
    trained = choose(model, method)
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    try:
        training = write(model, tokenizer, edits, method, progress)
        norms = {
            name: change(weight.detach() - before[name], before[name])
            for name, weight in trained.items()
        }
        yield model, training, norms
    finally:
        for name, weight in trained.items():
            weight.data.copy_(before[name])


@contextmanager
def _adapted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Recipe,
    progress: Progress | None,
) -> Iterator[Change]:
    wrapped = adapt(model, recipe, len(edits))
    try:
        training = train(wrapped, tokenizer, edits, recipe, progress)
        norms = {
            f"{name}.weight": change(
                layer.get_delta_weight(wrapped.active_adapter).detach(), layer.weight.detach()
            )
            for name, layer in wrapped.get_base_model().named_modules()
            if isinstance(layer, LoraLayer)
        }
        yield wrapped, training, norms
    finally:
        wrapped.unload()


@contextmanager
def _in_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    peer: Peer,
    progress: Progress | None,
) -> Iterator[Change]:
    model.passages = {edit.id: edit.answer for edit in edits}
    try:
        yield model, Training(), {}
    finally:
        del model.passages


def change(difference: Tensor, weight: Tensor) -> float:
    """Frobenius norm of a difference relative to that of the weight it changes."""
    return float(
        difference.float().norm() / weight.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    )


def save(m: nn.Module, directory: str | Path) -> None:
    """Keep an edit: a peft adapter directory, or the changed weights as safetensors; beside it a small JSON record.

    `m` is what `edited` yields. Raises InputError for a model that carries no edit, or carries it in its prompts.
    """
    if not isinstance(record := getattr(m, "edit_record", None), EditRecord) or hasattr(
        m, "passages"
    ):
        raise InputError(
            f"{directory}: nothing to save; expected the model that edited(...) yields"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(m, PeftModel):
        form, unchanged = "adapter", _unchanged(m.get_base_model(), ())
        if isinstance(m.active_peft_config, AdaLoraConfig):
            # Pruned ranks are zeros: kept in the file they change nothing, cut out they would change the rounding.
            m.active_peft_config.rank_pattern = None
        # Asked for, peft would look for the base model on the hub to compare vocabularies.
        m.save_pretrained(directory, save_embedding_layers=False)
    else:
        form, unchanged = "weights", _unchanged(m, record.change_norm)
        parameters = dict(m.named_parameters())
        save_file(
            {name: parameters[name].detach().contiguous() for name in record.change_norm},
            directory / WEIGHTS,
        )
    content = {"form": form, "unchanged": unchanged, "record": vars(record)}
    # Written last: a directory without it was never finished.
    (directory / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(model: PreTrainedModel, directory: str | Path) -> nn.Module:
    """The model with a saved edit: itself with the saved weights, or peft's wrapper around it; with `edit_record`.

    Raises InputError, and leaves the model as it is, where the directory is incomplete or damaged, or where any
    weight that the edit does not bring differs from the model it was made on.
    """
    directory = Path(directory)
    form, unchanged, record = _read(directory)
    if _unchanged(model, record.change_norm if form == "weights" else ()) != unchanged:
        raise InputError(
            f"{directory / RECORD}: field unchanged: this edit was made on another model"
        )
    if form == "weights":
        edited_model = _load_weights(model, directory / WEIGHTS, record.change_norm)
    else:
        edited_model = _load_adapter(model, directory)
    edited_model.edit_record = record
    return edited_model


def _read(directory: Path) -> tuple[str, str, EditRecord]:
    path = directory / RECORD
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a directory written by save(...)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form, unchanged, record = (
            content["form"],
            content["unchanged"],
            EditRecord(**content["record"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a record written by save(...) ({error})") from None
    if form not in ("weights", "adapter"):
        raise InputError(
            f"{path}: field form: unknown '{form}'{nearest(str(form), ('weights', 'adapter'))}"
        )
    return form, unchanged, record


def _load_weights(model: PreTrainedModel, path: Path, names: Collection[str]) -> PreTrainedModel:
    parameters = dict(model.named_parameters())
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no readable safetensors file ({error})") from None
    for name in sorted({*saved, *names}):
        if name not in saved or name not in names or parameters[name].shape != saved[name].shape:
            raise InputError(
                f"{path}: weight {name}: expected each weight of {RECORD} once, in the model's shape"
            )
    for name, tensor in saved.items():
        parameters[name].data.copy_(tensor)
    return model


def _load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    path = directory / ADAPTER
    # Without these files peft would look for a pickle, and then on the hub.
    for file in (directory / "adapter_config.json", path):
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected a peft adapter directory")
    try:
        config, saved = PeftConfig.from_pretrained(directory), load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{directory}: no readable peft adapter ({' '.join(str(error).split())})"
        ) from None
    with kept(model, {}):
        try:
            wrapped = get_peft_model(model, config)
        except ValueError:
            raise InputError(
                f"{directory}: the adapter's target_modules are not in the model"
            ) from None
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if {name: tensor.shape for name, tensor in wanted.items()} != {
            name: t.shape for name, t in saved.items()
        }:
            wrapped.unload()
            raise InputError(f"{path}: not the weights that adapter_config.json describes")
        set_peft_model_state_dict(wrapped, saved)
    return wrapped.eval()


@dataclass(frozen=True)
class _Unchanged:
    """What an edit leaves alone, in the form that `models.fingerprint` reads."""

    config: PretrainedConfig
    tensors: Mapping[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.tensors


def _unchanged(model: PreTrainedModel, changed: Collection[str]) -> str:
    """Fingerprint of all weights but the changed ones, under the names they have without an adapter around them."""
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name not in changed and ".lora_" not in name and ".ranknum." not in name
    }
    return fingerprint(_Unchanged(model.config, tensors))
