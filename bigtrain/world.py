"""The ranks that train together: which one this process is, and what they tell each other through host memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from bigtrain import slurm
from bigtrain.errors import InputError
from bigtrain.heartbeat import collective_seconds, exchange

if TYPE_CHECKING:
    from torch import Tensor

LISTENER = "BIGTRAIN_LISTENER"
"""The number of an open socket on which the first rank listens for the others, NONE for those: so that torch opens none
that everybody could reach.
"""
NONE = -1

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun sets, and Accelerate's launcher, which runs on it."""

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How Open MPI, MPICH and Intel's MPI, and MVAPICH tell the processes that they start how many there are."""


@dataclass(frozen=True, slots=True)
class World:
    """A process among those that train together; alone, what it tells comes back to it.

    All ranks call the same methods in the same order. Texts and numbers go over gloo, whatever the device, so that no
    method waits for a GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = field(default=None, kw_only=True, compare=False, repr=False)
    """The process group that texts and numbers go over; None is torch's own, of all ranks."""

    @property
    def first(self) -> bool:
        """Tell whether this rank writes down what all have in common."""
        return self.rank == 0

    def reading(self, sharing: int) -> tuple[int, int]:
        """Return which rows are this rank's, and of how many: neighbours that share products read the same ones."""
        return self.rank // sharing, self.size // sharing

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks of some numbers, fp64, the same on every rank; each gives equally many."""
        return self._reduced(values, "SUM")

    def sum_on_host(self, value: int) -> int:
        """Return the sum of a number over the ranks of this machine."""
        node = self.rank // self.local_size
        numbers = [0] * -(-self.size // self.local_size)
        numbers[node] = value
        return int(self.sum(numbers)[node])

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the largest on any rank of each of some numbers."""
        return self._reduced(values, "MAX")

    def all_reduce(self, tensor: Tensor, how: Literal["SUM", "MIN"]) -> Tensor:
        """Reduce a tensor over ranks in place, on its device; on CUDA nothing waits."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        return tensor

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is up on any rank."""
        return self.max([float(flag)])[0] > 0

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, in their order."""
        if self.size == 1:
            return [text]
        import torch
        import torch.distributed as dist

        raw = text.encode()
        longest = int(self.max([len(raw)])[0])
        mine = torch.zeros(8 + longest, dtype=torch.uint8)
        mine[: 8 + len(raw)] = torch.frombuffer(bytearray(len(raw).to_bytes(8, "little") + raw), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with exchange():
            dist.all_gather(parts, mine, group=self.group)
        found = (bytes(part.numpy()) for part in parts)
        return [part[8 : 8 + int.from_bytes(part[:8], "little")].decode() for part in found]

    def broadcast(self, text: str) -> str:
        """Return the first rank's text."""
        return self.gather(text if self.first else "")[0]

    def for_thread(self, timeout_seconds: float) -> World:
        """Return this world over a group of its own, for another thread: what two threads say over one gets mixed up.

        All ranks call this together.
        """
        if self.size == 1:
            return self
        import torch.distributed as dist

        timeout = timedelta(seconds=collective_seconds(timeout_seconds))
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64)
        with exchange():
            dist.all_reduce(numbers, getattr(dist.ReduceOp, how), group=self.group)
        found: list[float] = numbers.tolist()
        return found


ALONE = World()


