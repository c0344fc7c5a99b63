"""Memory of an edit: trained weights times what is held of each, and activations, beside what was measured."""

from collections.abc import Sequence

import pandas as pd
from torch import nn
from uke.data.edits import Edit
from uke.methods.recipes import Recipe
from uke.models.model import blocks, module_names
from uke.models.prompts import IGNORED, group_by_length, training_tokens
from uke.study.study import Study

MIB = 2**20


def held(recipe: Recipe, groups: Sequence[int] | None, half: bool) -> float:
    """Copies of what one edit trains, in float32, beyond the model; `groups`: how many lanes are trained at once, group by group.

    Gradient, two moments and the snapshot, or an adapter's value; in a model in half precision (`half`) one more of direct
    weights, since they are trained as float32 copies. Lanes: the value, gradient and two moments of those that are trained, and the
    weights of all that have ended.
    """
    if groups is None:
        return 4 + (half and not recipe.adapter)
    return (4 * max(groups) + sum(groups)) / sum(groups)


def activations(model: nn.Module, examples: Sequence, recipe: Recipe) -> float:
    """MiB that the backward pass needs of a batch of these examples, padded to the longest; a count of tensors, not of bytes seen.

    A block at or above the lowest changed one keeps, for each token, about six vectors of the model's width (norms, queries, attention), keys
    and values, and four of the feed-forward width; the head keeps three numbers for each word of the vocabulary and token of the text.
    """
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = (
        6 * config.hidden_size
        + 2 * config.num_key_value_heads * size
        + 4 * config.intermediate_size
    )
    lowest = min(
        int(name.split(".")[blocks(model)[0][0].count(".")])
        for name in module_names(model, recipe.layers, recipe.components)
    )
    tokens = len(examples) * max(len(one.ids) for one in examples)
    read = len(examples) * max(sum(label != IGNORED for label in one.labels) for one in examples)
    width = next(model.parameters()).element_size()
    return (
        tokens * each * (config.num_hidden_layers - lowest) * width
        + 3 * 4 * read * config.vocab_size
    ) / MIB


def memory(
    study: Study, recipe: Recipe, timings: Sequence[dict], what: str = "embedded model"
) -> list[dict]:
    """Prediction and measurement of one recipe in the ways `single` and `lanes`, as far as these timings have them."""
    measured = pd.DataFrame(timings)
    measured = measured[(measured["method"] == recipe.name) & measured["train_mib"].notna()]
    found = []
    for way in [way for way in ("single", "lanes") if way in set(measured["way"])]:
        # The peak is that of the first group, up to its first answer.
        edits: Sequence[Edit] = study.dataset.edits[
            : study.abreast(recipe) if way == "lanes" else 1
        ]
        edits = edits[: int(measured.loc[measured["way"] == way, "edits"].max())]
        examples = list(recipe.examples(study.model, study.tokenizer, edits).values())
        groups = [
            [examples[place] for place in places]
            for places in group_by_length(
                [len(one.ids) for one in examples], training_tokens(study.model.device)
            )
        ]
        copies = held(
            recipe,
            [len(group) for group in groups] if way == "lanes" else None,
            next(study.model.parameters()).element_size() < 4,
        )
        found.append(
            {
                "what": what,
                "method": recipe.name,
                "way": way,
                "lanes": len(edits),
                "trained": recipe.lane_size(study.model),
                "copies": copies,
                "weights_mib": 4 * copies * len(edits) * recipe.lane_size(study.model) / MIB,
                "activations_mib": max(activations(study.model, group, recipe) for group in groups),
                "measured_mib": float(measured.loc[measured["way"] == way, "train_mib"].median()),
            }
        )
    return found
