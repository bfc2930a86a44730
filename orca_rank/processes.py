"""The processes of one run: which of them this is, and what they tell each other. One process is the usual case, for
which everything here does nothing; the functions that all must call together are said to be."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and most commands have one process
    from torch import Tensor

T = TypeVar("T")
# Longer than any stage: the others wait while the first process works alone.
PATIENCE = datetime.timedelta(days=30)


class World(NamedTuple):
    """rank: 0 … size − 1 of this process among all; local_rank: among those of its machine, which chooses the GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


_world = World()
_waiting: Any = None  # the group in which processes wait for each other without a GPU


def world() -> World:
    """This process among those of the run."""
    return _world


def first() -> bool:
    """Whether this process writes files and prints."""
    return _world.rank == 0


def join(backend: str) -> None:
    """Meet the other processes of the run, as torchrun's environment variables describe them. All together.

    Args:
        backend: of torch.distributed, such as "gloo" or "cpu:gloo,cuda:nccl".
    """
    global _world, _waiting
    import torch.distributed as dist

    dist.init_process_group(backend)
    _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    _world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def leave() -> None:
    """Be a process of its own again."""
    global _world, _waiting
    import torch.distributed as dist

    _world, _waiting = World(), None
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here. All together."""
    if _world.size > 1:
        import torch.distributed as dist

        dist.barrier(_waiting)


def agreed(ask: Callable[[], T]) -> T:
    """What the first process answers, on every process. All together."""
    if _world.size == 1:
        return ask()
    import torch.distributed as dist

    answer = [ask() if first() else None]
    dist.broadcast_object_list(answer, 0, _waiting)
    return answer[0]  # type: ignore[return-value]  # what the first one's `ask` gave


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others: what it fetches or makes there, they find. All
    together."""
    if not first():
        barrier()
    yield
    if first():
        barrier()


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on each of them. All together."""
    if _world.size == 1:
        return value
    import torch.distributed as dist

    value = value.clone()
    dist.all_reduce(value)
    return value


def add_up(*values: Tensor) -> None:
    """Add to each tensor those of the other processes, in place. All together.

    Args:
        values: contiguous; of types other than float32 and float64 the bytes are added, which gives the one that is not
            zero, where there is one.
    """
    if _world.size == 1:
        return
    import torch
    import torch.distributed as dist

    for value in values:
        numbers = value if value.dtype in (torch.float32, torch.float64) else value.view(torch.uint8)
        dist.all_reduce(numbers, group=_waiting if value.device.type == "cpu" else None)


def gathered(rows: Tensor, count: int) -> Tensor:
    """The rows (count, ...) of all processes, number i being one of process i mod size, on each of them. All together.

    Only the own rows carry a gradient: it is that of the whole, as if the others were constants.

    Args:
        rows: the own ones, of which there may be more than belong to the whole.
    """
    rank, size, _ = _world
    if size == 1:
        return rows[:count]
    import torch
    import torch.distributed as dist

    own = rows[: len(range(rank, count, size))]
    padded = rows.new_zeros(-(-count // size), *rows.shape[1:])
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    whole = torch.stack(parts, 1).flatten(0, 1)[:count]
    return whole.index_copy(0, torch.arange(rank, count, size, device=rows.device), own)
