"""Models and edits made for timing alone: other widths, the shape of Qwen2.5-7B, other lengths."""

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
QUESTION, OF_TEMPLATE = 16, 3  # words of a question, tokens that the template below adds to it
SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def widened(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """Make a model of random weights with `share` times the width and heads of another."""
    config = type(model.config)(**model.config.to_dict())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, max(1, round(share * getattr(config, name))))
    return _random(config, model.device, torch.float32)


def _random(config, device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_qwen(
    shape: Mapping, device: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Make random weights of a shape, and a tokenizer with a token a word, so lengths are exact."""
    names = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), shape["vocab_size"]))]
    words = {name: number for number, name in enumerate(names)}
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
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("qwen2", **shape, **ids)
    return _random(config, device, dtype), tokenizer


def random_words(count: int, vocabulary: int, tokens: int, probes: int) -> Dataset:
    """Make edits of `tokens` random words, each with `probes` probes: for time alone."""
    rng = random.Random(1)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(len(SPECIAL), vocabulary)}" for _ in range(length))

    edits, by_edit = [], {}
    for number in range(count):
        answer = text(tokens - QUESTION - OF_TEMPLATE)
        edit = Edit(id=f"e{number}", question=text(QUESTION), answer=answer)
        rest = {"edit": edit.id, "reference": text(tokens)}  # so long may answers be
        around = (
            Probe(kind="paraphrase", number=n, question=text(QUESTION), **rest)
            for n in range(1, probes)
        )
        by_edit[edit.id] = (Probe(kind="original", question=edit.question, **rest), *around)
        edits.append(edit)
    return Dataset(tuple(edits), by_edit, "random words", Paths("smoke"))


def repeated(dataset: Dataset, count: int) -> Dataset:
    """Repeat edits under other ids, where there are fewer than `count`: the work is the same."""
    edits, probes = list(dataset.edits), dict(dataset.probes)
    for number in range(len(edits), count):
        first = dataset.edits[number % len(dataset.edits)]
        new = {"edit": f"{first.id}-{number}"}
        extra = tuple(probe.model_copy(update=new) for probe in first.extra)
        edits.append(first.model_copy(update={"id": new["edit"], "extra": extra}))
        probes[new["edit"]] = tuple(p.model_copy(update=new) for p in dataset.probes[first.id])
    return replace(dataset, edits=tuple(edits), probes=probes)
