"""What an adapter is, in memory: frozen values, their names on disk, their identity."""

from loraforge.adapter.identity import content_id, identity
from loraforge.adapter.model import Adapter, BaseModel, Kind, LowRank
from loraforge.adapter.tensors import DTYPES, named_tensors, raw_bytes, same_tensor

__all__ = [
    "DTYPES",
    "Adapter",
    "BaseModel",
    "Kind",
    "LowRank",
    "content_id",
    "identity",
    "named_tensors",
    "raw_bytes",
    "same_tensor",
]
