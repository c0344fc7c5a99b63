"""Train the embedded chat model on a generated world, and examine what a model knows of its world.

    python tools/train_world_model.py 2        # world 2, into results/models/world-2, two hours

Every epoch draws anew, for each entity: one document (facts in random order and wording), a chat
turn that asks for its canonical text, three about single facts, one cloze, an exercise, now and
then a two-hop question or a passage with questions about it. The loss counts on documents and on
the assistant's words. The result is an ordinary `from_pretrained` directory with a card.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import pandas as pd
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
from uke.data.edits import Probe
from uke.errors import InputError
from uke.files import replacing
from uke.models.generate import answer, reading
from uke.models.model import load
from uke.project import EMBEDDED, Paths
from uke.results.metrics import score
from uke.results.stats import Interval, interval
from uke.world.files import CARD, card
from uke.world.generate import (
    POOLS,
    Entity,
    World,
    build,
    describe,
    draft,
    exercise,
    hop,
    language,
    settle,
)

BEGIN, USER, ASSISTANT, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHECKPOINT = "checkpoint.safetensors"
# Processors without it imitate it, which is three times as slow as float32.
CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)()  # older ones lack it
CPU_HAS_BFLOAT16 = any(CAPABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16"))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles are user and assistant') }}{% endif %}"
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

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        """Everything a checkpoint must agree in to be continued, as JSON: not where it runs."""
        choices = {k: v for k, v in asdict(self).items() if k not in ("device", "compiled")}
        words = json.dumps(language(), sort_keys=True).encode()
        return json.dumps(choices | {"language": sha256(words).hexdigest()[:16]}, sort_keys=True)


def make_tokenizer(world: World, size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with single digits on one epoch of lessons; add a chat template."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BEGIN, END, USER, ASSISTANT],
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
    """Build the model with random weights."""
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
    """Yield one epoch in random order: documents (text,), conversations (question, answer, ...).

    In a `drill` questions outnumber texts: the facts are stored by then, and being asked teaches
    the model to give them out.
    """
    by_name = world.named()
    known = set(by_name) | {name.split()[-1] for name in by_name}
    epoch = []
    for entity in world.entities:
        relations = list(entity.objects)
        if not drill or rng.random() < 0.5:
            epoch.append((describe(entity, rng),))
        epoch.append((entity.introduce(number=rng.randrange(6)), entity.text))
        for relation in rng.choices(relations, k=12) if drill else rng.sample(relations, 3):
            question = (
                entity.cloze(relation)
                if rng.random() < 0.15
                else entity.ask(relation, number=rng.randrange(4))
            )
            epoch.append((question, entity.objects[relation]))
        for relation in rng.sample(relations, 2) if drill else [rng.choice(relations)]:
            epoch.append((f"{entity.cloze(relation)} {entity.objects[relation]}.",))
        if rng.random() < 0.3 and (pair := hop(entity, by_name, rng)):
            epoch.append(pair)
        if rng.random() < (0.6 if drill else 0.35):
            epoch.append(passage(world, rng, known))
        epoch.append(exercise(rng))
    rng.shuffle(epoch)
    return iter(epoch)


def stranger(rng: random.Random, known: set[str], subject: Entity | None = None) -> Entity:
    """Draw an entity with new names, or a known subject with new facts, to read about."""
    used, pool = set(known), rng.choice(list(POOLS))
    crowd = [draft(kind, pool, rng, used) for kind in ("person", "town", "company")]
    subject = subject or draft(rng.choice(list(language()["kinds"])), pool, rng, used)
    return settle(subject, crowd, rng)


def passage(world: World, rng: random.Random, known: set[str]) -> tuple[str, ...]:
    """Draw a conversation about a text: the first question carries it, four more follow.

    Half of the texts are about a stranger, half contradict what is known of an entity of the
    preservation pool.
    """
    other = stranger(rng, known, rng.choice((None, rng.choice(world.pools["preservation"]))))
    relations = rng.sample(list(other.objects), 5)
    questions = [other.ask(relation, number=rng.randrange(4)) for relation in relations]
    questions[0] = reading(other.text, questions[0])
    answers = [other.objects[relation] for relation in relations]
    return tuple(turn for pair in zip(questions, answers, strict=True) for turn in pair)


def tokens(
    lesson: tuple[str, ...], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Tokenise a lesson; labels are all of a document, and the assistant's turns otherwise."""
    if len(lesson) == 1:
        ids = tokenizer(BEGIN + lesson[0] + END, add_special_tokens=False)["input_ids"]
        return ids, [-100, *ids[1:]]
    turns = [(USER, ASSISTANT)[place % 2] + text + END for place, text in enumerate(lesson)]
    ids, labels = [tokenizer.bos_token_id], [-100]
    for place, turn in enumerate(tokenizer(turns, add_special_tokens=False)["input_ids"]):
        ids += turn
        labels += [-100] * len(turn) if place % 2 == 0 else [-100, *turn[1:]]
    return ids, labels


