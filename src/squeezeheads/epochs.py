"""The number of an epoch, where random draws of a data set depend on it."""

from __future__ import annotations

import torch


class SharedEpoch:
    """A number that all processes of a training see change: workers that outlive an epoch
    (``dataloader_persistent_workers``) hold copies of the data set from before it."""

    def __init__(self) -> None:
        self._number = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """From now on it is this one."""
        self._number.fill_(epoch)

    def __int__(self) -> int:
        return int(self._number)
