"""The fictional world, whose every fact is known: entities, texts, edits, and their files.

from uke.world import build, ensure

world = build(seed=1)
folder = ensure("results", seed=1)   # its files, in the formats of the benchmarks
"""

from uke.world.files import card, ensure
from uke.world.generate import World, build

__all__ = ["World", "build", "card", "ensure"]
