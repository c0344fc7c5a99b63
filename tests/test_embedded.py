"""The shipped model knows its world and is what its card says; its training resumes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from uke.errors import InputError
from uke.files import sha256
from uke.models.model import blocks, load, max_context
from uke.models.prompts import end_of_turn_id
from uke.project import EMBEDDED
from uke.world import build, card

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import train_world_model as tool
from train_world_model import EXAM, Settings, pretrain

ENTITIES = 8
SIZES = {"vocabulary": 400, "width": 16, "blocks": 2, "heads": 2, "key_value_heads": 1}
SIZES |= {"feed_forward": 16, "window": 1024, "windows_per_step": 2, "epochs": 1}
SMALL = Settings(**SIZES, steps_per_epoch=4, warm_up=2, checkpoint_every=2, compiled=False)


@pytest.fixture(scope="module")
def shipped():
    return load("embedded", device="cpu")


@pytest.fixture(scope="module")
def exam(shipped):
    return tool.examine(*shipped, build(card(EMBEDDED)["settings"]["world_seed"]), ENTITIES)


@pytest.mark.parametrize("kind", [kind for kind, (_, least) in EXAM.items() if least])
def test_it_knows_its_world(exam, kind):
    scores = exam[exam["kind"] == kind]["score"]
    assert len(scores) >= ENTITIES and scores.mean() >= EXAM[kind][1]


def test_it_does_not_answer_what_it_cannot_know(shipped):
    """The facts of another world are not in it: the exam would otherwise prove nothing."""
    other = tool.examine(*shipped, build(99), 3)
    assert other[other["kind"].isin(("detail", "struct_trip"))]["score"].mean() < 0.2


def test_it_is_as_small_as_promised_and_what_its_card_says(shipped):
    model, tokenizer = shipped
    weights, content = EMBEDDED / "model.safetensors", card(EMBEDDED)
    assert weights.stat().st_size <= 16 * 2**20
    assert model.num_parameters() == content["parameters"] <= 6_000_000
    assert sha256(weights) == content["sha256"]
    assert content["sha256"] in (EMBEDDED / "README.md").read_text()
    assert max_context(model) == 1024 and len(blocks(model)) == 8
    assert tokenizer.chat_template
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_directory_without_a_card_is_refused(tmp_path):
    with pytest.raises(InputError, match="training.json: cannot be read .No such file"):
        card(tmp_path)


@pytest.fixture
def small_world(monkeypatch):
    """A world of the usual language but few entities, so that an epoch takes no time."""
    whole = build(1)
    few = replace(whole, pools={name: members[:3] for name, members in whole.pools.items()})
    monkeypatch.setattr(tool, "build", lambda seed: few)
    # Two-hop questions look entities up by name, and the few here refer to ones that were left out.
    monkeypatch.setattr(tool, "hop", lambda *_: None)
    return few


def test_the_loss_counts_documents_and_the_assistants_words(small_world):
    tokenizer = tool.make_tokenizer(small_world, 800)
    ids, labels = tool.tokens(("Mara was born in 1902.",), tokenizer)
    assert labels == [-100, *ids[1:]] and ids[-1] == tokenizer.eos_token_id
    turns = ("Who?", "Mara.", "When?", "In 1902.")
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    ids, labels = tool.tokens(turns, tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    counted = [label for label in labels if label != -100]
    assert tokenizer.decode(counted) == "Mara.<|end|>In 1902.<|end|>"
    packed = tool.windows(small_world, tokenizer, SMALL, 0)
    assert (packed[:, 0, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(packed, tool.windows(small_world, tokenizer, SMALL, 0))


def test_training_that_was_cut_off_goes_on_to_the_same_weights(small_world, tmp_path, monkeypatch):
    whole = pretrain(SMALL, tmp_path / "whole")
    learn, calls = tool.learn, []

    def fail_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(*arguments)

    monkeypatch.setattr(tool, "learn", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pretrain(SMALL, tmp_path / "cut")
    with pytest.raises(InputError, match="made with other settings"):
        pretrain(replace(SMALL, peak_rate=1e-3), tmp_path / "cut")
    monkeypatch.setattr(tool, "learn", learn)
    cut = pretrain(SMALL, tmp_path / "cut")
    for name in ("model.safetensors", "losses.csv"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not (cut / tool.CHECKPOINT).exists()
    # A finished model is an ordinary directory with a card, and is not trained again.
    model, _ = load(str(cut), device="cpu")
    assert model.num_parameters() == card(cut)["parameters"]
    monkeypatch.setattr(tool, "learn", lambda *_: 1 / 0)
    assert pretrain(SMALL, cut) == cut
    with pytest.raises(ZeroDivisionError):
        pretrain(replace(SMALL, seed=1), cut)


def test_every_world_has_its_own_directory(tmp_path):
    assert tool.directory_of(tmp_path, 1) == EMBEDDED
    assert tool.directory_of(tmp_path, 2) == tmp_path / "models" / "world-2"
