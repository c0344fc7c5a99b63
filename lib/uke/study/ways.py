"""Three ways to write single edits and ask every probe of each, timed: the published loop, one by one, and in lanes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.methods.edited import edited, edited_each
from uke.methods.finetune import adapt
from uke.methods.finetune import trained as finetuned
from uke.methods.method import Method
from uke.methods.recipes import Recipe
from uke.models.generate import answer, end_tokens
from uke.models.model import kept, max_context
from uke.models.prompts import Example, collate, encode
from uke.results.compare import SIDES
from uke.study.memory import Peak
from uke.study.speed import ALIKE, WITHIN, average
from uke.study.study import Study

OWN = SIDES["efficacy"]  # the published loop asks these in one call, all other kinds in another


class Timed(NamedTuple):
    """What one way took for some edits: seconds, answered tokens, MiB beyond the model at the highest point (until asked, in all)."""

    train_seconds: float
    answer_seconds: float
    tokens: int
    train_mib: float | None
    peak_mib: float | None
    answers: dict[Probe, str]


class Watch:
    """Adds the seconds since it was last asked to one phase; `mib` is the peak of memory until the first answer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {"train": 0.0, "answer": 0.0}
        self.peak, self.mib = Peak(device), None
        self.last = self._now()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self.last
        if (
            self.mib is None
        ):  # the way reads little of a file for this, not timed as part of the next phase
            self.mib, now = self.peak.mib(), self._now()
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def loop(study: Study, edits: Sequence[Edit], method: Method, watch: Watch) -> Iterator[list[str]]:
    """The published loop: edit, ask in two calls of plain `generate`, restore, next. Peers are written as in the other ways."""
    write = rewritten if method.factors else edited
    for edit in edits:
        with write(study.model, study.tokenizer, [edit], method) as m:
            watch.lap("train")
            probes = study.dataset.probes[edit.id]
            halves = [
                [probe for probe in probes if (probe.kind in OWN) == own] for own in (True, False)
            ]
            found = {
                probe: text
                for half in halves
                if half
                for probe, text in zip(half, generated(m, study, half), strict=True)
            }
            watch.lap("answer")
        watch.lap("train")
        yield [found[probe] for probe in probes]


def single(
    study: Study, edits: Sequence[Edit], method: Method, watch: Watch
) -> Iterator[list[str]]:
    """This project's editing and answering, one edit after another."""
    for edit in edits:
        with edited(study.model, study.tokenizer, [edit], method) as m:
            watch.lap("train")
            found = answer(
                m, study.tokenizer, study.dataset.probes[edit.id], max_new_tokens=study.token_limit
            )
            watch.lap("answer")
        watch.lap("train")
        yield found


def lanes(study: Study, edits: Sequence[Edit], method: Method, watch: Watch) -> Iterator[list[str]]:
    """The same in lanes, as many as a study puts side by side: half as many after an end of memory, which is part of the time."""
    left = list(edits)
    while left:
        group = left[: study.abreast(method)]
        try:
            found = _side_by_side(study, group, method, watch)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            study.spare(method, len(group))
            continue
        del left[: len(group)]
        yield found


def _side_by_side(study: Study, group: Sequence[Edit], method: Method, watch: Watch) -> list[str]:
    with edited_each(study.model, study.tokenizer, group, method) as m:
        watch.lap("train")
        if m.failed:  # one by one it would have ended the run too
            raise FloatingPointError("; ".join(m.failed.values()))
        probes = [probe for edit in group for probe in study.dataset.probes[edit.id]]
        found = answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
        watch.lap("answer")
    watch.lap("train")
    return found


WAYS = {"loop": loop, "single": single, "lanes": lanes}


