"""Recipes that make adapters, and ways back: deriving one again, and finding out what it was made of."""

from loraforge.recipe._explain import explain, explain_layers
from loraforge.recipe._lock import Pin
from loraforge.recipe._rebuild import Rebuilt, rebuild
from loraforge.recipe._recipe import Made, Recipe, StepDone

__all__ = ["Made", "Pin", "Rebuilt", "Recipe", "StepDone", "explain", "explain_layers", "rebuild"]
