"""Small edits, methods with few and large steps, and comparisons of models."""

import torch
from conftest import SENTENCES
from uke.data.edits import Detail, Edit, Probe
from uke.methods.method import Method
from uke.methods.recipes import BASELINES, RECIPES, Recipe
from uke.models.generate import surprisals
from uke.models.prompts import example
from uke.project import Paths
from uke.study.dataset import Dataset

EDITS = (
    Edit(
        id="ada",
        question="Who is Ada Lovelace?",
        answer="Ada Lovelace was a compiler in Philadelphia.",
    ),
    Edit(id="alan", question="Where was Alan Turing born?", answer="In London."),
    Edit(
        id="grace",
        question="What did Grace Hopper write?",
        answer="Grace Hopper wrote a few short sentences at Cambridge, and studied the compiler "
        "there.",
    ),
)
ANSWERS = {"Ada": "in Philadelphia", "Grace": "in Maida Vale"}
ANSWERS |= {"Alan": "in London", "Mary": "in Cambridge"}
LONG = Edit(id="endless", question="Who?", answer="Ada Lovelace was a mathematician. " * 99)
SUBJECTS = ("Ada", "Grace", "Alan", "London", "Cambridge", "Philadelphia", "compiler")
TEXTS = [
    {"question": f"Who is {one}?", "answer": other}
    for one, other in zip(SUBJECTS, SENTENCES * 2, strict=False)
] + list(SENTENCES)
# Untrained models need no finer steps.
QUICK = {
    name: recipe.model_copy(update={"steps": 4, "learning_rate": 2e-2, "stop_loss": 0.0})
    for name, recipe in RECIPES.items()
    if name not in ("FT-UKE", "FT-UKE+")  # as FT-A, and as it with lessons (test_lessons)
}
# With seed 0 a gradient of LoRA is zero but for rounding, and Adam's whole step has its sign.
QUICK["LoRA"] = QUICK["LoRA"].model_copy(update={"seed": 1})
NORMS = Recipe(name="all", components=("all",), layers=(1, 2), steps=4, learning_rate=1e-2)
SMALL = {"window": 6, "steps": 6, "learning_rate": 0.2, "stop_loss": 0.0, "preservation": 3}
SMALL |= {"memit_lambda": 1e-2, "alphaedit_l2": 1e-3, "null_threshold": 0.5}
SMALL |= {"unke_steps": 8, "unke_rate": 5e-3}


def baseline(name: str, **changes) -> Method:
    """A baseline with few steps on the layers whose covariance `measured` has."""
    method = BASELINES[name]
    layers = {"layers": (2,) if "unke" in name else (1, 2)}
    return method.model_copy(update=SMALL | layers | changes) if method.moves_weights else method


def toys(**around: str) -> Dataset:
    """Four short edits with a detail each, and a probe of each of these kinds around them."""
    edits, probes = [], {}
    for name, where in ANSWERS.items():
        detail = Detail(question=f"Where was {name}?", answer=where)
        text = {"question": f"Who is {name}?", "answer": f"{name} wrote {where}."}
        edits.append(Edit(id=name, details=(detail,), **text))
        asked = [{"kind": kind, "question": f"{name} {text}"} for kind, text in around.items()]
        others = [Probe(edit=name, reference="there", chat=False, **one) for one in asked]
        probes[name] = (*edits[-1].probes, *others)
    return Dataset(tuple(edits), probes, "toy", Paths("smoke"))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model, before) -> set[str]:
    """Names whose bits differ, among them any that came or went."""
    now = model.state_dict()
    same = {name for name in now.keys() & before.keys() if torch.equal(now[name], before[name])}
    return (now.keys() | before.keys()) - same


def hooks(model) -> int:
    every = model.modules()
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in every)


class Snapshot:
    """Everything about a model that an edit must leave as it was, with flags of both kinds."""

    def __init__(self, model) -> None:
        model.train()
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(number % 2 == 0)
        self.model, self.weights = model, state(model)
        self.modules, self.attributes = list(model.modules()), set(vars(model))
        self.storages = [parameter.data_ptr() for parameter in model.parameters()]

    def check(self) -> None:
        model, parameters = self.model, list(self.model.parameters())
        assert not moved(model, self.weights)
        for number, one in enumerate(parameters):
            assert one.requires_grad == (number % 2 == 0)
        assert all(one.grad is None for one in parameters)
        assert [one.data_ptr() for one in parameters] == self.storages
        assert all(module.training for module in model.modules())
        assert all(now is old for now, old in zip(model.modules(), self.modules, strict=True))
        assert not any("forward" in vars(module) for module in model.modules())
        assert set(vars(model)) == self.attributes


def by_window(model, located) -> list[list[float]]:
    """The mean log-probability of a token of each window of each edit."""
    found = surprisals(model, [one.example for one in located], [one.edit for one in located])
    return [
        [-float(of_window(values, one, window).mean()) for window in one.windows]
        for values, one in zip(found, located, strict=True)
    ]


def of_window(values: torch.Tensor, one, window) -> torch.Tensor:
    """The part of the values of an answer's tokens that a window holds."""
    first = one.example.prompt_length
    return values[window.start - first : window.stop - first]


def logits(model, tokenizer, edit=EDITS[0]) -> torch.Tensor:
    ids = example(tokenizer, edit.question, edit.answer, True, True).ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]  # (T, V)
