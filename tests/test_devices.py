"""A model over two GPUs (tools/two_gpus.py): tensors that would not meet, another edit."""

import sys
from pathlib import Path

import pytest
from conftest import FAMILIES
from small import EDITS, QUICK, baseline, moved, state
from uke.errors import InputError
from uke.methods.edited import edited, edited_each
from uke.methods.recipes import BASELINES
from uke.models.generate import target_log_probability
from uke.models.model import load

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from two_gpus import FIRST, SECOND, laid, two_gpus

METHODS = {n: QUICK[n].model_copy(update={"steps": 1}) for n in QUICK if n != "AdaLoRA"}
METHODS |= {n: baseline(n, unke_steps=1, window=12, steps=2) for n in BASELINES if n[:2] != "in"}
PLACES = {"lm_head": SECOND} | {f"model.layers.{n}": (FIRST, SECOND)[n > 1] for n in range(4)}
PLACES |= {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.norm": SECOND}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_edits_every_family_and_over_two_gpus_as_on_one(measured, tokenizer, family):
    model, probes = measured(family), [edit.probes[0] for edit in EDITS[:2]]
    before, over_two = state(model), [*METHODS][FAMILIES.index(family) :: len(FAMILIES)]

    def said(model, name, write=edited_each):
        with write(model, tokenizer, EDITS[:2], METHODS[name]) as m:
            assert write is edited_each or moved(m, before)
            return target_log_probability(m, tokenizer, probes)

    assert all(said(model, name, edited) for name in METHODS.keys() - over_two)
    for name in over_two:
        with two_gpus():
            found = said(laid(measured(family), PLACES), name)
        assert found == pytest.approx(said(model, name), abs=1e-3)


def test_weights_that_no_device_holds_and_pruned_ranks_over_two_are_refused(tiny, tokenizer):
    with pytest.raises(InputError, match="the devices do not hold its weights"):
        load("embedded", {"": "cpu", "model.layers.7": "disk"})
    with two_gpus(), pytest.raises(InputError, match="AdaLoRA takes a model on one device"):
        edited(laid(tiny(), PLACES), tokenizer, EDITS, QUICK["AdaLoRA"]).__enter__()
