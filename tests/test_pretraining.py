"""How the embedded model is trained: what the loss counts, that training resumes, and what it leaves on disk."""

from dataclasses import replace

import pytest
import torch
from uke.errors import InputError
from uke.models import model as models
from uke.models.prompts import end_of_turn
from uke.study import pretraining
from uke.study.pretraining import Settings
from uke.world import generate as world

SMALL = Settings(
    vocabulary=400,
    width=16,
    blocks=2,
    heads=2,
    key_value_heads=1,
    feed_forward=16,
    window=1024,
    windows_per_step=2,
    epochs=1,
    steps_per_epoch=4,
    warm_up=2,
    checkpoint_every=2,
    compiled=False,
)


@pytest.fixture(scope="module")
def fictional():
    """A world of the usual language but few entities, so that an epoch takes no time."""
    whole = world.build(1)
    return replace(whole, pools={name: members[:3] for name, members in whole.pools.items()})


@pytest.fixture
def small_world(fictional, monkeypatch):
    monkeypatch.setattr(pretraining, "build", lambda seed: fictional)
    # Two-hop questions look entities up by name, and the few here refer to ones that were left out.
    monkeypatch.setattr(pretraining, "hop", lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer():
    return pretraining.make_tokenizer(world.build(1), 800)


def test_a_conversation_is_packed_as_the_chat_template_renders_it(tokenizer):
    turns = ("Who?", "Mara.", "When?", "In 1902.")
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(turns)
    ]
    ids, _ = pretraining.tokens(turns, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_the_loss_counts_the_assistants_words_and_their_end_only(tokenizer):
    ids, labels = pretraining.tokens(("Who taught Mara?", "Tobin Calson"), tokenizer)
    counted = [label for label in labels if label != -100]
    assert tokenizer.decode(counted) == "Tobin Calson<|end|>" and ids[-len(counted) :] == counted


def test_the_loss_counts_all_of_a_document(tokenizer):
    ids, labels = pretraining.tokens(("Mara was born in 1902.",), tokenizer)
    assert labels == [-100, *ids[1:]] and ids[-1] == tokenizer.eos_token_id


def test_windows_hold_whole_lessons_and_little_padding(small_world, fictional, tokenizer):
    packed = pretraining.windows(fictional, tokenizer, SMALL, 0)
    ids = packed[:, 0]
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids != tokenizer.pad_token_id).float().mean() > 0.6
    assert torch.equal(packed, pretraining.windows(fictional, tokenizer, SMALL, 0))


def test_another_role_is_refused_by_the_template(tokenizer):
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)


def test_the_rate_warms_up_and_ends_near_zero():
    settings = Settings(epochs=10, steps_per_epoch=10, warm_up=10, descent=0.5)
    rates = [pretraining.rate(step, settings) for step in range(100)]
    assert (
        rates[0] == 0.1
        and rates[9:50] == [1.0] * 41
        and rates[-1] == pytest.approx(0.02)
        and rates == [min(each, 1) for each in rates]
    )


def test_training_that_was_cut_off_goes_on_to_the_same_weights(small_world, tmp_path, monkeypatch):
    whole = pretraining.pretrain(SMALL, tmp_path / "whole")
    learn, calls = pretraining.learn, []

    def fail_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(*arguments)

    monkeypatch.setattr(pretraining, "learn", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(SMALL, tmp_path / "cut")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.setattr(pretraining, "learn", learn)
    cut = pretraining.pretrain(SMALL, tmp_path / "cut")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert (whole / "losses.csv").read_text() == (cut / "losses.csv").read_text()
    assert not (cut / pretraining.CHECKPOINT).exists()


def test_a_checkpoint_of_other_settings_is_not_continued(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretraining.pretrain(SMALL, tmp_path)
    with pytest.raises(InputError, match="made with other settings"):
        pretraining.pretrain(replace(SMALL, peak_rate=1e-3), tmp_path)


def test_a_finished_model_is_not_trained_again_unless_its_settings_change(
    small_world, tmp_path, monkeypatch
):
    directory = pretraining.pretrain(SMALL, tmp_path)
    monkeypatch.setattr(pretraining, "learn", lambda *_: 1 / 0)
    assert pretraining.pretrain(SMALL, tmp_path) == directory
    with pytest.raises(ZeroDivisionError):
        pretraining.pretrain(replace(SMALL, seed=1), tmp_path)


def test_every_world_has_its_own_place_and_the_shipped_model_keeps_its_own(tmp_path):
    assert pretraining.directory_of(tmp_path, 1) == models.EMBEDDED
    assert pretraining.directory_of(tmp_path, 2) == tmp_path / "models" / "world-2"


def test_the_directory_is_an_ordinary_model_with_a_card(small_world, tmp_path):
    directory = pretraining.pretrain(SMALL, tmp_path / "model")
    model, tokenizer = models.load(str(directory), device="cpu")
    made = pretraining.card(directory)
    assert made["parameters"] == model.num_parameters() and made["settings"]["window"] == 1024
    assert made["sha256"] in (directory / "README.md").read_text()
    assert models.max_context(model) == 1024 and end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_a_directory_without_a_card_is_refused(tmp_path):
    with pytest.raises(InputError, match="training.json: no such file"):
        pretraining.card(tmp_path)
