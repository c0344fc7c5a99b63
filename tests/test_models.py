"""Models: broken directories, prompts and labels that are wrong, weights that do not come back."""

import json
import shutil
import socket

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from small import moved, state
from uke.errors import InputError
from uke.models import model as models
from uke.models import prompts
from uke.models.model import blocks, kept, max_context, module_names, select
from uke.models.prompts import collate, encode, end_of_turn_id, example, group_by_length


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny, tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tiny):
    """A model that no test changes."""
    return tiny()


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def test_a_directory_loads_without_the_network_and_bit_for_bit(directory, tiny, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, tokenizer = models.load(str(directory), device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert models.fingerprint(model) == models.fingerprint(tiny())
    assert tokenizer.chat_template and max_context(model) == 256
    assert models.load(str(directory), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "fault"),
    [("/no/such/model", "no such"), ("./a", "no such"), ("a/b/c", "no such"), (".", "no config")],
)
def test_a_directory_that_is_missing_or_no_model_is_refused(name, fault):
    with pytest.raises(InputError, match=fault):
        models.load(name)


def test_a_broken_or_incomplete_model_gets_one_line(copy, monkeypatch):
    weights, whole = copy / "model.safetensors", load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    lacking = {own: tensor for own, tensor in whole.items() if own != name}
    for tensors, fault in (
        (lacking, f"lack {name}"),
        (whole | {"b": torch.ones(1)}, "also hold b"),
    ):
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=fault):
            models.load(str(copy))
    weights.write_bytes(weights.read_bytes()[:1000])
    config, own = copy / "config.json", (copy / "config.json").read_text()
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for content in (own, json.dumps(json.loads(own) | foreign), "{"):
        config.write_text(content)
        with pytest.raises(InputError, match="expected a causal language model") as caught:
            models.load(str(copy))
        assert "\n" not in str(caught.value) and not (copy / "ran").exists()
    with pytest.raises(InputError, match="a device that is there"):
        models.load("embedded", device="gpu")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tiny, tokenizer, copy, device):
    tiny(vocab_size=len(tokenizer)).save_pretrained(copy)
    extended = type(tokenizer).from_pretrained(copy)
    extended.add_special_tokens({"additional_special_tokens": ["<image>"]})  # in no prompt
    extended.save_pretrained(copy)
    assert models.load(str(copy), device=device)
    extended.add_tokens(["Lovelace"])
    extended.save_pretrained(copy)
    with pytest.raises(InputError, match="'Lovelace' has the id 385; expected at most 383"):
        models.load(str(copy), device=device)


def test_a_prompt_has_one_beginning_of_text(tokenizer):
    chat, raw = (tokenizer.decode(encode(tokenizer, "Who?", chat)) for chat in (True, False))
    assert chat.count("<s>") == 1 and chat.endswith("<|im_start|>assistant\n")
    assert raw == "<s>Who?"


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
FAULTS = [(None, "no chat template works"), ("{{ raise_exception('no') }}", "works .no.; use chat")]
FAULTS += [("{% for one in %}", "Expected an expression"), ({"tool": "x"}, "no default specified")]
FAULTS += [(PARTS, "changes what the user says"), ("{{ messages|upper }}", "changes what the user")]


@pytest.mark.parametrize(("template", "fault"), FAULTS)
def test_a_template_that_fails_or_changes_a_text_is_refused(tokenizer, directory, template, fault):
    bare = type(tokenizer).from_pretrained(directory)
    bare.chat_template = template
    with pytest.raises(InputError, match=fault) as caught:
        encode(bare, "Who?", True)
    assert "\n" not in str(caught.value) and encode(bare, "Who?", False)
    assert template or end_of_turn_id(bare) == bare.eos_token_id


def test_the_answer_is_learnt_as_the_template_writes_it(tokenizer, directory):
    ours = type(tokenizer).from_pretrained(directory)
    said = "{{ ' ' * loop.index0 ~ m.content ~ ' \n</s>' * loop.index0 }}"
    ours.chat_template = f"{{{{ strftime_now('') }}}}{{% for m in messages %}}{said}{{% endfor %}}"
    assert prompts.render(ours, "Who?", True) == "26 Jul 2024Who?"
    one = example(ours, "Who?", "Ada.", True, True)
    assert ours.decode(one.ids[one.prompt_length :]) == " Ada. \n</s>"
    open_end = example(ours, "Who?", "Ada.", True, False)
    assert ours.decode(open_end.ids[one.prompt_length :]) == " Ada."
    ours.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert prompts.render(ours, "Who?", True).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("chat", [True, False])
