"""How a text is written into a model: methods, their settings, and the seam that undoes them."""

from uke.methods.catalog import METHODS, configured, find
from uke.methods.edited import EditRecord, edited, edited_each, load, save, sequence
from uke.methods.method import Method, Training
from uke.methods.recipes import BASELINES, FACTORS, RECIPES, InContext, LocateRecipe, Recipe
