"""Run studies: ask, edit, ask again, score, and keep the rows; compare levels, methods,
sequences."""

from uke.study.dataset import Dataset, load
from uke.study.factor import FactorStudy, say_means
from uke.study.methods import MethodStudy
from uke.study.sequential import SequenceStudy
from uke.study.study import Study

__all__ = ["Dataset", "FactorStudy", "MethodStudy", "SequenceStudy", "Study", "load", "say_means"]
