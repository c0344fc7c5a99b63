"""Memory: a peak that is missed or counted though it was before, free memory misread, gradients
changed."""

import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from uke.methods import finetune
from uke.study import memory
from uke.study.memory import MIB, Peak

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def fill(mib: int) -> None:
    """Touch so many mebibytes and give them back."""
    torch.ones(mib * MIB, dtype=torch.uint8)


@on_linux
def test_the_highest_point_since_the_start_is_seen_and_nothing_before_it():
    fill(192)
    held = torch.ones(128 * MIB, dtype=torch.uint8)
    peak = Peak(CPU)
    assert peak.mib() < 30
    fill(96)
    first = peak.mib()
    fill(32)
    assert 90 < first <= peak.mib() < first + 20 and held.all()


def test_a_system_that_does_not_say_gives_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
    assert Peak(CPU).mib() is None


def test_memory_that_torch_holds_in_reserve_on_a_gpu_is_free(monkeypatch):
    says = {"mem_get_info": (3 * MIB, 80 * MIB), "memory_reserved": 70 * MIB}
    for name, value in (says | {"memory_allocated": 12 * MIB}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_mib(torch.device("cuda", 0)) == 3 + 70 - 12


def gradients(model, tokens) -> dict[str, torch.Tensor]:
    """Gradients of a training's loss."""
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    finetune.LOSSES["target_tokens"](model, batch).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def stored(model, tokens) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a training's loss, and how many bytes autograd stores for them."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return gradients(model, tokens), sum(sizes.values())


@pytest.fixture
def example(tiny):
    generator = torch.Generator().manual_seed(0)
    return tiny("llama"), torch.randint(0, 60, (4, 64), generator=generator)


def test_checkpointing_halves_what_is_stored_and_keeps_every_gradient(example):
    before, whole = stored(*example)
    with memory.checkpointed(example[0]):
        after, less = stored(*example)
    assert less < whole / 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stored(*example)[1] == whole  # and it is over on exit
    with pytest.raises(RuntimeError), memory.checkpointed(example[0]):
        raise RuntimeError
    assert not any("forward" in vars(block) for block in example[0].model.layers)


def test_what_reads_with_a_cache_reads_once(tiny):
    """A second reading would lengthen the cache that the first has filled."""
    model, read = tiny("llama"), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: read.append(1))
    with memory.checkpointed(model):
        out = model(input_ids=torch.arange(12)[None], use_cache=True)
        out.logits.sum().backward()
    assert out.past_key_values.get_seq_length() == 12 and len(read) == len(model.model.layers)