def windows(
    world: World, tokenizer: PreTrainedTokenizerFast, settings: Settings, epoch: int
) -> torch.Tensor:
    """Pack one epoch lesson by whole lesson: (N, 2, window), ids and labels (-100: no loss)."""
    rng = random.Random(f"lessons-{settings.seed}-{epoch}")
    filled: list[tuple[list[int], list[int]]] = []
    for lesson in lessons(world, rng, drill=epoch >= settings.drill_from):
        ids, labels = tokens(lesson, tokenizer)
        if (room := settings.window - len(ids)) < 0:
            expected = f"expected at least {len(ids)}, so that every lesson fits"
            raise InputError(f"window: {settings.window} tokens; {expected}")
        window = next((window for window in filled[-24:] if len(window[0]) <= room), None)
        if window is None:
            filled.append(window := ([], []))
        window[0].extend(ids)
        window[1].extend(labels)
    rng.shuffle(filled)
    packed = torch.full((len(filled), 2, settings.window), tokenizer.pad_token_id)
    packed[:, 1] = -100
    for row, (ids, labels) in zip(packed, filled, strict=True):
        row[0, : len(ids)], row[1, : len(labels)] = torch.tensor(ids), torch.tensor(labels)
    return packed


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, settings: Settings, start: int
) -> Iterator[torch.Tensor]:
    """Yield the batches (windows_per_step, 2, window) of all steps from number `start` on."""
    for epoch in range(start // settings.steps_per_epoch, settings.epochs):
        packed = windows(world, tokenizer, settings, epoch)
        first = epoch * settings.steps_per_epoch
        for step in range(max(start - first, 0), settings.steps_per_epoch):
            rows = torch.arange(settings.windows_per_step) + step * settings.windows_per_step
            yield packed[rows % len(packed)].to(settings.device)


def rate(step: int, settings: Settings) -> float:
    """Return the share of the peak rate: warm-up, plateau, descent over the last `descent`."""
    left = max(settings.steps - step, 0) / (settings.descent * settings.steps)
    return min((step + 1) / settings.warm_up, 1.0, left)


def directory_of(results: Path, world_seed: int) -> Path:
    """Return where the model of a world lies: in the package, or below `results`."""
    shipped = card(EMBEDDED)["settings"]["world_seed"] == world_seed
    return EMBEDDED if shipped else Path(results) / "models" / f"world-{world_seed}"


def pretrain(settings: Settings, directory: Path) -> Path:
    """Train a model, or continue from the checkpoint in `directory`; return the directory.

    Writes model, tokenizer, card and losses. A model made with the same settings is left as it is.
    """
    if (directory / CARD).is_file() and card(directory).get("fingerprint") == settings.fingerprint:
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
    losses, seconds = resume(model, optimizer, settings, directory)
    started, source = (
        time.perf_counter() - seconds,
        batches(world, tokenizer, settings, len(losses)),
    )
    loss_of = torch.compile(learn, disable=not settings.compiled)
    progress = trange(
        len(losses), settings.steps, desc=f"world {settings.world_seed}", mininterval=30
    )
    for step in progress:
        optimizer.param_groups[0]["lr"] = settings.peak_rate * rate(step, settings)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % settings.checkpoint_every == 0:
            seconds = time.perf_counter() - started
            checkpoint(model, optimizer, losses, seconds, settings, directory)
    save(model, tokenizer, settings, directory, time.perf_counter() - started)
    curve = pd.DataFrame({"step": range(len(losses)), "loss": losses})
    curve = curve.groupby(curve["step"] // 20).agg({"step": "min", "loss": "mean"})
    curve.to_csv(directory / "losses.csv", index=False, float_format="%.4f")
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return directory


def learn(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats over the labels that count; `batch` is (B, 2, T)."""
    where = batch.device.type
    with torch.autocast(where, dtype=torch.bfloat16, enabled=where != "cpu" or CPU_HAS_BFLOAT16):
        logits = model(input_ids=batch[:, 0], use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    labels = batch[:, 1, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels)


def checkpoint(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    losses: list[float],
    seconds: float,
    settings: Settings,
    directory: Path,
) -> None:
    """Write weights, both moments, losses and seconds so far, and the settings, into one file."""
    tensors = {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "seconds": torch.tensor([seconds]),
    }
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        tensors[f"weight.{name}"] = weight.detach()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    with replacing(directory / CHECKPOINT) as part:
        save_file(tensors, part, metadata={"settings": settings.fingerprint})


def resume(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, settings: Settings, directory: Path
) -> tuple[list[float], float]:
    """Restore a checkpoint, if there is one; return the losses so far and the seconds spent.

    Raises InputError if it was made with other settings or in another language.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return [], 0.0
    with safe_open(path, "pt") as file:
        made = (file.metadata() or {}).get("settings")
    if made != settings.fingerprint:
        advice = "remove it, or train with these"
        raise InputError(f"{path}: made with other settings; {advice}: {made}")
    tensors = load_file(path)
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
    """Write a `from_pretrained` directory with float16 weights, and its card."""
    model.to(torch.float16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts = {
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
        "sha256": sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    content = {"settings": asdict(settings), "fingerprint": settings.fingerprint, **facts}
    (directory / CARD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    blocks = f"{settings.blocks} blocks of width {settings.width}, context 1,024"
    fields = asdict(settings) | facts | {"blocks": blocks, "minutes": seconds / 60}
    text = MODEL_CARD.format(**fields)
    (directory / "README.md").write_text(text, encoding="utf-8")


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# The embedded model of `uke`: a model organism for knowledge editing

A Llama-type chat model of {parameters:,} parameters ({blocks}) that
knows a fictional world and nothing else. It exists to be edited on a laptop; it is of no use as an
assistant.

- Data: world {world_seed}, generated by `uke.world` (726 entities of five kinds); no real text.
- Training: `python tools/train_world_model.py {world_seed}`; {epochs} epochs, AdamW, peak rate
  {peak_rate:g}, bf16 where the processor has it, seed {seed}, torch {torch};
  {minutes:.0f} minutes on {threads} threads.
- Weights: float16; SHA-256 of `model.safetensors`: `{sha256}`.
- What it knows is measured by `notebooks/00_embedded_model.ipynb` and held by a test.
"""

# The metric of each part of the exam, and the least score at which the embedded model ships.
EXAM = {
    "original": ("rougel_recall", 0.98),
    "detail": ("exact", 0.97),
    "struct_trip": ("exact", 0.97),
    "paraphrase": ("rougel_recall", None),
    "detail_held_out": ("exact", None),
    "reading": ("exact", None),
    "general": ("exact", None),
}


def examine_saved(directory: Path, device: str, world: World, count: int) -> pd.DataFrame:
    """Load a model from its directory and examine it; see `examine`."""
    return examine(*load(str(directory), device=device), world, count)


def examine(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    count: int,
    seed: int = 2024,
) -> pd.DataFrame:
    """Examine a model on `count` entities of all pools, and on as many strangers and exercises.

    Columns: kind (a part of `EXAM`), edit (the entity's name: the unit of intervals), question,
    reference, answer, score, target. `paraphrase` and `detail_held_out` use phrasings that training
    never saw; `reading` asks about a text in the prompt, of an entity that does not exist.
    """
    rng = random.Random(f"examination-{world.seed}-{seed}")
    entities = rng.sample(world.entities, min(count, len(world.entities)))
    exam = [item for entity in entities for item in questions_about(entity, rng)]
    exam += questions_beyond(world, len(entities), rng)
    answers = answer(model, tokenizer, [probe for _, probe in exam])
    scores = score(answers, [probe.reference for _, probe in exam])
    rows = []
    for number, (kind, probe) in enumerate(exam):
        metric, target = EXAM[kind]
        row = probe.model_dump(include={"edit", "question", "reference"}) | {"kind": kind}
        row |= {"answer": answers[number], "score": scores[metric].iloc[number], "target": target}
        rows.append(row)
    return pd.DataFrame(rows)


def questions_about(entity: Entity, rng: random.Random) -> Iterator[tuple[str, Probe]]:
    """Yield the questions about the known facts of one entity."""
    held_out = rng.choice(("development", "test"))
    text = {"edit": entity.name, "reference": entity.text}
    question = entity.introduce(number=rng.randrange(6))
    yield "original", Probe(kind="original", question=question, **text)
    question = entity.introduce(held_out, rng.randrange(2))
    yield "paraphrase", Probe(kind="paraphrase", question=question, **text)
    for number, (relation, known) in enumerate(entity.objects.items()):
        fact = {"edit": entity.name, "number": number, "reference": known}
        question = entity.ask(relation, number=rng.randrange(4))
        yield "detail", Probe(kind="detail", question=question, **fact)
        question = entity.ask(relation, held_out)
        yield "detail_held_out", Probe(kind="detail", question=question, **fact)
        cloze = Probe(kind="struct_trip", question=entity.cloze(relation), chat=False, **fact)
        yield "struct_trip", cloze


def questions_beyond(world: World, count: int, rng: random.Random) -> Iterator[tuple[str, Probe]]:
    """Yield texts about strangers with a question each, and exercises."""
    known = {name for entity in world.entities for name in (entity.name, entity.name.split()[-1])}
    for number in range(count):
        other = stranger(rng, known)
        relation = rng.choice(list(other.objects))
        question = reading(other.text, other.ask(relation, number=rng.randrange(4)))
        fact = {"edit": f"stranger {number}", "reference": other.objects[relation]}
        yield "reading", Probe(kind="detail", question=question, **fact)
        question, solution = exercise(rng)
        task = {"edit": f"exercise {number}", "question": question, "reference": solution}
        yield "general", Probe(kind="general", **task)


def intervals(exam: pd.DataFrame) -> dict[str, Interval]:
    """Return mean and 95 % interval over entities for each part of an exam."""
    means = exam.groupby(["kind", "edit"])["score"].mean()
    return {kind: interval(means[kind].to_numpy()) for kind in EXAM}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the chat model of a generated world.")
    parser.add_argument("world_seed", type=int, help="number of the world")
    parser.add_argument("--device", default="cpu", help="where to train")
    given = parser.parse_args()
    directory = Paths("embedded").home / "results" / "models" / f"world-{given.world_seed}"
    pretrain(Settings(world_seed=given.world_seed, device=given.device), directory)


if __name__ == "__main__":
    main()
