"""The seam: `with edited(model, tokenizer, edits, method) as m:`, undone on exit; save and load."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uke.data.formats import read_json
from uke.errors import InputError, located, typed
from uke.files import sha256, write_atomic
from uke.methods.catalog import METHODS, find
from uke.methods.lanes import attached
from uke.methods.method import EditRecord, Edits, Method, Progress, Tokenizer, Training, norms_since
from uke.models.model import fingerprint, kept, refuse_adapter

LANE_MIB = 64  # what a lane's activations and cache take at least
LOGITS = 3 * 128  # logits held for an answer, with their gradients

RECORD, WEIGHTS = "edit.json", "edit.safetensors"
# What a configuration says beside what decides an answer.
PASSING = "use_cache output_hidden_states output_attentions return_dict pad_token_id".split()
PASSING += "tokenizer_class problem_type id2label label2id initializer_range".split()
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _method(model: nn.Module, method: str | Method) -> Method:
    """Return the method itself or of that name; InputError for a model that it cannot edit."""
    method = method if isinstance(method, Method) else find(method, METHODS)
    if method.moves_weights and hasattr(model, "lanes"):
        raise InputError("the model has lanes of edited_each(...); expected it without")
    return method


@typed
@contextmanager
def edited(
    model: nn.Module,
    tokenizer: Tokenizer,
    edits: Edits,
    method: str | Method,
    progress: Progress = None,
) -> Iterator[nn.Module]:
    """Yield the model with the edits written into it together.

        model, tokenizer = load("embedded")
        with edited(model, tokenizer, edits, "FT-M") as m:
            print(answer(m, tokenizer, probes), m.edit_record.steps)
        # here every weight of `model` is bit for bit as before

    `method` is a name in METHODS or a `Method`. It yields the model itself, for an adapter peft's
    wrapper around it; `edit_record` (an EditRecord) says what was done. In-context editing moves no
    weight: the model's `passages` stand before every question about an edit. On exit, also after an
    exception, the model is bit for bit as before. `progress(steps, loss)` follows every step, and
    what it raises ends the edit. InputError for an unknown method, one that selects no weight and
    an edit longer than the context; Diverged (a FloatingPointError) for a loss that is not finite.
    """
    method = _method(model, method)
    method.examples(model, tokenizer, edits)
    with (
        kept(model, {}),
        method.applied(model.eval(), tokenizer, edits, progress) as (m, record),
        attached(m, edit_record=record),
    ):
        yield m


@typed
@contextmanager
def edited_each(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, method: str | Method
) -> Iterator[nn.Module]:
    """Yield the model with every edit written alone, each in a lane of its own.

        with edited_each(model, tokenizer, edits, "FT-M") as m:
            answers = answer(m, tokenizer, [probe for edit in edits for probe in edit.probes])
            print(m.edit_records["ada"].steps, m.failed)

    A lane is one of N independent copies of the edited weights in one forward pass; every probe is
    answered by the lane of its `edit`, but for rounding as `edited` answers it. `edit_records` has
    an EditRecord by the edit's id; `failed` says why others have no lane. Raises as `edited` does.
    """
    method = _method(model, method)
    method.examples(model, tokenizer, edits)
    if not method.moves_weights:
        with edited(model, tokenizer, edits, method) as m:
            with attached(m, edit_records={edit.id: m.edit_record for edit in edits}, failed={}):
                yield m
        return
    with kept(model, {}):
        lanes, trainings, failed = method.write_each(model.eval(), tokenizer, edits)
        records = {}
        for edit, training, norms in zip(lanes.ids, trainings, lanes.change_norms(), strict=True):
            records[edit] = EditRecord(**vars(training), change_norm=norms)
        with lanes.laid(), attached(model, edit_records=records, failed=failed):
            yield model


@dataclass
class Writer:
    """Writes edits on top of what it wrote before; `before` holds the weights as they were."""

    model: nn.Module
    tokenizer: Tokenizer
    method: Method
    weights: dict[str, nn.Parameter]
    before: dict[str, Tensor]

    def write(self, edits: Edits) -> Training:
        """Write these edits together into the weights as they are now."""
        return self.method.write(self.model, self.tokenizer, edits)

    def norms(self) -> dict[str, float]:
        """Return each weight's relative Frobenius norm of all that was changed so far."""
        return norms_since(self.weights, self.before)


@typed
@contextmanager
def sequence(model: nn.Module, tokenizer: Tokenizer, method: str | Method) -> Iterator[Writer]:
    """Yield a writer whose edits pile up in the model's own weights.

        with sequence(model, tokenizer, "FT-M") as writer:
            for edit in edits:
                writer.write([edit])
            print(answer(model, tokenizer, probes), writer.norms())

    On exit, also after an exception, all is bit for bit as before. InputError for a method that
    moves no weight.
    """
    method = _method(model, method)
    if not method.moves_weights:
        raise InputError(f"{method.name}: moves no weight; expected a method that writes")
    method.depends_on(model)  # the statistics of the model as it is on entry
    weights = method.weights(model)
    with kept(model, weights) as before:
        yield Writer(model.eval(), tokenizer, method, weights, before)


