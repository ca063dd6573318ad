"""Point-to-point calls over gloo that wait where NCCL's do.

A pair of ranks has one communicator in each group, made by the first call: it waits in the call until the
other rank makes its own. What a rank asks of a communicator is done one after the other, so an operation
behind a receive begins when the message is there. There are no tags. (PyTorch's ProcessGroupNCCL,
`getKeySendRecv` and `pointToPoint`.)
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

HANG = "NCCL would hang"


class Work:
    """An operation under way."""

    def __init__(self, done: Future[None], what: str, patience: float) -> None:
        self.done, self.what, self.patience = done, what, patience

    def wait(self) -> None:
        try:
            self.done.result(self.patience)
        except TimeoutError:
            raise RuntimeError(f"{HANG}: {self.what} does not begin or end") from None


class PointToPoint:
    """The communicators of one rank."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.threads: dict[str, ThreadPoolExecutor] = {}
        self.real = {"isend": dist.isend, "irecv": dist.irecv}
        self.store = dist.distributed_c10d._get_default_store()

    def call(self, name: str, tensor: Tensor, peer: int, group: Any) -> Work:
        """`isend` or `irecv`."""
        rank = dist.get_rank(group)
        pair = f"{group.group_name}/{min(rank, peer)}-{max(rank, peer)}"
        what = f"{name} of rank {rank} with rank {peer} in {group.group_desc}"
        if pair not in self.threads:
            self.threads[pair] = ThreadPoolExecutor(1)
            self._meet(pair, rank, peer, what)
        end = {"isend": "group_dst", "irecv": "group_src"}[name]

        def run() -> None:
            self.real[name](tensor, group=group, **{end: peer}).wait()

        return Work(self.threads[pair].submit(run), what, self.patience)

    def _meet(self, pair: str, rank: int, peer: int, what: str) -> None:
        self.store.set(f"{pair} {rank}", "here")
        try:
            self.store.wait([f"{pair} {peer}"], timedelta(seconds=self.patience))
        except RuntimeError:
            raise RuntimeError(f"{HANG}: {what} waits for the other rank's first call") from None


@contextmanager
def nccl_like(patience: float = 60.0) -> Iterator[None]:
    """In it, groups say that they are NCCL's, and sends and receives wait like those.

    Args:
        patience: seconds until what waits is an error.
    """
    made = PointToPoint(patience)

    def isend(tensor: Tensor, group_dst: int, group: Any, tag: int = 0) -> Work:
        return made.call("isend", tensor, group_dst, group)

    def irecv(tensor: Tensor, group_src: int, group: Any, tag: int = 0) -> Work:
        return made.call("irecv", tensor, group_src, group)

    with (
        mock.patch.object(dist, "get_backend", return_value="nccl"),
        mock.patch.object(dist, "isend", isend),
        mock.patch.object(dist, "irecv", irecv),
    ):
        yield
    for thread in made.threads.values():
        thread.shutdown()
