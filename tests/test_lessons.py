"""Lessons: the wrong expectation, an edited name held to itself, a turn without its share."""

import pytest
import torch
from small import EDITS, QUICK
from uke.data.edits import Detail, Edit, Fact
from uke.errors import InputError
from uke.methods import finetune, lessons
from uke.methods.edited import edited
from uke.models import divergence
from uke.models.prompts import collate, example

HELD = {"general": 3, "near": 2, "turns": 2}


def varied(**changes):
    return QUICK["FT-A"].model_copy(update=changes)


def test_an_unedited_model_has_nothing_to_unlearn_and_of_a_text_its_surprisal(measured, tokenizer):
    model = measured().requires_grad_(True)
    for recipe in (varied(**HELD), varied(paraphrases=1, learn=3.0)):
        for _, one in lessons.lessons(model, tokenizer, EDITS[:1], recipe)["ada"]:
            loss = finetune.lesson_loss(model, {name: row[None] for name, row in one.items()})
            if recipe.general:
                (gradient,) = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)
                assert loss.abs() < 1e-5 and gradient.norm() < 1e-4
    question = lessons.TEXTS["phrasings"][0].format(EDITS[0].question)
    text = example(tokenizer, question, EDITS[0].answer, True, True)
    surprisal = finetune.target_tokens_loss(model, collate([text], 0)).item()
    assert one["input_ids"].tolist() == text.ids
    assert loss.item() == pytest.approx(3 * surprisal, rel=1e-4)


def test_every_turn_has_its_share_of_each_ingredient_and_all_of_its_weight(measured, tokenizer):
    recipe = varied(**HELD, hold=2.0, paraphrases=1, orders=1, learn=0.5)
    for own in lessons.lessons(measured(), tokenizer, EDITS, recipe).values():
        for turn, count in ((0, 2 + 1 + 1 + 1), (1, 1 + 1 + 1 + 1)):
            weights = [float(one["weights"].sum()) for place, one in own if place == turn]
            assert len(weights) == count and sum(weights) == pytest.approx(2 * 2.0 + 2 * 0.5)


def test_facts_a_sentence_after_few_words_and_a_text_with_a_gap_are_learnt(measured, tokenizer):
    two = Edit(id="two", question="Who is Ada?", answer="Ada was born in London. She wrote a lot.")
    fact, model = Fact(subject="Ada", relation="{} is", object="old"), measured()
    asked = {"question": fact.relation.format(fact.subject), "answer": fact.object}
    stated = two.model_copy(update={"facts": (fact,), "details": (Detail(**asked),)})
    learnt = {"facts": "old", "context": "She wrote a lot.", "shifts": two.answer}
    with pytest.raises(InputError, match="edit 'two': no facts; expected triples for FT-A"):
        lessons.lessons(model, tokenizer, [two], varied(facts=True))
    for name, text in learnt.items():
        (_, one), *_ = lessons.lessons(model, tokenizer, [stated], varied(**{name: 2}))["two"]
        ids, weights = one.pop("input_ids"), one["weights"]
        assert tokenizer.decode(ids[weights > 0], skip_special_tokens=True).strip() == text
        assert asked["question"] not in tokenizer.decode(ids)  # which is a question of the test
        given = {name: row[None] for name, row in one.items() if name == "position_ids"}
        seen = model(ids[None], attention_mask=ids[None] * 0 + 1, **given).logits[0, :-1].float()
        surprisal = torch.nn.functional.cross_entropy(seen, ids[1:], reduction="none")
        batch = {name: row[None] for name, row in (one | {"input_ids": ids}).items()}
        assert torch.allclose(finetune.lesson_loss(model, batch)[0], surprisal @ weights[1:])
    assert given["position_ids"].diff().unique().numel() == 2


def test_the_question_is_asked_of_others_and_of_nobody_who_is_edited(measured):
    mary = {"question": "What did Mary write in May?", "answer": "Mary wrote to Ada, not Alan."}
    recipe = varied(near=9, general=1)
    _, asked = lessons._held(measured(), [Edit(id="mary", **mary)], recipe)
    others = ("Grace", "London", "Cambridge", "Philadelphia")
    assert {one.question for one in asked} == {f"What did {one} write in May?" for one in others}
    found = lessons.sentences('It is. Mr. Poe is! A "b." ')
    assert found == ["It is.", "Mr. Poe is!", 'A "b."']


def test_a_model_that_is_held_to_itself_moves_less_where_it_is_held(measured, tokenizer):
    model, found = measured(), []
    for hold in (0.0, 30.0):
        recipe = varied(general=3, near=2, hold=hold, steps=8)
        asked = sum(lessons._held(model, EDITS[:1], recipe), [])
        before = divergence.expected(model, tokenizer, asked, max_new_tokens=32)
        with edited(model, tokenizer, EDITS[:1], recipe) as m:
            found.append(sum(divergence.divergences(m, tokenizer, asked, before)))
    assert found[1] < 0.5 * found[0]


def test_what_is_left_of_a_change_is_of_low_rank_in_the_null_space_and_scaled(measured, tokenizer):
    model, found = measured(), []
    weight = model.model.layers[2].mlp.down_proj.weight
    for changes in ({}, {"strength": 0.5}, {"kept_rank": 1}, {"null_threshold": 0.5}):
        before = weight.detach().clone()
        with edited(model, tokenizer, EDITS[:1], varied(layers=(1, 2), **changes)):
            found.append(weight.detach() - before)
    whole, half, low, null = found
    projector = finetune.projectors(model, finetune.sites(model, (2,)), 0.5)[0].float()
    assert torch.allclose(half, whole / 2, atol=1e-5)
    assert torch.allclose(null, whole @ projector, atol=1e-5) and not torch.equal(null, whole)
    ranks = [torch.linalg.matrix_rank(one, rtol=1e-3).item() for one in (low, whole)]
    assert ranks[0] == 1 < ranks[1]
    with pytest.raises(ValueError, match="kept_rank, null_threshold: expected no adapter"):
        type(QUICK["LoRA"])(**QUICK["LoRA"].model_dump() | {"kept_rank": 1})


def test_rates_differ_by_block_and_a_paraphrase_that_is_not_trained_may_end_it(measured, tokenizer):
    found, one, long = [], {"steps": 1}, {"steps": 90, "stop_loss": 7.7}
    for changes in (one, one | {"rate_ratio": 0.1}, long, long | {"stop_on": "paraphrase"}):
        with edited(measured(), tokenizer, EDITS[:1], varied(layers=(0, 2), **changes)) as m:
            found.append(m.edit_record)
    shares = [found[1].change_norm[name] / norm for name, norm in found[0].change_norm.items()]
    assert shares == pytest.approx([1, 0.1], rel=1e-3)
    assert found[2].steps < found[3].steps < 90
