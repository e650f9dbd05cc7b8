"""Training adapters: the loop, several at once, data, runs on disk."""

from loraforge.training.config import TrainConfig
from loraforge.training.halving import Halving
from loraforge.training.loop import Metrics, train
from loraforge.training.many import Trained, train_many
from loraforge.training.seats import Dropped, Member

__all__ = ["Dropped", "Halving", "Member", "Metrics", "TrainConfig", "Trained", "train", "train_many"]
