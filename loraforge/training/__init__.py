"""Training adapters: the loop, its data, its runs on disk."""

from loraforge.training.config import TrainConfig
from loraforge.training.loop import Metrics, train

__all__ = ["Metrics", "TrainConfig", "train"]
