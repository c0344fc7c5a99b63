"""Run studies unit by unit and keep their rows; compare levels, methods and sequences."""

from uke.study.comparison import say_contrasts, say_leads, say_means
from uke.study.control import ControlStudy
from uke.study.dataset import Dataset, load
from uke.study.factor import FactorStudy
from uke.study.methods import MethodStudy
from uke.study.sequential import SequenceStudy
from uke.study.study import Study
from uke.study.tuning import LevelTrials, Trials