def world_of(environment: Mapping[str, str]) -> World | None:
    """Return the place among ranks that a launcher, or Slurm, has written into an environment; None if none has.

    Raises InputError where it contradicts itself.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        environment = {**environment, **slurm.places(environment)}
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size = (int(environment[name]) for name in NAMES[:2])
        local_rank, local_size = (
            int(environment.get(name, default))
            # DeepSpeed's launcher has another name for the processes of a machine.
            for name, default in zip(NAMES[2:], (rank, environment.get("LOCAL_SIZE", size)), strict=True)
        )
    except ValueError as error:
        raise InputError(f"environment: {', '.join(NAMES)}: {error}; let a launcher set them, or unset them") from None
    if not 0 <= rank < size or not 0 <= local_rank < local_size <= size:
        given = ", ".join(f"{name}={environment.get(name)}" for name in NAMES)
        raise InputError(f"environment: {given}: no such rank; let a launcher set them, or unset them")
    return World(rank, size, local_rank, local_size)


def check_told(environment: Mapping[str, str]) -> None:
    """Raise InputError where a launcher has started several processes, or should have, and told none its rank.

    Each would train alone. For environments of which `world_of` knows no world.
    """
    several = [name for name in MPI_SIZES if environment.get(name, "1") != "1"]
    if several:
        text = f"{several[0]}={environment[several[0]]}: mpirun has started several processes and told none its rank"
        raise InputError(f"environment: {text}; use torchrun, or set {', '.join(NAMES)}, MASTER_ADDR and MASTER_PORT")
    # Accelerate's launcher sets both where it was asked for several processes and starts one.
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        text = (
            "ACCELERATE_USE_CPU and MASTER_ADDR, but no RANK: accelerate launch --cpu starts one process, however many"
        )
        raise InputError(f"environment: {text} it is asked for; use accelerate launch --multi_gpu, or torchrun")


def current_world() -> World:
    """Return this process's place among the ranks that it has joined; `ALONE` before it has."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    rank, size = dist.get_rank(), dist.get_world_size()
    written = world_of(os.environ)
    return written if written is not None and (written.rank, written.size) == (rank, size) else World(rank, size, rank)


@contextmanager
def joined(*, kind: str | None = None, timeout_seconds: float = 60.0) -> Iterator[World]:
    """Meet the other ranks that the environment tells of, as long as this lasts; alone where it tells of none.

    `kind` is that of the device, "cuda" where there is one: tensors on the CPU go over gloo, those on CUDA over NCCL.
    A rank that does not come within the timeout, or later answers to nothing for so long, is an error. A group that
    exists already is left as it is. Raises InputError where the environment contradicts itself, or tells of processes
    and not which of them this is.
    """
    import torch.distributed as dist

    world = world_of(os.environ)
    if world is None and not dist.is_initialized():
        check_told(os.environ)
    if dist.is_initialized() or world is None or world.size == 1:
        yield current_world()
        return
    import torch

    options: dict[str, Any] = {"timeout": timedelta(seconds=collective_seconds(timeout_seconds))}
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        # A scheduler may show each process its own device alone.
        there = torch.cuda.device_count()
        index = 0 if there == 1 else world.local_rank
        if index >= there:
            text = f"local rank {index}, and this machine has {there} CUDA devices"
            raise InputError(f"{text}; start fewer processes, or join with kind='cpu' for a plan on the CPU")
        torch.cuda.set_device(index)
        options["device_id"] = torch.device("cuda", index)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    store = _place_to_meet(world, options["timeout"])
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, **options)
    yield world
    dist.destroy_process_group()  # not after an error: the others would end first, and NCCL may wait for them


_stores: dict[tuple[str | None, ...], Any] = {}
"""Where ranks have met, by address and port; they are kept.

A rank that is early at its next meeting would find the store of the last one on its way out, and in it addresses at
which nobody listens any more.
"""

_meetings: Counter[tuple[tuple[str | None, ...], int]] = Counter()
"""How often this process has met how many ranks at a place: what all of them count alike, whoever met elsewhere."""


def _place_to_meet(world: World, timeout: timedelta) -> Any:
    """Return the store that the environment names, the first rank's or an agent's, with names of its own a meeting."""
    import torch.distributed as dist

    listener = os.environ.pop(LISTENER, None)
    if listener is None:
        for name, value in slurm.places(os.environ).items():
            os.environ.setdefault(name, value)
    place = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    if listener is not None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = int(listener) if world.first else None
        _stores[place] = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world.size, world.first, timeout, master_listen_fd=own, use_libuv=True
        )
    elif place not in _stores:
        _stores[place], _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    meeting = (place, world.size)
    _meetings[meeting] += 1
    name = f"meeting-{world.size}-{_meetings[meeting]}"
    return dist.PrefixStore(name, _stores[place])  # type: ignore[attr-defined]
