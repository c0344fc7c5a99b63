"""Explore one edit by hand: a bench that writes and undoes it, and the widgets of the notebook."""

from uke.explore.bench import Bench, Library, Task, Trial, at_hand, comparison
from uke.explore.widgets import show
