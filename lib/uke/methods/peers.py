"""Peers: every choice of one locate-then-edit method, a solver and an anchor rule, and the named ones."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from uke.methods.recipes import Choices, Count, Layer, NotNegative, Positive, Several


class Peer(Choices):
    """Every choice of one locate-then-edit method (sources: the published code of each; arXiv 2210.07229, 2410.02355,
    2405.15349, 2502.05628). Defaults are published settings for models of 7 to 8 billion parameters.

    `anchors` says whose hidden states are set: the last prompt token's (`last`), that before each window of `window`
    tokens (`windows`), before each window that begins where surprisal peaks (`surprisal`), or as `windows` with a
    loss on all later windows too (`nested`), each weighing the share of prefixes that hold it or 2 - cosine of its
    gradient with the own window's (`weighting`). Target values: `steps` of Adam at `learning_rate` on nats per token
    of the window + `decay` |delta| / |h|^2, with |delta| at most `clamp` |h|; an edit's end below `stop_loss`.
    `solver` writes them: `memit` (ridge `memit_lambda` times the second moment; `keep_keys` also holds the keys of
    all other positions of the edits), `alphaedit` (ridge `alphaedit_l2`, on directions whose second moment is below
    `null_threshold`), `unke` (`unke_steps` of AdamW on the last of `layers`, held to `preservation` texts), or
    `in_context`, which moves no weight and puts the text into the prompt.

    `layers` are block numbers or fractions of the depth. Published blocks become fractions: MEMIT's 4-8 of 32, which
    in the embedded model of 8 are 1 and 2, as several fractions may name one block; UnKE's 7 of 32, there 1.
    `as_published` divides every layer's residual by `layers - (edits - 1)` and takes the projector of that number, as
    AnyEdit's MEMIT and AlphaEdit do since an inner loop overwrites the counter of layers.
    """

    solver: Literal["memit", "alphaedit", "unke", "in_context"]
    anchors: Literal["last", "windows", "surprisal", "nested"] = "last"
    window: Count = 40
    weighting: Literal["prefix", "gradient"] = "prefix"
    layers: Annotated[tuple[Layer, ...], Field(min_length=1), Several]
    chat_template: StrictBool = True
    end_of_turn: StrictBool = True
    learning_rate: Positive = 0.5
    steps: Count = 25
    stop_loss: NotNegative = 5e-2
    clamp: Positive = 4.0
    decay: NotNegative = 1e-3
    memit_lambda: Positive = 15_000.0
    keep_keys: StrictBool = False
    alphaedit_l2: Positive = 10.0
    null_threshold: Positive = 2e-2
    unke_steps: Count = 50
    unke_rate: Positive = 2e-4
    unke_decay: NotNegative = 1e-2
    preservation: Annotated[StrictInt, Field(ge=0)] = 20
    as_published: StrictBool = False
    seed: Annotated[StrictInt, Field(ge=0)] = 2024


_FIVE = {"layers": tuple(block / 32 for block in range(4, 9))}
_ONE = {"layers": (7 / 32,)}
_MEMIT = {"solver": "memit", "keep_keys": True, **_FIVE}

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "memit": Peer(name="MEMIT", solver="memit", **_FIVE),
        "alphaedit": Peer(name="AlphaEdit", solver="alphaedit", **_FIVE),
        "unke": Peer(name="UnKE", solver="unke", **_ONE),
        "anyedit_memit": Peer(name="AnyEdit (MEMIT)", anchors="windows", **_MEMIT),
        "anyedit_alphaedit": Peer(
            name="AnyEdit (AlphaEdit)", anchors="windows", solver="alphaedit", **_FIVE
        ),
        "anyedit_unke": Peer(name="AnyEdit (UnKE)", anchors="windows", solver="unke", **_ONE),
        "anyedit_pp": Peer(name="AnyEdit++", anchors="surprisal", **_MEMIT),
        "muke": Peer(name="muKE", anchors="nested", window=30, **_MEMIT),
        "in_context": Peer(name="in-context", solver="in_context", **_ONE),
    }
)
