"""Language models: load them, prompt them, generate answers and read log-probabilities."""

from uke.models.generate import (
    AnswerCache,
    Generation,
    Token,
    answer,
    target_log_probability,
    token_probabilities,
)
from uke.models.model import blocks, fingerprint, kept, load, max_context, module_names, select

__all__ = [
    "AnswerCache",
    "Generation",
    "Token",
    "answer",
    "blocks",
    "fingerprint",
    "kept",
    "load",
    "max_context",
    "module_names",
    "select",
    "target_log_probability",
    "token_probabilities",
]
