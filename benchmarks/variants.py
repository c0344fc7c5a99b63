"""Three variants of single editing, timed: the published loop, one by one, and in lanes.

Each yields the answers to all probes of its edits, edit by edit or lane group by lane group.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from uke.data.edits import AVERAGE, EFFICACY, KINDS, Edit, Probe
from uke.errors import InputError
from uke.methods.edited import edited, edited_each
from uke.methods.finetune import adapt, trained
from uke.methods.method import Method
from uke.methods.recipes import Recipe
from uke.models.generate import answer, end_tokens
from uke.models.model import kept, max_context
from uke.models.prompts import Example, collate, encode
from uke.results.metrics import score
from uke.study.memory import Peak
from uke.study.study import Study

# Greedy answers of one edit made in two variants differ where rounding tips a token. At least this
# share is the same, and the average metric of all answers differs by no more than this.
SAME, WITHIN = 0.95, 0.01

Answers = dict[Probe, str]


class Watch:
    """Add the seconds since it was last asked to a phase, "train" or "answer"."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {"train": 0.0, "answer": 0.0}
        self.last = self._now()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Timed(NamedTuple):
    """What a variant took: seconds, answered tokens, MiB beyond the model at the highest point."""

    train_seconds: float
    answer_seconds: float
    tokens: int
    peak_mib: float | None
    answers: Answers


def loop(study: Study, edits: Sequence[Edit], method: Method, watch: Watch) -> Iterator[list[str]]:
    """Edit, generate in two calls of plain `generate`, restore, and so on, as published.

    Baselines write with this project's solvers, as in the other variants.
    """
    write = rewritten if method.factors else edited
    for edit in edits:
        probes = study.dataset.probes[edit.id]
        answers: Answers = {}
        with write(study.model, study.tokenizer, [edit], method) as m:
            watch.lap("train")
            for own in (True, False):
                if half := [probe for probe in probes if (probe.kind in EFFICACY) == own]:
                    answers |= zip(half, generated(m, study, half), strict=True)
            watch.lap("answer")
        watch.lap("train")
        yield [answers[probe] for probe in probes]


def single(
    study: Study, edits: Sequence[Edit], method: Method, watch: Watch
) -> Iterator[list[str]]:
    """Edit and answer one edit after another, with this project's code."""
    for edit in edits:
        probes = study.dataset.probes[edit.id]
        with edited(study.model, study.tokenizer, [edit], method) as m:
            watch.lap("train")
            answers = answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
            watch.lap("answer")
        watch.lap("train")
        yield answers


def lanes(study: Study, edits: Sequence[Edit], method: Method, watch: Watch) -> Iterator[list[str]]:
    """Do the same in lanes, as many as a study holds; half as many after running out of memory."""
    left = list(edits)
    while left:
        group = left[: study.lanes_at_once(method)]
        probes = [probe for edit in group for probe in study.dataset.probes[edit.id]]
        try:
            with edited_each(study.model, study.tokenizer, group, method) as m:
                watch.lap("train")
                if m.failed:  # one by one it would have ended the run too
                    raise FloatingPointError("; ".join(m.failed.values()))
                answers = answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
                watch.lap("answer")
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            study.lanes = len(group) // 2
            continue
        watch.lap("train")
        del left[: len(group)]
        yield answers


VARIANTS = {"loop": loop, "single": single, "lanes": lanes}


def timed(variant: str, study: Study, edits: Sequence[Edit], method: Method) -> Timed:
    """Run a variant on some edits; counting the tokens of the answers is not part of its time."""
    watch, peak = Watch(study.model.device), Peak(study.model.device)
    groups = VARIANTS[variant](study, edits, method, watch)
    texts = [text for answers in groups for text in answers]
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    ids = study.tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = dict(zip(probes, texts, strict=True))
    seconds = watch.seconds["train"], watch.seconds["answer"]
    return Timed(*seconds, sum(map(len, ids)), peak.mib(), answers)


