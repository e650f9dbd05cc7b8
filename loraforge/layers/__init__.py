"""Low-rank updates on live modules: inject, attach, export, remove."""

from loraforge.layers.config import INITS, Init, LoraConfig
from loraforge.layers.inject import Injected, attach, inject
from loraforge.layers.narrow import narrow, widen

__all__ = ["INITS", "Init", "Injected", "LoraConfig", "attach", "inject", "narrow", "widen"]
