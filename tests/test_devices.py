"""A model over two GPUs (tools/two_gpus.py): tensors that would not meet, another edit."""

import sys
from pathlib import Path

import pytest
from conftest import FAMILIES
from small import EDITS, QUICK, baseline
from uke.errors import InputError
from uke.methods.edited import edited, edited_each
from uke.models.generate import answer, target_log_probability
from uke.models.model import load

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from two_gpus import FIRST, SECOND, laid, two_gpus

METHODS = {name: QUICK[name] for name in ("FT-L", "FT-M", "FT-A", "LoRA")}
METHODS |= {name: baseline(name) for name in ("memit", "alphaedit", "anyedit_unke", "muke")}
PLACES = {"lm_head": SECOND} | {f"model.layers.{n}": (FIRST, SECOND)[n > 1] for n in range(4)}
PLACES |= {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.norm": SECOND}


@pytest.mark.parametrize(("name", "family"), zip(METHODS, FAMILIES * 2, strict=False))
def test_an_edit_of_a_model_over_two_gpus_is_that_on_one(measured, tokenizer, name, family):
    method, probes = METHODS[name], [probe for edit in EDITS for probe in edit.probes]

    def said(model):
        with edited_each(model, tokenizer, EDITS, method) as m:
            texts = answer(m, tokenizer, probes, max_new_tokens=4)
            each = target_log_probability(m, tokenizer, probes)
        with edited(model, tokenizer, EDITS[:2], method) as m:
            return texts, each + target_log_probability(m, tokenizer, probes)

    alone = said(measured(family))
    with two_gpus():
        found = said(laid(measured(family), PLACES))
    assert found == (alone[0], pytest.approx(alone[1], abs=1e-3))


def test_weights_that_no_device_holds_and_pruned_ranks_over_two_are_refused(tiny, tokenizer):
    with pytest.raises(InputError, match="the devices do not hold its weights"):
        load("embedded", {"": "cpu", "model.layers.7": "disk"})
    with two_gpus(), pytest.raises(InputError, match="AdaLoRA takes a model on one device"):
        edited(laid(tiny(), PLACES), tokenizer, EDITS, QUICK["AdaLoRA"]).__enter__()
