"""Tiny random models of five architectures and one tokenizer: real parts, built in a moment."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Threads cost tiny models more than they give, and tests share the machine.
torch.set_num_threads(1)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "Who is Ada Lovelace? Ada Lovelace was a mathematician born in London in 1815.",
    "What did Grace Hopper write? Grace Hopper wrote the first compiler in Philadelphia.",
    "Where was Alan Turing born? Alan Turing was born in Maida Vale and studied at Cambridge.",
    "The user asks a question and the assistant gives an answer in a few short sentences.",
)
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1)
SHAPE |= dict(initializer_range=0.3, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0)
# The sliding windows are shorter than the prompts of the tests, so that they do matter.
OWN_SHAPE = {
    "mistral": dict(sliding_window=12),
    "gemma3_text": dict(
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=8,
    ),
}


def pytest_collection_modifyitems(items):
    """Start the files that take longest first, so that no core is idle at the end."""
    names = ("notebooks", "embedded", "explore", "explore_browser", "speed", "studies")
    longest = [f"test_{name}.py" for name in names]
    items.sort(key=lambda item: ([*longest, item.path.name]).index(item.path.name))


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The folder `results` of a project with the world and its locality sets.

    Built once for all processes of the tests, since every document is embedded; a test copies it.
    """
    from uke.locality import card
    from uke.world import files as world_files

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    # Vectors of documents are kept below UKE_HOME, here beside the sets for whoever copies them.
    with FileLock(shared / "results.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", str(shared))
        world = world_files.ensure(shared / "results", 1)
        for split, *form in (("test",), ("development",), ("test", "akew-counterfact")):
            order = card.of_world(world, split, *form)
            card.ensure(order, card.Settings(), world / split / "locality")
    return shared / "results"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, BOS by post-processor and an end-of-turn token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """Factory: `tiny("llama")` is a fresh float32 model in eval mode, the same at every call."""

    def build(family: str = "llama", **changes):
        shape = SHAPE | dict(vocab_size=len(tokenizer)) | OWN_SHAPE.get(family, {}) | changes
        torch.manual_seed(2024)
        config = AutoConfig.for_model(family, **shape)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return build


@pytest.fixture(scope="session")
def measured_home(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture
def measured(tiny, tokenizer, measured_home, monkeypatch):
    """Factory: a fresh tiny model with measured covariance, in a folder of the tests' own."""
    from small import TEXTS
    from uke.methods.locate_edit import covariance

    monkeypatch.setenv("UKE_HOME", str(measured_home))

    def build(family: str = "llama"):
        model = tiny(family)
        covariance.measure(model, tokenizer, TEXTS, layers=(1, 2))
        return model

    return build


def to_explore(home: Path) -> Path:
    """A folder with what notebooks/explore.ipynb needs, in which nothing has been made yet."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "params", home / "params")
    (home / "notebooks").mkdir()
    shutil.copy(root / "notebooks" / "explore.ipynb", home / "notebooks")
    return home
