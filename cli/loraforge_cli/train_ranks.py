"""Started by torchrun: one process of several, of which only the first speaks and stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from loraforge.training import ranks
from loraforge_cli.options import Session


@contextmanager
def joined(session: Session) -> Iterator[Session]:
    """Join the processes that torchrun started, if it did; yield how this one is to speak."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield session
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield session if dist.get_rank() == 0 else replace(session, quiet=True)
        ranks.wait()  # one that left earlier would end the connections under the others
    finally:
        dist.destroy_process_group()
