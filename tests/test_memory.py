"""Memory: a peak that is missed since it was given back, or counted though it was before; free memory misread."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from uke.methods import finetune
from uke.methods.lanes import replaced
from uke.study import memory
from uke.study.memory import MIB, Peak

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)


def fill(mib: int) -> None:
    """Touch so many mebibytes and give them back."""
    torch.ones(mib * MIB, dtype=torch.uint8)


@on_linux
def test_memory_that_was_freed_before_the_end_is_seen():
    peak = Peak(CPU)
    fill(64)
    assert 60 < peak.mib() < 110


@on_linux
def test_the_highest_point_stays_what_it_was():
    peak = Peak(CPU)
    fill(96)
    first = peak.mib()
    fill(32)
    assert 90 < first <= peak.mib() < first + 20


@on_linux
def test_an_earlier_and_higher_peak_is_not_counted():
    fill(192)
    peak = Peak(CPU)
    assert peak.mib() < 30
    fill(64)
    assert 60 < peak.mib() < 110


@on_linux
def test_what_is_held_at_the_start_is_not_counted():
    held = torch.ones(128 * MIB, dtype=torch.uint8)
    peak = Peak(CPU)
    fill(64)
    assert 60 < peak.mib() < 110 and held.all()


@pytest.mark.parametrize("where", ["none/clear_refs", "."], ids=["absent", "no file"])
def test_a_system_that_does_not_tell_gives_no_number(monkeypatch, tmp_path, where):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / where)
    peak = Peak(CPU)
    fill(8)
    assert peak.mib() is None


# --- what is still free ----------------------------------------------------------------------------------------------


def test_free_memory_is_that_of_another_line_or_unit(monkeypatch, tmp_path):
    """MemFree leaves out what the system would give back; the file counts in kibibytes."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:       16000000 kB\nMemFree:            1024 kB\nMemAvailable:       5632 kB\nSwapFree:  9 kB\n"
    )
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    assert memory.free_mib(CPU) == 5.5


@on_linux
def test_more_is_free_than_the_machine_has():
    assert 0 < memory.free_mib(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB


@pytest.mark.parametrize(
    "content", [None, "MemFree: 7 kB\n", ""], ids=["no file", "no such line", "empty"]
)
def test_a_system_that_does_not_tell_ends_the_work(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    assert memory.free_mib(CPU) == float("inf")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["job", "job/step"])
def test_a_job_takes_what_its_cluster_does_not_give_it(monkeypatch, tmp_path, version, limited):
    """The limit may stand on any group above the process; pages of files that can be dropped count as free."""
    top, most, taken, free, member = (
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            2**63 - 4096,
            "4:cpu,memory:/job/step",
        )
        if version == 1
        else ("", "memory.max", "memory.current", "max", "0::/job/step")
    )
    for group in ("job", "job/step"):
        folder = tmp_path / top / group
        folder.mkdir(parents=True)
        (folder / most).write_text(f"{64 * MIB if group == limited else free}\n")
        (folder / taken).write_text(f"{24 * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {4 * MIB}\n")
    (tmp_path / "cgroup").write_text(f"2:devices:/\n{member}\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBER", tmp_path / "cgroup")
    assert memory.free_mib(CPU) == 44


