"""Models and edits made on the fly: other widths of a model, the shape of Qwen2.5-7B, and texts of a chosen length."""

import random
from collections.abc import Mapping
from dataclasses import replace

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from uke.data.edits import Edit, Probe
from uke.project import Paths
from uke.study.dataset import Dataset

# As in the configuration that Qwen/Qwen2.5-7B-Instruct is published with.
QWEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
TINY = QWEN | {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
QUESTION, OF_TEMPLATE = (
    16,
    3,
)  # words of a question of random words, tokens that the template below adds to it
SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def widened(model: PreTrainedModel, share: float, seed: int = 1) -> PreTrainedModel:
    """Random weights in the model's architecture with so many times its width and heads: for growth alone, it can say nothing."""
    config = type(model.config)(**model.config.to_dict())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, max(1, round(share * getattr(config, name))))
    return random_model(config, model.device, torch.float32, seed)


def random_model(config, device, dtype: torch.dtype, seed: int = 1) -> PreTrainedModel:
    """Random weights, made where they are to be."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def qwen(
    shape: Mapping, device: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Random weights in the Qwen2 architecture, with a tokenizer in which a word is a token, so that lengths are exact."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    words = {
        word: place
        for place, word in enumerate(
            [*SPECIAL, *(f"w{place}" for place in range(len(SPECIAL), shape["vocab_size"]))]
        )
    }
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    tokenizer.chat_template = TEMPLATE
    return random_model(AutoConfig.for_model("qwen2", **shape, **ids), device, dtype), tokenizer


def worded(
    count: int, vocabulary: int, tokens: int, asked: tuple[int, int], seed: int = 1
) -> Dataset:
    """Edits of so many tokens (prompt and text), `asked` probes of as many tokens each: random words, for time alone."""
    drawn = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(f"w{drawn.randrange(len(SPECIAL), vocabulary)}" for _ in range(length))

    edits, probes = [], {}
    for number in range(count):
        edit = Edit(
            id=f"e{number}", question=text(QUESTION), answer=text(tokens - QUESTION - OF_TEMPLATE)
        )
        others = [
            Probe(
                edit=edit.id,
                kind="rel_doc",
                number=other,
                question=text(QUESTION),
                reference="none",
            )
            for other in range(asked[0] - 1)
        ]
        edits.append(edit)
        probes[edit.id] = (
            Probe(edit=edit.id, kind="original", question=edit.question, reference="none"),
            *others,
        )
    return Dataset(tuple(edits), probes, f"random words {seed}", Paths("smoke"))


def repeated(dataset: Dataset, count: int) -> Dataset:
    """So many edits: where there are fewer, the same again under other ids, which to a machine are other edits."""
    edits, probes = list(dataset.edits), dict(dataset.probes)
    for place in range(len(edits), count):
        first = dataset.edits[place % len(dataset.edits)]
        own = [probe.model_copy(update={"edit": f"{first.id}-{place}"}) for probe in first.extra]
        again = first.model_copy(update={"id": f"{first.id}-{place}", "extra": tuple(own)})
        edits.append(again)
        probes[again.id] = tuple(
            probe.model_copy(update={"edit": again.id}) for probe in dataset.probes[first.id]
        )
    return replace(dataset, edits=tuple(edits), probes=probes)


def cut(dataset: Dataset, share: float, count: int) -> Dataset:
    """The first `count` edits with answers of so much of their own length (the next edit's text goes on where one ends)."""
    words = [edit.answer.split() for edit in dataset.edits]
    edits = []
    for place, edit in enumerate(dataset.edits[:count]):
        text = " ".join(
            (words[place] + words[place + 1 - len(words)])[
                : max(1, round(share * len(words[place])))
            ]
        )
        edits.append(edit.model_copy(update={"answer": text}))
    probes = {
        edit.id: tuple(
            probe.model_copy(update={"reference": edit.answer})
            if probe.kind in ("original", "paraphrase")
            else probe
            for probe in dataset.probes[edit.id]
        )
        for edit in edits
    }
    return replace(dataset, edits=tuple(edits), probes=probes)
