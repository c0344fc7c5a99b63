"""Locality sets: the questions whose answers an edit must not change.

from uke.locality import Settings, ensure, of_world

path = ensure(of_world(folder, "test"), Settings(), folder / "locality")
"""

from uke.locality.build import Builder, Settings, Sources
from uke.locality.card import SetFiles, ensure, of_files, of_world