@pytest.mark.parametrize(
    ("reserved", "allocated", "free"),
    [(0, 0, 3), (70, 12, 3 + 70 - 12)],
    ids=["untouched", "after a training"],
)
def test_free_memory_of_a_gpu_is_that_of_the_machine_or_lacks_what_torch_holds_in_reserve(
    monkeypatch, reserved, allocated, free
):
    for name, told in (
        ("mem_get_info", (3 * MIB, 80 * MIB)),
        ("memory_reserved", reserved * MIB),
        ("memory_allocated", allocated * MIB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert memory.free_mib(torch.device("cuda", 0)) == free


def trained_once(model, tokens) -> dict[str, torch.Tensor]:
    """Gradients of a training's loss."""
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    finetune.loss(model, batch, "target_tokens").sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return gradients


def learned(model, tokens) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a training's loss, and how many bytes autograd keeps for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return trained_once(model, tokens), sum(kept.values())


def test_activations_that_are_computed_again_change_a_gradient_or_are_kept(tiny):
    model, tokens = (
        tiny("llama"),
        torch.randint(0, 60, (4, 64), generator=torch.Generator().manual_seed(0)),
    )
    before, whole = learned(model, tokens)
    with memory.recomputed(model):
        after, less = learned(model, tokens)
    assert less < whole / 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert learned(model, tokens)[1] == whole  # and it is over on exit


def test_what_reads_with_a_cache_reads_twice(tiny):
    """Target values: a second reading would lengthen the cache that the first has filled."""
    model, tokens = tiny("llama"), torch.arange(12)[None]
    read = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: read.append(1))
    with memory.recomputed(model):
        out = model(input_ids=tokens, use_cache=True)
        out.logits.sum().backward()
    assert out.past_key_values.get_seq_length() == 12 and len(read) == len(model.model.layers)


def test_a_model_stays_wrapped_after_an_error(tiny):
    model = tiny("llama")
    with pytest.raises(RuntimeError), memory.recomputed(model):
        raise RuntimeError
    assert not any("forward" in vars(block) for block in model.model.layers)


@pytest.mark.parametrize(
    ("device", "ways"),
    [("cpu", [memory.recomputed]), ("cuda", [memory.recomputed, memory.offloaded])],
)
def test_a_way_is_taken_twice_or_moves_to_the_host_what_is_there_already(device, ways):
    thrift = memory.Thrift(SimpleNamespace(device=torch.device(device)))
    assert thrift.notes == [] and [memory.WAYS[thrift.more()] for _ in ways] == ways
    assert thrift.more() is None and len(thrift.notes) == len(set(thrift.notes)) == len(ways)


def test_all_ways_together_change_a_gradient_or_offload_what_is_computed_again(tiny, monkeypatch):
    """The host is to hold what goes into a block and not what is inside, and nothing may stay wrapped."""
    model, tokens, moved = (
        tiny("llama"),
        torch.randint(0, 60, (4, 64), generator=torch.Generator().manual_seed(0)),
        {},
    )

    def to_host(tensor):
        moved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.clone()

    monkeypatch.setattr(
        memory,
        "save_on_cpu",
        lambda pin_memory: saved_tensors_hooks(
            lambda tensor: (to_host(tensor),), lambda packed: packed[0]
        ),
    )
    before = trained_once(model, tokens)
    with memory.Thrift(model, list(memory.WAYS)).used():
        after = trained_once(model, tokens)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with memory.recomputed(model):
        assert 0 < sum(moved.values()) <= learned(model, tokens)[1]
    moved.clear()
    trained_once(model, tokens)
    assert not moved


def test_the_host_gets_weights_or_gives_back_other_numbers(tiny, monkeypatch):
    """A linear layer keeps its weight beside its input: sent to the host, the whole model would travel at every step."""
    model, tokens, sent = (
        tiny("llama"),
        torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0)),
        set(),
    )
    before = trained_once(model, tokens)
    host = memory.save_on_cpu

    class Watched(host):
        def __init__(self, **given):
            super().__init__(**given)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (
                sent.add(tensor.untyped_storage().data_ptr()) or pack(tensor)
            )

    monkeypatch.setattr(memory, "save_on_cpu", Watched)
    with memory.offloaded(model):
        after = trained_once(model, tokens)
    assert sent and not sent & {
        weight.untyped_storage().data_ptr() for weight in model.parameters()
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_reading_replaced_inside_another_takes_the_outer_one_off(tiny):
    """Blocks read once inside blocks computed again: the first to end must leave what was there."""
    model, read = tiny("llama"), []
    block = model.model.layers[0]

    def told(name):
        return lambda inner, *args, **kwargs: read.append(name) or inner(*args, **kwargs)

    with replaced({block: told("outer")}):
        with pytest.raises(RuntimeError), replaced({block: told("inner")}):
            model(torch.arange(4)[None])
            raise RuntimeError
        assert read == ["inner", "outer"]
        model(torch.arange(4)[None])
        assert read == ["inner", "outer", "outer"]
    model(torch.arange(4)[None])
    assert len(read) == 3
