"""Benchmark files become edits with probes; Wikipedia and the like become documents.

from uke.data import load

edits = load("unkebench", "final_data_v2.json")
edits[0].question, edits[0].answer, edits[0].probes
"""

from uke.data.edits import AVERAGE, KINDS, Edit, Probe, in_group
from uke.data.find import find_data
from uke.data.formats import load, load_locality

__all__ = ["AVERAGE", "KINDS", "Edit", "Probe", "find_data", "in_group", "load", "load_locality"]
