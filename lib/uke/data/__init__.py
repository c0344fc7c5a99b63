"""Benchmark files become edits with probes; Wikipedia and the like become documents.

from uke.data import load

edits = load("unkebench", "final_data_v2.json")
edits[0].question, edits[0].answer, edits[0].probes
"""

from uke.data.documents import Document
from uke.data.edits import AVERAGE, KINDS, Edit, Fact, Item, Kind, Probe, in_group
from uke.data.find import find_data, find_files
from uke.data.formats import FORMATS, load, load_clozes, load_locality

__all__ = [
    "AVERAGE",
    "FORMATS",
    "KINDS",
    "Document",
    "Edit",
    "Fact",
    "Item",
    "Kind",
    "Probe",
    "find_data",
    "find_files",
    "in_group",
    "load",
    "load_clozes",
    "load_locality",
]
