"""Padding: a row read twice or never, a part that is mostly padding, more tokens at once than memory was meant for."""

import pytest
import torch
from uke.models import prompts
from uke.models.prompts import group_by_length, training_tokens

LENGTHS = [
    [130, 131, 90, 187, 26, 90, 130],
    [5],
    [],
    [7] * 50,
    list(range(1, 200)),
    [9000, 10, 9000, 3],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=range(len(LENGTHS)))
@pytest.mark.parametrize("tokens", [1, 400, 8192])
def test_a_row_is_read_twice_or_a_part_is_mostly_padding(lengths, tokens):
    found = group_by_length(lengths, tokens)
    assert sorted(place for part in found for place in part) == list(range(len(lengths)))
    for part in found:
        own = [lengths[place] for place in part]
        assert own == sorted(own, reverse=True)
        assert len(own) == 1 or len(own) * own[0] <= tokens
        assert sum(own) >= 0.85 * len(own) * own[0]


def test_parts_are_smaller_than_they_need_be():
    assert [len(part) for part in group_by_length([100] * 9, 400)] == [4, 4, 1]
    assert [len(part) for part in group_by_length([100, 90, 80, 70], 10_000)] == [4] and [
        len(part) for part in group_by_length([100, 50, 50], 10_000)
    ] == [1, 2]


def test_the_default_is_what_the_module_says_now(monkeypatch):
    assert len(group_by_length([10] * 4)) == 1
    monkeypatch.setattr(prompts, "PASS_TOKENS", 20)
    assert len(group_by_length([10] * 4)) == 2


def test_a_cpu_trains_on_as_much_at_once_as_memory_holds_or_a_gpu_on_little(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert (
        training_tokens(cpu)
        == prompts.TRAINING_TOKENS
        < prompts.PASS_TOKENS
        == training_tokens(gpu)
    )
    monkeypatch.setattr(prompts, "PASS_TOKENS", 20)
    assert training_tokens(cpu) == training_tokens(gpu) == 20