def timed(way: str, study: Study, edits: Sequence[Edit], method: Method) -> Timed:
    """One way, run on some edits; to count the tokens of the answers is not part of its time."""
    watch = Watch(study.model.device)
    texts = [text for found in WAYS[way](study, edits, method, watch) for text in found]
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    tokens = sum(len(ids) for ids in study.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return Timed(
        watch.seconds["train"],
        watch.seconds["answer"],
        tokens,
        watch.mib,
        watch.peak.mib(),
        dict(zip(probes, texts, strict=True)),
    )


def alike(
    answers: Mapping[Probe, str], lanes: Mapping[Probe, str], before: Mapping[Probe, str]
) -> dict[str, float]:
    """Of the probes asked in both: how many, the share of equal greedy answers, and the average metric of each."""
    common = [probe for probe in answers if probe in lanes]
    share = sum(answers[probe] == lanes[probe] for probe in common) / len(common)
    own, other = (
        average(common, [found[probe] for probe in common], [before[probe] for probe in common])
        for found in (answers, lanes)
    )
    return {"answers": len(common), "share": share, "average": own, "average_lanes": other}


def check_alike(way: str, found: Mapping[str, float]) -> None:
    """InputError where `alike` found less than ALIKE, or averages further apart than WITHIN: then the time of a way counts for nothing."""
    if found["share"] < ALIKE or abs(found["average"] - found["average_lanes"]) > WITHIN:
        raise InputError(
            f"way {way}: {found['share']:.3f} of {found['answers']} answers are those in lanes, the average is {found['average']:.3f} beside "
            f"{found['average_lanes']:.3f}; expected at least {ALIKE} and averages within {WITHIN}"
        )


@contextmanager
def rewritten(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> Iterator[nn.Module]:
    """One edit, trained as published loops do: the whole forward pass at every step, weights copied back at the end."""
    if recipe.loss != "target_tokens" or recipe.adapter == "adalora" or len(edits) != 1:
        raise InputError(
            f"{recipe.name}: the published loop is written for one edit, the loss of its tokens, and weights or LoRA"
        )
    batch = {
        name: tensor.to(model.device)
        for name, tensor in collate(
            list(recipe.examples(model, tokenizer, edits).values()), 0
        ).items()
    }
    with kept(model.eval(), {}):
        changed = adapt(model, recipe, 1) if recipe.adapter else model
        trained = finetuned(changed, recipe)
        before = (
            {}
            if recipe.adapter
            else {name: weight.detach().clone() for name, weight in trained.items()}
        )
        try:
            _descend(changed, batch, trained, recipe)
            yield changed
        finally:
            for name, weight in before.items():
                trained[name].data.copy_(weight)
            if recipe.adapter:
                changed.unload()


def _descend(
    model: nn.Module, batch: dict[str, Tensor], trained: dict[str, nn.Parameter], recipe: Recipe
) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    adam = torch.optim.Adam(
        trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    for _ in range(recipe.steps):
        loss = model(**batch).loss
        if loss.item() < recipe.stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()


class _Rooms(StoppingCriteria):
    """Each row ends at its own limit of tokens."""

    def __init__(self, prompt: int, limits: Tensor) -> None:
        self.prompt, self.limits = prompt, limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return self.limits <= input_ids.shape[1] - self.prompt


@torch.no_grad()
def generated(model: nn.Module, study: Study, probes: Sequence[Probe]) -> list[str]:
    """Greedy answers of one call of transformers' own `generate`, each with the tokens that `answering.answer` would give it."""
    tokenizer = study.tokenizer
    prompts = [encode(tokenizer, probe.question, probe.chat) for probe in probes]
    limits = [
        min(study.token_limit(probe), max_context(model) - len(prompt))
        for probe, prompt in zip(probes, prompts, strict=True)
    ]
    batch = collate([Example(prompt, prompt, len(prompt)) for prompt in prompts], 0, side="left")
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))  # (B, T)
    rooms = _Rooms(ids.shape[1], torch.tensor(limits, device=ids.device))
    ends = sorted(end_tokens(model, tokenizer))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(limits),
        eos_token_id=ends,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([rooms]),
    )
    rows = [row[:limit] for row, limit in zip(out[:, ids.shape[1] :].tolist(), limits, strict=True)]
    cut = [
        row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
        for row in rows
    ]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]