def test_only_the_answer_is_learnt(tokenizer, chat):
    one = example(tokenizer, "Ada was born in", "London", chat, end_of_turn=True)
    prompt = encode(tokenizer, "Ada was born in", chat)
    assert one.ids[: one.prompt_length] == prompt
    assert one.labels[: one.prompt_length] == [-100] * len(prompt)
    assert one.labels[one.prompt_length :] == one.ids[one.prompt_length :]
    answer = "London" if chat else " London"
    assert tokenizer.decode(one.ids[one.prompt_length :]) == f"{answer}<|im_end|>"
    open_end = example(tokenizer, "Ada was born in", "London", chat, end_of_turn=False)
    assert open_end.ids == one.ids[:-1]
    spaced = example(tokenizer, "Ada was born in ", "London", False, end_of_turn=False)
    assert tokenizer.decode(spaced.ids) == "<s>Ada was born in London"  # no second space


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_never_learnt(tokenizer, side):
    questions = ("Who?", "Where was Ada born?")
    examples = [example(tokenizer, one, "London", True, True) for one in questions]
    batch = collate(examples, pad=0, side=side)
    assert {tensor.shape for tensor in batch.values()} == {(2, len(examples[1].ids))}
    for row, one in enumerate(examples):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == one.ids
        assert batch["labels"][row][real].tolist() == one.labels
        assert (batch["labels"][row][~real] == -100).all()
    assert batch["attention_mask"][0, 0 if side == "left" else -1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_in_every_family(family, tiny):
    model = tiny(family)
    assert [name for name, _ in blocks(model)] == [f"model.layers.{i}" for i in range(4)]
    attention = {n.split(".", 3)[-1] for n in module_names(model, "all", ["attention"])}
    assert attention == {f"self_attn.{p}_proj" for p in "qkvo"}
    mlp = {n.split(".", 3)[-1] for n in module_names(model, [1], ["mlp"])}
    assert mlp == {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert list(select(model, 2, ["down_proj"])) == ["model.layers.2.mlp.down_proj.weight"]
    whole = {n for n, _ in model.named_parameters() if n.startswith("model.layers.0.")}
    assert set(select(model, 0, ["all"])) == whole and any("norm" in name for name in whole)
    assert not any("norm" in name for name in select(model, "all", ["attention", "mlp"]))


BLOCKS = [("all", "0123"), ("first_half", "01"), ("second_half", "23"), (3, "3"), (0.0, "0")]
BLOCKS += [(0.5, "2"), (0.74, "2"), (1.0, "3"), ([3, 0.25, 1], "13")]


@pytest.mark.parametrize(("layers", "expected"), BLOCKS)
def test_layers_by_number_and_fraction(llama, layers, expected):
    names = select(llama, layers, ["down_proj"])
    assert list(names) == [f"model.layers.{i}.mlp.down_proj.weight" for i in expected]


@pytest.mark.parametrize(
    ("layers", "components", "fault"),
    [
        *((layers, ["mlp"], "layers") for layers in (4, -1, 1.5, [0, 9], True, "3", None)),
        ("all", ["dwn_proj"], "did you mean 'down_proj'"),
        ("all", ["zzz"], "attention.*o_proj"),
        ("all", [], "select no weight"),
        ([], ["mlp"], "select no weight"),
    ],
)
def test_a_selection_of_nothing_or_of_what_is_absent_is_refused(llama, layers, components, fault):
    with pytest.raises(InputError, match=fault):
        select(llama, layers, components)


FUSED = [("mixtral", "mlp"), ("qwen2_moe", "down_proj"), ("gpt2", "all"), ("phi3", "q_proj")]


@pytest.mark.parametrize(("family", "component"), FUSED)
def test_weights_that_are_no_linear_layers_are_never_left_out_unsaid(tiny, family, component):
    with pytest.raises(InputError, match=f"'{component}': .*expected a model of Llama, Qwen2"):
        select(tiny(family), 0, [component])
    assert family == "gpt2" or select(tiny(family), 0, ["o_proj"])


@pytest.mark.parametrize("whole", [True, False])
def test_kept_weights_come_back_bit_for_bit_after_an_exception(tiny, whole):
    model = tiny().to(torch.bfloat16)
    chosen = select(model, [1], ["mlp"])
    before = state(model)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="midway"), kept(model, None if whole else chosen):
        for parameter in chosen.values():
            parameter.data = parameter.data.float() + 1e-3
            parameter.grad = torch.ones_like(parameter)
        model.requires_grad_(False).train()
        assert not any(torch.equal(one, before[name].float()) for name, one in chosen.items())
        raise RuntimeError("midway")
    assert not moved(model, before) and model.dtype == torch.bfloat16
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_fingerprint_sees_one_bit_and_no_path(tiny, directory, copy):
    model = tiny()
    first = models.fingerprint(model)
    assert len(first) == 16 and first == models.fingerprint(tiny())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] *= 1 + 1e-6
    assert models.fingerprint(model) != first
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert models.fingerprint(models.load(str(copy), device="cpu")[0]) != first


@pytest.mark.parametrize("tokens", [1, 400, 8192])
@pytest.mark.parametrize(
    "lengths", [[130, 131, 90, 187, 26, 90, 130], [], list(range(1, 200)), [9000, 10, 9000, 3]]
)
def test_every_row_is_read_once_with_others_of_similar_length(lengths, tokens):
    passes = group_by_length(lengths, tokens)
    assert sorted(row for one in passes for row in one) == list(range(len(lengths)))
    for one in passes:
        own = [lengths[row] for row in one]
        assert own == sorted(own, reverse=True)
        assert len(own) == 1 or len(own) * own[0] <= tokens
        assert sum(own) >= 0.85 * len(own) * own[0]


def test_passes_are_as_large_as_memory_and_device_allow(monkeypatch):
    assert [len(one) for one in group_by_length([100] * 9, 400)] == [4, 4, 1]
    assert [len(one) for one in group_by_length([100, 50, 50], 10_000)] == [1, 2]
    assert len(group_by_length([10] * 4)) == 1
    monkeypatch.setattr(prompts, "PASS_TOKENS", 20)
    assert len(group_by_length([10] * 4)) == 2
