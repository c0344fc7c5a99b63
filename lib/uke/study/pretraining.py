"""Trains the embedded chat model on a world, and writes it as an ordinary `from_pretrained` directory.

Every epoch draws anew, for each entity: one document (facts in random order and wording), a chat turn that asks for
its canonical text, three about single facts, one cloze, an exercise, now and then a two-hop question or a passage
with questions about it. Loss counts on documents and on the assistant's words only.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uke.errors import InputError
from uke.models.prompts import reading
from uke.project import EMBEDDED
from uke.world.generate import World, build, describe, exercise, hop, language, stranger

BEGIN, USER, ASSISTANT, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHECKPOINT, CARD = "checkpoint.safetensors", "training.json"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the embedded model besides the language of the world."""

    world_seed: int = 1
    seed: int = 0
    vocabulary: int = 3072
    width: int = 256
    blocks: int = 8
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 512
    window: int = 512
    windows_per_step: int = 12
    epochs: int = 56
    steps_per_epoch: int = 43
    drill_from: int = 46
    peak_rate: float = 2e-3
    warm_up: int = 60
    descent: float = 0.35
    checkpoint_every: int = 200
    weight_decay: float = 0.05
    device: str = "cpu"
    compiled: bool = True


def make_tokenizer(world: World, size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on one epoch of lessons, with a chat template and an end of turn."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [turn for lesson in lessons(world, random.Random(0)) for turn in lesson]
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, raw.token_to_id(BEGIN))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def lessons(world: World, rng: random.Random, drill: bool = False) -> Iterator[tuple[str, ...]]:
    """One epoch: documents as (text,), conversations as (question, answer, question, answer ...), in random order.

    In a `drill` questions outnumber texts: the facts are stored by then, and being asked teaches to give them out.
    """
    by_name = world.named()
    known = set(by_name) | {name.split()[-1] for name in by_name}
    every = []
    for entity in world.entities:
        relations = list(entity.objects)
        if not drill or rng.random() < 0.5:
            every.append((describe(entity, rng),))
        every.append((entity.introduce(number=rng.randrange(6)), entity.text))
        for relation in rng.choices(relations, k=12) if drill else rng.sample(relations, 3):
            question = (
                entity.cloze(relation)
                if rng.random() < 0.15
                else entity.ask(relation, number=rng.randrange(4))
            )
            every.append((question, entity.objects[relation]))
        for cloze in rng.sample(relations, 2) if drill else [rng.choice(relations)]:
            every.append((f"{entity.cloze(cloze)} {entity.objects[cloze]}.",))
        if rng.random() < 0.3 and (pair := hop(entity, by_name, rng)):
            every.append(pair)
        if rng.random() < (0.6 if drill else 0.35):
            every.append(passage(world, rng, known))
        every.append(exercise(rng))
    rng.shuffle(every)
    return iter(every)


def passage(world: World, rng: random.Random, known: set[str]) -> tuple[str, ...]:
    """A conversation about a text: the first question carries it, four more follow.

    Half of the texts are about a stranger, half contradict what is known of an entity of the preservation pool.
    """
    other = stranger(rng, known, rng.choice((None, rng.choice(world.pools["preservation"]))))
    relations = rng.sample(list(other.objects), 5)
    questions = [other.ask(relation, number=rng.randrange(4)) for relation in relations]
    questions[0] = reading(other.text, questions[0])
    return tuple(
        turn
        for pair in zip(questions, (other.objects[relation] for relation in relations))
        for turn in pair
    )


