"""Answers kept on disk: another prompt's, one cut short, one of another model, a file that is no file of answers."""

import pytest
from uke.data.edits import Probe
from uke.errors import InputError
from uke.models import generate as answering
from uke.models.generate import AnswerCache, answer

PROBES = [
    Probe(edit=f"e{place}", kind="original", question=question, reference="Ada.")
    for place, question in enumerate(
        ("Who?", "Who is Ada Lovelace?", "Where was Alan Turing born?")
    )
]


@pytest.fixture
def decoded(monkeypatch):
    """How many prompts each call decoded."""
    plain, seen = answering._decode, []
    monkeypatch.setattr(
        answering,
        "_decode",
        lambda model, questions, limits, ends: (
            seen.append(len(questions)) or plain(model, questions, limits, ends)
        ),
    )
    return seen


def test_a_prompt_is_decoded_again_or_answered_with_anothers_text(
    tiny, tokenizer, tmp_path, decoded
):
    model = tiny()
    plain = answer(model, tokenizer, PROBES, max_new_tokens=8)
    decoded.clear()
    assert (
        answer(model, tokenizer, PROBES[:2], max_new_tokens=8, cache=AnswerCache(tmp_path))
        == plain[:2]
    )
    assert (
        answer(model, tokenizer, PROBES[::-1], max_new_tokens=8, cache=AnswerCache(tmp_path))
        == plain[::-1]
    )
    assert answer(model, tokenizer, PROBES, max_new_tokens=8, cache=AnswerCache(tmp_path)) == plain
    assert sum(decoded) == 3


def test_an_answer_cut_short_is_given_where_a_longer_one_is_asked_for(
    tiny, tokenizer, tmp_path, decoded
):
    model, known = tiny(), AnswerCache(tmp_path)
    short, long = (
        answer(model, tokenizer, PROBES, max_new_tokens=room, cache=known) for room in (3, 9)
    )
    assert (
        all(
            one.startswith(other[:4]) and len(one) > len(other)
            for one, other in zip(long, short, strict=True)
        )
        and sum(decoded) == 6
    )
    assert answer(model, tokenizer, PROBES, max_new_tokens=3, cache=AnswerCache(tmp_path)) == short
    assert (
        answer(model, tokenizer, PROBES, max_new_tokens=9, cache=AnswerCache(tmp_path)) == long
        and sum(decoded) == 6
    )


def test_an_answer_that_ended_by_itself_is_asked_again_for_more_room(tmp_path):
    known = AnswerCache(tmp_path)
    known.add({(1, 2): ([7, 8], 5), (3,): ([4, 4, 4], 3)})
    assert known.look_up((1, 2), 99) == [7, 8] and known.look_up((1, 2), 1) == [7]
    assert (
        known.look_up((3,), 3) == [4, 4, 4]
        and known.look_up((3,), 4) is None
        and known.look_up((1,), 1) is None
    )
    known.add({(3,): ([4, 4, 4, 5], 8)})
    assert AnswerCache(tmp_path).look_up((3,), 8) == known.look_up((3,), 8) == [
        4,
        4,
        4,
        5,
    ] and AnswerCache(tmp_path).look_up((3,), 2) == [4, 4]


@pytest.mark.parametrize("content", ["{", "[1]", '[["1 2", "x"]]', '[["1 a", [1], 2]]', '{"a": 1}'])
def test_a_damaged_file_is_not_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match="a.json: not a file of cached answers.*delete it"):
        AnswerCache(tmp_path).look_up((1,), 1)


def test_a_write_that_was_killed_is_read(tmp_path):
    (tmp_path / "a.1-2.part").write_text("[[")
    AnswerCache(tmp_path).add({(1,): ([2], 1)})
    assert AnswerCache(tmp_path).look_up((1,), 1) == [2] and len(list(tmp_path.glob("*.json"))) == 1