def lane_mib(model: nn.Module, method: Method) -> float:
    """Estimate the mebibytes that one more lane takes while it is trained.

    Of each number its value, gradient, two moments of Adam and the copy of a lane that ended.
    """
    logits = LOGITS * model.get_input_embeddings().num_embeddings
    return LANE_MIB + 4 * (5 * method.lane_size(model) + logits) / 2**20


@typed
def save(m: nn.Module, directory: str | Path) -> None:
    """Save an edit: its changed weights, or its peft adapter, and a small JSON record.

        with edited(model, tokenizer, edits, "LoRA") as m:
            save(m, "my-edit")
        m = load(model, "my-edit")  # also in another process, or in plain peft

    `m` is what `edited` yields. InputError for a model without an edit in its weights.
    """
    record, directory = getattr(m, "edit_record", None), Path(directory).expanduser()
    if record is None or not record.change_norm:
        raise InputError(f"{directory}: nothing to save; expected what edited(...) yields")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).unlink(missing_ok=True)  # of an edit that stood there before
    except OSError as error:
        raise InputError(f"{directory}: expected a folder to make ({error.strerror})") from None
    try:
        if hasattr(m, "peft_config"):
            form, unchanged = "adapter", _unchanged(m.get_base_model(), ())
            if m.active_peft_config.peft_type == "ADALORA":
                # Pruned ranks are zeros: in the file they change nothing, cut out the rounding.
                m.active_peft_config.rank_pattern = None
            # Without this, peft would look for the base model on the hub to compare vocabularies.
            m.save_pretrained(directory, save_embedding_layers=False)
        else:
            form, unchanged = "weights", _unchanged(m, record.change_norm)
            weights = {name: m.get_parameter(name).detach() for name in record.change_norm}
            save_file({n: w.contiguous() for n, w in weights.items()}, directory / WEIGHTS)
    except SafetensorError as error:  # as on a full disk
        raise OSError(f"{directory}: {error}") from None
    content = {"form": form, "dtype": str(m.dtype), "unchanged": unchanged, "record": vars(record)}
    content["config"] = sha256(directory / ADAPTER_CONFIG) if form == "adapter" else None
    # Written last: a directory without it was never finished.
    write_atomic(directory / RECORD, json.dumps(content, indent=1) + "\n")


@typed
def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load a saved edit into the model: return it, or peft's wrapper around it, with `edit_record`.

    InputError, and the model is as before, where the directory is incomplete or damaged, or where
    any weight that the edit does not bring differs from the model it was made on.
    """
    import peft  # seconds, which drawing again from rows does without

    refuse_adapter(model)
    path = Path(directory).expanduser() / RECORD
    with located(f"{path}: not a record written by save(...)"):
        content = read_json(path)
        record = TypeAdapter(EditRecord).validate_python(content["record"])
        changed = {"weights": record.change_norm, "adapter": ()}[content["form"]]
    if content.get("dtype", own := str(model.dtype)) != own:
        raise InputError(f"{path}: expected a model with dtype={content['dtype']}, found {own}")
    if _unchanged(model, changed) != content.get("unchanged"):
        raise InputError(f"{path}: field unchanged: this edit was made on another model")
    # Without these files peft would look for a pickle, and then on the hub.
    for name in [WEIGHTS] if changed else [ADAPTER_CONFIG, ADAPTER]:
        path = path.with_name(name)
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected one of save(...)")
        if name == ADAPTER_CONFIG and content.get("config") not in (None, sha256(path)):
            raise InputError(f"{path}: no configuration that save(...) wrote")
    try:
        saved = load_file(path)
        config = None if changed else peft.PeftConfig.from_pretrained(path.parent)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no readable file, or no configuration ({reason})") from None
    if changed:
        parameters = {name: model.get_parameter(name) for name in changed}
        if _shapes(saved) != _shapes(parameters):
            raise InputError(f"{path}: expected the weights of {RECORD}, in the model's shapes")
        for name, tensor in saved.items():
            parameters[name].data.copy_(tensor)
        loaded = model
    else:
        with kept(model, {}):
            loaded = peft.get_peft_model(model, config).eval()
            own = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
            if _shapes(saved) != _shapes(own):
                loaded.unload()
                raise InputError(f"{path}: not the weights that adapter_config.json describes")
            peft.set_peft_model_state_dict(loaded, saved)
    loaded.edit_record = record
    return loaded


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _unchanged(model: nn.Module, changed: Collection[str]) -> str:
    """Fingerprint of all weights but the changed ones, by their names without an adapter."""
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name not in changed and ".lora_" not in name and ".ranknum." not in name
    }
    deciding = {n: value for n, value in model.config.to_diff_dict().items() if n not in PASSING}
    config = SimpleNamespace(to_diff_dict=lambda: deciding)
    return fingerprint(SimpleNamespace(config=config, state_dict=lambda: tensors))