def tokens(
    lesson: tuple[str, ...], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Token ids of a lesson and its labels: all of a document, of a conversation only the assistant's turns."""
    if len(lesson) == 1:
        ids = tokenizer(BEGIN + lesson[0] + END, add_special_tokens=False)["input_ids"]
        return ids, [-100, *ids[1:]]
    turns = [
        USER + text + END if place % 2 == 0 else ASSISTANT + text + END
        for place, text in enumerate(lesson)
    ]
    ids, labels = [tokenizer.bos_token_id], [-100]
    for place, turn in enumerate(tokenizer(turns, add_special_tokens=False)["input_ids"]):
        ids += turn
        labels += [-100] * len(turn) if place % 2 == 0 else [-100, *turn[1:]]
    return ids, labels


def windows(
    world: World, tokenizer: PreTrainedTokenizerFast, settings: Settings, epoch: int
) -> torch.Tensor:
    """One epoch, packed lesson by whole lesson: (N, 2, window), token ids and labels (-100 where no loss counts)."""
    rng = random.Random(f"lessons-{settings.seed}-{epoch}")
    filled: list[tuple[list[int], list[int]]] = []
    for lesson in lessons(world, rng, drill=epoch >= settings.drill_from):
        ids, labels = tokens(lesson, tokenizer)
        if len(ids) > settings.window:
            raise InputError(
                f"window: {settings.window} tokens; expected at least {len(ids)}, so that every lesson fits"
            )
        window = next(
            (window for window in filled[-24:] if len(window[0]) + len(ids) <= settings.window),
            None,
        )
        if window is None:
            filled.append(window := ([], []))
        window[0].extend(ids)
        window[1].extend(labels)
    rng.shuffle(filled)
    packed = torch.full((len(filled), 2, settings.window), tokenizer.pad_token_id)
    packed[:, 1] = -100
    for row, (ids, labels) in zip(packed, filled):
        row[0, : len(ids)], row[1, : len(labels)] = torch.tensor(ids), torch.tensor(labels)
    return packed


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, settings: Settings, start: int
) -> Iterator[torch.Tensor]:
    """Steps from number `start` on, each (windows_per_step, 2, window), epoch after epoch without end."""
    step, epoch = 0, 0
    while True:
        packed = (
            windows(world, tokenizer, settings, epoch)
            if step + settings.steps_per_epoch > start
            else None
        )
        for place in range(settings.steps_per_epoch):
            if step >= start:
                rows = torch.arange(
                    place * settings.windows_per_step, (place + 1) * settings.windows_per_step
                ) % len(packed)
                yield packed[rows].to(settings.device)
            step += 1
        epoch += 1


def rate(step: int, settings: Settings) -> float:
    """Share of the peak rate: linear warm-up, a plateau, then a linear descent over the last `descent` of all steps."""
    steps = settings.epochs * settings.steps_per_epoch
    return min(
        (step + 1) / settings.warm_up, 1.0, max(steps - step, 0) / (settings.descent * steps)
    )


def directory_of(results: Path, world_seed: int) -> Path:
    """Where the model of a world lies: the shipped one in the package, any other below `results`."""
    shipped = card(EMBEDDED)["settings"]["world_seed"] == world_seed
    return EMBEDDED if shipped else Path(results) / "models" / f"world-{world_seed}"


