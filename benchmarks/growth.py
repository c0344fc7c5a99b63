"""How the three ways grow: with the number of edits, the length of the answer, the size of the model. Each point is timed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import predictions
import shapes
from tqdm import tqdm
from uke.methods.method import Method
from uke.study import ways
from uke.study.study import Study


@dataclass(frozen=True)
class Amount:
    """Points of each growth, the edits at one of them, and the tokens that a model of random weights, which never ends, may answer."""

    edits: tuple[int, ...] = (1, 4, 16, 64)
    shares: tuple[float, ...] = (0.5, 1.0, 2.0)
    widths: tuple[float, ...] = (0.5, 1.0, 2.0)
    at_each: int = 8
    random_tokens: int = 48

    def limit(self, way: str, count: int) -> int:
        """Edits that a way is timed on where lanes have `count`: the slow ones on fewer, four at least."""
        return min(
            count, {"loop": max(4, self.at_each // 2), "single": self.at_each, "lanes": count}[way]
        )


def measured(study: Study, method: Method, amount: Amount) -> tuple[list[dict], list[dict]]:
    """Timings at every point, and the memory of an edit at each size of the model."""
    timings, memory = [], []
    for grows, value, at in tqdm(list(_points(study, amount)), desc=f"{method.name}: growth"):
        found = []
        for way in ways.WAYS:
            edits = at.dataset.edits[: amount.limit(way, len(at.dataset.edits))]
            one = ways.timed(way, at, edits, method)
            named = {
                "method": method.name,
                "way": way,
                "grows": grows,
                "value": value,
                "repeat": 0,
                "edits": len(edits),
                "probes": len(one.answers),
            }
            found.append(
                named | {name: kept for name, kept in one._asdict().items() if name != "answers"}
            )
        timings += found
        if grows == "parameters (millions)":
            memory += predictions.memory(
                at, method, found, f"random weights, {value:.2g} million parameters"
            )
    return timings, memory


def _points(study: Study, amount: Amount) -> Iterator[tuple[str, float, Study]]:
    for count in amount.edits:
        yield "edits", count, replace(study, dataset=study.dataset.first(count))
    for share in amount.shares:
        dataset = shapes.cut(study.dataset, share, amount.at_each)
        yield (
            "tokens of the answer",
            _tokens(study, [edit.answer for edit in dataset.edits]),
            replace(study, dataset=dataset),
        )
    few = replace(study.dataset.first(amount.at_each), world_seed=study.dataset.world_seed)
    few = replace(
        few,
        probes={
            edit.id: tuple(
                probe.model_copy(update={"reference": "none"}) for probe in few.probes[edit.id]
            )
            for edit in few.edits
        },
    )
    for share in amount.widths:
        model = shapes.widened(study.model, share)
        yield (
            "parameters (millions)",
            sum(weight.numel() for weight in model.parameters()) / 1e6,
            replace(
                study,
                subject=(model, study.tokenizer),
                dataset=few,
                max_new_tokens=amount.random_tokens,
            ),
        )


def _tokens(study: Study, texts: Sequence[str]) -> int:
    ids = study.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return round(sum(map(len, ids)) / len(ids))
