"""Training: losses read at the wrong place, steps lost to rounding, edits mixed up in batches."""

import math

import pytest
import torch
from small import EDITS
from uke.errors import InputError
from uke.methods import finetune
from uke.methods.finetune import LOSSES, adapt, train
from uke.methods.recipes import RECIPES, Recipe
from uke.models import prompts
from uke.models.model import select
from uke.models.prompts import IGNORED, collate, example


def recipe(**changes) -> Recipe:
    choices = {"layers": 2, "learning_rate": 2e-3, "steps": 4, "stop_loss": 0.0, **changes}
    return Recipe(name="FT-M", **choices)


def examples(tokenizer):
    return [example(tokenizer, edit.question, edit.answer, True, True) for edit in EDITS]


def by_hand(model, one, scope: str) -> torch.Tensor:
    """The loss of one edit, token by token, in float64, from the logits of every position."""
    logits = model(input_ids=torch.tensor([one.ids])).logits[0].double()
    terms = []
    for place, token in enumerate(one.ids):
        if one.labels[place] != IGNORED:
            read = place - 1 if scope == "target_tokens" else one.prompt_length - 1
            terms.append(torch.logsumexp(logits[read], 0) - logits[read, token])
    return torch.stack(terms).mean()


def down_proj(model) -> dict[str, torch.Tensor]:
    chosen = select(model, 2, ["down_proj"])
    return {name: weight.detach().clone() for name, weight in chosen.items()}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("scope", LOSSES)
def test_the_loss_is_that_of_a_loop_over_the_tokens(tiny, tokenizer, family, scope):
    model = tiny(family)
    with torch.no_grad():
        together = LOSSES[scope](model, collate(examples(tokenizer), 0))
        expected = [by_hand(model, one, scope).item() for one in examples(tokenizer)]
    assert together.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scope", LOSSES)
def test_training_is_adam_on_the_mean_loss_of_the_edits(tiny, tokenizer, scope):
    model, other = tiny(), tiny()
    training = train(model, tokenizer, EDITS, recipe(loss=scope))
    weight = other.model.layers[2].mlp.down_proj.weight
    other.requires_grad_(False)
    adam = torch.optim.Adam([weight.requires_grad_(True)], lr=2e-3)
    expected = []
    for _ in range(4):
        mean = torch.stack([by_hand(other, one, scope) for one in examples(tokenizer)]).mean()
        expected.append(mean.item())
        adam.zero_grad()
        mean.backward()
        adam.step()
    assert training.losses == pytest.approx(expected, rel=1e-4)
    assert training.steps == 4
    assert torch.allclose(model.model.layers[2].mlp.down_proj.weight, weight, atol=1e-4)


def test_a_batch_split_to_save_memory_trains_as_one(tiny, tokenizer, monkeypatch):
    whole, split = tiny(), tiny()
    one = train(whole, tokenizer, EDITS, recipe())
    monkeypatch.setattr(prompts, "PASS_TOKENS", 1)
    many = train(split, tokenizer, EDITS, recipe())
    assert many.losses == pytest.approx(one.losses, rel=1e-5) and many.steps == one.steps == 4
    for name, weight in down_proj(whole).items():
        assert torch.allclose(weight, down_proj(split)[name], atol=1e-4)


def test_minibatches_see_every_edit_in_each_pass_in_a_seeded_order(tiny, tokenizer):
    before = [by_hand(tiny(), one, "target_tokens").item() for one in examples(tokenizer)]
    # At a rate too small to move the loss, the mean of a pass is that of all edits, each once.
    slow = train(tiny(), tokenizer, EDITS, recipe(batch_size=2, learning_rate=1e-9))
    assert slow.steps == 4 * math.ceil(3 / 2)
    assert slow.losses == pytest.approx([sum(before) / 3] * 4, rel=1e-4)
    seeded = [recipe(batch_size=1, seed=seed, steps=2) for seed in (1, 1, 2)]
    runs = [train(tiny(), tokenizer, EDITS, one).losses for one in seeded]
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_below_the_stop_moves_nothing(tiny, tokenizer):
    model, seen = tiny(), []
    before, known = down_proj(model), recipe(stop_loss=100.0)
    training = train(model, tokenizer, EDITS, known, lambda *call: seen.append(call))
    assert (training.steps, len(training.losses)) == (0, 1)
    assert seen == [(1, training.losses[0])]
    assert all(torch.equal(weight, before[name]) for name, weight in down_proj(model).items())


def test_small_steps_are_not_lost_to_bfloat16(tiny, tokenizer):
    model = tiny().bfloat16()
    before = down_proj(model)
    train(model, tokenizer, EDITS, recipe(learning_rate=2e-4, steps=15))
    for name, weight in down_proj(model).items():
        # Neighbouring bfloat16 values lie 0.002 apart here: one step of 0.0002 is rounded away.
        large = before[name].abs() > 0.25
        assert weight.dtype == torch.bfloat16 and large.any()
        assert (weight[large] != before[name][large]).float().mean() > 0.2


def test_a_loss_that_is_not_finite_names_its_edits(tiny, tokenizer):
    with pytest.raises(FloatingPointError, match="'grace'.*'alan'.* not finite after 1 steps"):
        train(tiny(), tokenizer, EDITS[1:], recipe(learning_rate=1e38))


def test_adalora_prunes_its_ranks_and_adds_the_penalty_of_peft(tiny, tokenizer):
    choices = RECIPES["AdaLoRA"].model_copy(update={"steps": 10, "rank": 2, "stop_loss": 0.0})
    wrapped = adapt(tiny(), choices, len(EDITS))
    values = {name: weight for name, weight in wrapped.named_parameters() if ".lora_E." in name}
    assert len(values) == 8 and all(weight.numel() == 3 for weight in values.values())
    train(wrapped, tokenizer, EDITS, choices)
    kept = sum(int((weight != 0).sum()) for weight in values.values())
    assert 0 < kept <= 2 * len(values)
    batch = collate(examples(tokenizer), 0)
    with torch.no_grad():
        penalty = wrapped.base_model(**batch).loss - wrapped.get_base_model()(**batch).loss
        own = finetune._orthogonality(wrapped.base_model)
    assert own.item() == pytest.approx(penalty.item(), rel=1e-4)


def test_adalora_refuses_a_schedule_without_room_for_pruning(tiny):
    with pytest.raises(InputError, match="recipe AdaLoRA: steps"):
        adapt(tiny(), RECIPES["AdaLoRA"].model_copy(update={"steps": 1}), 1)