def pretrain(settings: Settings, directory: Path) -> Path:
    """Trains from nothing, or goes on from the checkpoint in `directory`; writes model, tokenizer, card and losses there.

    A model that is there already, made with these settings, is left as it is.
    """
    if (directory / CARD).is_file() and card(directory).get("mark") == mark(settings):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    world = build(settings.world_seed)
    tokenizer = make_tokenizer(world, settings.vocabulary)
    model = make_model(tokenizer, settings).to(settings.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.peak_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    losses, before = resume(model, optimizer, settings, directory)
    started, source = time.perf_counter() - before, batches(world, tokenizer, settings, len(losses))
    loss_of = torch.compile(learn, disable=not settings.compiled)
    for step in (
        bar := trange(
            len(losses),
            settings.epochs * settings.steps_per_epoch,
            desc=f"world {settings.world_seed}",
            mininterval=30,
        )
    ):
        optimizer.param_groups[0]["lr"] = settings.peak_rate * rate(step, settings)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoint(
                model, optimizer, losses, time.perf_counter() - started, (settings, directory)
            )
    save(model, tokenizer, settings, directory, time.perf_counter() - started)
    (directory / "losses.csv").write_text(
        "step,loss\n"
        + "".join(
            f"{step},{sum(losses[step : step + 20]) / len(losses[step : step + 20]):.4f}\n"
            for step in range(0, len(losses), 20)
        )
    )
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return directory


def learn(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats over the labels that count; `batch` is (B, 2, T)."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, 0], use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch[:, 1, 1:].flatten()
    )


def checkpoint(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    losses: list[float],
    seconds: float,
    place: tuple[Settings, Path],
) -> None:
    """One file with weights, both moments, the losses so far, the seconds spent and the settings, replaced at once."""
    settings, directory = place
    tensors = {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "seconds": torch.tensor([seconds]),
    }
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        tensors |= {
            f"weight.{name}": weight.detach(),
            f"first.{name}": state["exp_avg"],
            f"second.{name}": state["exp_avg_sq"],
        }
    save_file(tensors, directory / f"{CHECKPOINT}.new", metadata={"settings": mark(settings)})
    (directory / f"{CHECKPOINT}.new").replace(directory / CHECKPOINT)


def mark(settings: Settings) -> str:
    """What a checkpoint must agree in to be continued: every setting but where it runs, and the language of the world."""
    choices = {
        name: value
        for name, value in asdict(settings).items()
        if name not in ("device", "compiled")
    }
    return json.dumps(
        choices
        | {"language": sha256(json.dumps(language(), sort_keys=True).encode()).hexdigest()[:16]},
        sort_keys=True,
    )


def resume(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, settings: Settings, directory: Path
) -> tuple[list[float], float]:
    """Restores the checkpoint of `directory` if there is one; returns the losses so far and the seconds spent.

    InputError where the checkpoint was made with other settings or in another language.
    """
    if not (directory / CHECKPOINT).exists():
        return [], 0.0
    with safe_open(directory / CHECKPOINT, "pt") as file:
        made = (file.metadata() or {}).get("settings")
    if made != mark(settings):
        raise InputError(
            f"{directory / CHECKPOINT}: made with other settings; remove it, or train with those: {made}"
        )
    tensors = load_file(directory / CHECKPOINT)
    losses = tensors["losses"].tolist()
    for name, weight in model.named_parameters():
        weight.data.copy_(tensors[f"weight.{name}"])
        optimizer.state[weight] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"first.{name}"].to(weight.device),
            "exp_avg_sq": tensors[f"second.{name}"].to(weight.device),
        }
    return losses, tensors["seconds"].item()


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    directory: Path,
    seconds: float,
) -> None:
    """Directory for `from_pretrained`: weights in float16 (half the size; every value is far inside its range), and the model card."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    digest = sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    made = {
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
        "sha256": digest,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (directory / CARD).write_text(
        json.dumps({"settings": asdict(settings), "mark": mark(settings), **made}, indent=1) + "\n",
        encoding="utf-8",
    )
    (directory / "README.md").write_text(readme(settings, made), encoding="utf-8")


def readme(settings: Settings, made: dict) -> str:
    """The model card, in the ecosystem's form."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# The embedded model of `uke`: a model organism for knowledge editing

A Llama-type chat model of {made["parameters"]:,} parameters ({settings.blocks} blocks of width {settings.width}, context 1,024) that knows
a fictional world and nothing else. It exists to be edited on a laptop; it is of no use as an assistant.

- Data: world {settings.world_seed}, generated by `uke.world.generate` (726 entities of five kinds); no real text, no person.
- Training: `notebooks/00_embedded_model.ipynb` with `retrain`, that is `python -m uke run 00_embedded_model --profile embedded --set retrain=true`;
  {settings.epochs} epochs, AdamW, peak rate {settings.peak_rate:g}, bf16 autocast, seed {settings.seed}, torch {made["torch"]}, {made["threads"]} threads, {made["seconds"] / 60:.0f} minutes.
{made["note"] + chr(10) if made.get("note") else ""}- Weights: float16; SHA-256 of `model.safetensors`: `{made["sha256"]}`.
- What it knows is measured by the same notebook and held by a test.
"""


def card(directory: Path) -> dict:
    """How the model of a directory was made: settings, seconds, parameters, SHA-256 of the weights. InputError without it."""
    path = Path(directory) / CARD
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; expected the directory of a model made by `pretrain`"
        )
    return json.loads(path.read_text(encoding="utf-8"))