def compare_answers(answers: Answers, lanes: Answers, before: Answers) -> dict[str, float]:
    """Return how many answers are compared, the share of equal ones and both averages."""
    common = [probe for probe in answers if probe in lanes]
    share = sum(answers[probe] == lanes[probe] for probe in common) / len(common)
    mean, mean_lanes = (average(common, found, before) for found in (answers, lanes))
    return {"answers": len(common), "share": share, "average": mean, "average_lanes": mean_lanes}


def check_same(what: str, found: Mapping[str, float]) -> None:
    """Raise InputError where a variant answers otherwise than lanes, so its time means nothing."""
    gap = abs(found["average"] - found["average_lanes"])
    if found["share"] < SAME or gap > WITHIN:
        same = f"{found['share']:.3f} of {found['answers']} answers are the same as in lanes"
        means = f"the average is {found['average']:.3f} beside {found['average_lanes']:.3f}"
        expected = f"expected at least {SAME}, and averages within {WITHIN}"
        raise InputError(f"{what}: {same}, {means}; {expected}")


def average(probes: Sequence[Probe], answers: Answers, before: Answers) -> float:
    """Return the average metric of all edits together: the mean over kinds of primary metrics.

    Kinds that are compared with the answers `before` the edit count only where there are any.
    """
    means = []
    for kind in AVERAGE:
        own = [probe for probe in probes if probe.kind == kind]
        known = KINDS[kind].against == "reference"
        if own and (known or before):
            references = [probe.reference if known else before[probe] for probe in own]
            aliases = [probe.aliases if known else () for probe in own]
            scores = score([answers[probe] for probe in own], references, aliases)
            means.append(scores[KINDS[kind].metric].mean())
    return float(pd.Series(means).mean())


@contextmanager
def rewritten(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> Iterator[nn.Module]:
    """Train one edit as published loops do: a whole forward pass a step, weights copied back."""
    if recipe.loss != "target_tokens" or recipe.adapter == "adalora" or len(edits) != 1:
        expected = "one edit, the loss of all target tokens, and weights or LoRA"
        raise InputError(f"{recipe.name}: the published loop is written for {expected}")
    examples = list(recipe.examples(model, tokenizer, edits).values())
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples, 0).items()}
    with kept(model.eval(), {}):
        changed = adapt(model, recipe, 1) if recipe.adapter else model
        weights = trained(changed, recipe)
        before = {} if recipe.adapter else {name: w.detach().clone() for name, w in weights.items()}
        try:
            _descend(changed, batch, weights, recipe)
            yield changed
        finally:
            for name, weight in before.items():
                weights[name].data.copy_(weight)
            if recipe.adapter:
                changed.unload()


def _descend(
    model: nn.Module, batch: dict[str, Tensor], weights: dict[str, nn.Parameter], recipe: Recipe
) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in weights)
    rates = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    adam = torch.optim.Adam(weights.values(), **rates)
    for _ in range(recipe.steps):
        loss = model(**batch).loss
        if loss.item() < recipe.stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()


class _Limits(StoppingCriteria):
    """End each row at its own limit of tokens."""

    def __init__(self, prompt: int, limits: Tensor) -> None:
        self.prompt, self.limits = prompt, limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return self.limits <= input_ids.shape[1] - self.prompt


@torch.no_grad()
def generated(model: nn.Module, study: Study, probes: Sequence[Probe]) -> list[str]:
    """Answer greedily by one call of transformers' `generate`, with the usual limits of tokens."""
    tokenizer = study.tokenizer
    prompts = [encode(tokenizer, probe.question, probe.chat) for probe in probes]
    limits = [
        min(study.token_limit(probe), max_context(model) - len(prompt))
        for probe, prompt in zip(probes, prompts, strict=True)
    ]
    batch = collate([Example(prompt, prompt, len(prompt)) for prompt in prompts], 0, side="left")
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))  # (B, T)
    ends = sorted(end_tokens(model, tokenizer))
    limit = _Limits(ids.shape[1], torch.tensor(limits, device=ids.device))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(limits),
        eos_token_id=ends,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([limit]),
    )
    texts = []
    for row, most in zip(out[:, ids.shape[1] :].tolist(), limits, strict=True):
        end = next((place for place, token in enumerate(row[:most]) if token in ends), most)
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts
