"""Language models: load them, prompt them, generate answers and read log-probabilities."""

from uke.models.generate import answer, target_log_probability
from uke.models.model import fingerprint, load, module_names, select
