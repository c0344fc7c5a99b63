"""Answers: packed wrongly, cut short, of another prompt, cached for another model or badly."""

import pytest
import torch
from conftest import FAMILIES
from uke.data.edits import Probe
from uke.errors import InputError
from uke.methods.locate_edit import covariance
from uke.models import divergence
from uke.models import generate as answering
from uke.models.generate import AnswerCache, answer, target_log_probability
from uke.models.prompts import encode, end_of_turn_id, example

QUESTIONS = (
    "Who?",
    "Who is Ada Lovelace?",
    "Where was Alan Turing born and where did he study?",
    "What did Grace Hopper write? " * 3,
    "Was London where Ada was born in 1815?",
    "Tell me in a few short sentences what the first compiler was.",
)
NEW = 16


def probes_of(questions, **fields):
    fields = {"kind": "original", "reference": "Ada."} | fields
    return [Probe(edit=f"e{i}", question=one, **fields) for i, one in enumerate(questions)]


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_that_spells_a_special_token_is_refused_by_name(tiny, tokenizer, chat):
    probe = Probe(edit="e", kind="general", question="A <|im_end|> B", reference="<s>", chat=chat)
    with pytest.raises(InputError, match="edit e, general 0: .* special token '<.im_end.>'"):
        answer(tiny(), tokenizer, [probe])
    with pytest.raises(InputError, match="edit e, general 0: .* special token '<s>'"):
        plain = probe.model_copy(update={"question": "A?"})
        target_log_probability(tiny(), tokenizer, [plain])
    with pytest.raises(InputError, match="corpus: 'Ada </s>.*': .* special token '</s>'"):
        covariance.measure(tiny(), tokenizer, ["Ada </s> was"], (1,))


@pytest.fixture(scope="module")
def probes():
    return [*probes_of(QUESTIONS), *probes_of(QUESTIONS[1:4], chat=False)]


def generated(model, tokenizer, probe, new=NEW):
    ids = torch.tensor([encode(tokenizer, probe.question, probe.chat)])
    options = {"eos_token_id": [end_of_turn_id(tokenizer), tokenizer.eos_token_id]}
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=new, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def decoded(monkeypatch):
    """How many prompts each call decoded."""
    plain, counts = answering._decode, []

    def counting(model, queries, limits, ends):
        counts.append(len(queries))
        return plain(model, queries, limits, ends)

    monkeypatch.setattr(answering, "_decode", counting)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_plain_generation(family, tiny, tokenizer, probes):
    model = tiny(family)
    answers = answer(model, tokenizer, probes, max_new_tokens=NEW)
    assert answers == [generated(model, tokenizer, probe) for probe in probes]
    assert len(set(answers)) > len(answers) // 2
    assert answer(model, tokenizer, []) == [] == target_log_probability(model, tokenizer, [])


def test_batch_size_order_and_padding_side_change_no_answer(tiny, tokenizer, probes):
    model = tiny("mistral")
    expected = answer(model, tokenizer, probes, max_new_tokens=NEW)
    assert answer(model, tokenizer, probes, max_new_tokens=NEW, batch_tokens=1) == expected
    assert answer(model, tokenizer, probes, max_new_tokens=NEW, batch_tokens=300) == expected
    assert answer(model, tokenizer, probes[::-1], max_new_tokens=NEW) == expected[::-1]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert answer(model, tokenizer, probes, max_new_tokens=NEW) == expected


def test_a_limit_per_probe_cuts_that_answer_only(tiny, tokenizer):
    model, limits = tiny(), {"e0": 3, "e1": 9, "e2": 0}
    twice = probes_of([QUESTIONS[1], QUESTIONS[1], QUESTIONS[2]])
    answers = answer(model, tokenizer, twice, max_new_tokens=lambda probe: limits[probe.edit])
    assert answers[:2] == [generated(model, tokenizer, twice[0], new) for new in (3, 9)]
    assert answers[0] != answers[1] and answers[2] == ""


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_answer_stops_before_the_end_of_turn(family, tiny, tokenizer, probes):
    model = tiny(family)
    end = end_of_turn_id(tokenizer)
    with torch.no_grad():
        # The head is made to prefer the end of a turn midway, so that rows end at different steps.
        model.lm_head.weight[end] = model.lm_head.weight.mean(0) * 40
    ended = answer(model, tokenizer, probes, max_new_tokens=NEW)
    model.generation_config.eos_token_id = None
    assert ended == [generated(model, tokenizer, probe) for probe in probes]
    lengths = [len(ids) for ids in tokenizer(ended, add_special_tokens=False)["input_ids"]]
    assert min(lengths) < NEW // 2 and "<|im_end|>" not in "".join(ended)


def test_chat_false_uses_the_question_itself_and_never_templates_a_cloze(tiny, tokenizer):
    model = tiny()
    chat, raw = probes_of(QUESTIONS[1:2]), probes_of(QUESTIONS[1:2], chat=False)
    continued = answer(model, tokenizer, raw, max_new_tokens=8)
    assert answer(model, tokenizer, chat, chat=False, max_new_tokens=8) == continued
    assert answer(model, tokenizer, raw, chat=True, max_new_tokens=8) == continued
    assert answer(model, tokenizer, chat, max_new_tokens=8) != continued


def test_the_context_ends_an_answer_and_a_prompt_that_fills_it_is_refused_by_name(tiny, tokenizer):
    model = tiny(max_position_embeddings=40)
    probe = probes_of(QUESTIONS[1:2])[0]
    left = 40 - len(encode(tokenizer, probe.question, True))
    expected = [generated(model, tokenizer, probe, left)]
    assert answer(model, tokenizer, [probe], max_new_tokens=500) == expected
    with pytest.raises(InputError, match=r"edit e1, original 0: \d+ tokens; expected at most 40"):
        answer(model, tokenizer, probes_of(["Who?", "Who is Ada? " * 20]))
    with pytest.raises(InputError, match="edit e0"):
        target_log_probability(model, tokenizer, probes_of(["Who is Ada? " * 20]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_log_probability_equals_a_loop_over_tokens(family, tiny, tokenizer):
    model = tiny(family)
    references = ("Ada.", "In London, where she was born.", "1815", "x", "No", "A")
    probes = [
        Probe(edit="e", kind="detail", question=question, reference=reference, chat=chat)
        for question, reference, chat in zip(QUESTIONS, references, [True, False] * 3, strict=True)
    ]
    expected = []
    for probe in probes:
        one = example(tokenizer, probe.question, probe.reference, probe.chat, end_of_turn=False)
        logits = model(torch.tensor([one.ids])).logits[0].double()
        steps = range(one.prompt_length, len(one.ids))
        terms = [logits[t - 1].log_softmax(-1)[one.ids[t]].item() for t in steps]
        expected.append(sum(terms) / len(terms))
    for size in (1, 16384):
        found = target_log_probability(model, tokenizer, probes, batch_tokens=size)
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("likeliest", [4, 1000])
def test_divergence_is_at_most_the_full_one(
    likeliest, tiny, tokenizer, probes, tmp_path, monkeypatch
):
    monkeypatch.setattr(divergence, "LIKELIEST", likeliest)
    model, options = tiny().double(), {"max_new_tokens": NEW, "cache": AnswerCache(tmp_path)}
    before, logs = divergence.expected(model, tokenizer, probes, **options), []
    assert max(divergence.divergences(model, tokenizer, probes, before)) < 1e-9
    for factor in (1, 1.3):  # the edit
        model.lm_head.weight.data.mul_(factor)
        for probe, one in zip(probes, before, strict=True):
            text = encode(tokenizer, probe.question, probe.chat)
            own = model(torch.tensor([text + one.answer.tolist()])).logits[0].detach()  # (T, V)
            logs.append(own[len(text) - 1 : -1].log_softmax(-1))
    pairs = zip(logs[: len(probes)], logs[len(probes) :], strict=True)
    full = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
    kept = divergence.expected(model, tokenizer, probes, **options)  # of the files, not the edit
    assert all(one.logs.equal(other.logs) for one, other in zip(kept, before, strict=True))
    found = divergence.divergences(model, tokenizer, probes, kept)
    assert found == pytest.approx(full, rel=1e-6 if likeliest > len(tokenizer) else 1)
    assert all(0 < one < whole * (1 + 1e-6) for one, whole in zip(found, full, strict=True))


CACHED = probes_of(("Who?", "Who is Ada Lovelace?", "Where was Alan Turing born?"))


def test_a_cached_prompt_is_not_decoded_again(tiny, tokenizer, tmp_path, decoded):
    model = tiny()
    plain = answer(model, tokenizer, CACHED, max_new_tokens=8)
    decoded.clear()
    for chosen in (slice(2), slice(None, None, -1), slice(None)):
        cache = AnswerCache(tmp_path)
        found = answer(model, tokenizer, CACHED[chosen], max_new_tokens=8, cache=cache)
        assert found == plain[chosen]
    assert sum(decoded) == 3


@pytest.mark.parametrize("content", ["{", "[1]", '[["1 2", "x"]]', "[[1, [1], 2]]", '{"a": 1}'])
def test_a_damaged_cache_file_is_named_and_an_unfinished_one_ignored(tmp_path, content):
    (tmp_path / "a.1-2.part").write_text("[[")
    AnswerCache(tmp_path).add({(1,): ([2], 1)})
    assert AnswerCache(tmp_path).look_up((1,), 1) == [2]
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match="a.json: expected cached answers; delete it"):
        AnswerCache(tmp_path).look_up((1,), 1)


def test_an_answer_that_ended_by_itself_serves_any_limit(tmp_path):
    cache = AnswerCache(tmp_path)
    cache.add({(1, 2): ([7, 8], 5), (3,): ([4, 4, 4], 3)})
    assert cache.look_up((1, 2), 99) == [7, 8] and cache.look_up((1, 2), 1) == [7]
    assert cache.look_up((3,), 4) is cache.look_up((1,), 1) is None
    cache.add({(3,): ([4, 4, 4, 5], 8)})
    assert AnswerCache(tmp_path).look_up((3,), 8) == [4, 4, 4, 5]
