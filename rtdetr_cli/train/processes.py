"""The processes of one run, and everything that they say to each other.

A run on several devices is several processes that make the same steps. Each reads its share of the effective batch;
the boxes of the whole batch go round before the step (a few kilobytes, on the host), so that every process draws the
same denoising group and divides by the same number of boxes; the gradients are summed after it. So the step is that
of one process with the whole batch, to rounding.

Decisions that a clock or a signal makes - to stop, to save - go round with the boxes: no process ever waits for
another that has decided otherwise. A team of one is the ordinary run and costs nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError

# Rank 0 may draw, export or judge for long while the others wait; a process that died is noticed at once.
TIMEOUT = timedelta(hours=2)
BUCKET_BYTES = 32 * 2**20


class PeerLost(RtdetrError):
    """Another process of the run has ended; what it said is the reason, not this."""

    default_code = "peer-lost"


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What the processes know of a step before they make it.

    Attributes:
        boxes_cxcywh, labels: of the whole effective batch, on the CPU, in the order of ranks.
        mine: the rows of it that are this process's.
        stop: the signal that any process was sent, 0 for none.
        save_due: rank 0 wants a checkpoint after the step.
        broken: a process has no batch: it was stopped inside its loader.
        replaced: (image, reason) of images that any process could not read and has replaced.
    """

    boxes_cxcywh: Sequence[Tensor]
    labels: Sequence[Tensor]
    mine: slice
    stop: int
    save_due: bool
    broken: bool
    replaced: tuple[tuple[int, str], ...] = ()


class ProcessGroup:
    """One process among those of a run.

    Attributes:
        rank, size: of all hosts.
        device: of this process, as it is named on the command line.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, device: str = "auto", shares_device: bool = False) -> None:
        """Describe a process; `join` makes one that can speak to others.

        Args:
            rank: see the class.
            size: see the class.
            device: see the class.
            shares_device: two processes of this host use one GPU, which NCCL refuses.
        """
        self.rank, self.size, self.device = rank, size, device
        self._devices: dist.ProcessGroup | None = None
        if size > 1 and device.startswith("cuda") and not shares_device and dist.is_nccl_available():
            self._devices = dist.new_group(backend="nccl")  # type: ignore[assignment]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    # ---- the host's side ------------------------------------------------------------------------------------------

    def all_gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank. All must call it, as everything below."""
        if not self.distributed:
            return [value]
        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value to rank 0, and an empty list to the others."""
        if not self.distributed:
            return [value]
        found: list[Any] = [None] * self.size
        with _peers():
            dist.gather_object(value, found if self.is_main else None)
        return found if self.is_main else []

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        if not self.distributed:
            return value
        holder = [value]
        with _peers():
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def broadcast_state(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return rank 0's training state: containers and tensors, which go round as a file does, unpickled safely."""
        if not self.distributed:
            assert state is not None
            return state
        buffer = io.BytesIO()
        if self.is_main:
            torch.save(state, buffer)
        size = self.broadcast(buffer.getbuffer().nbytes)
        held = np.frombuffer(buffer.getvalue(), np.uint8).copy() if self.is_main else np.empty(size, np.uint8)
        with _peers():
            dist.broadcast(torch.from_numpy(held), src=0)
        if state is not None:
            return state
        found: dict[str, Any] = torch.load(io.BytesIO(held.tobytes()), map_location="cpu", weights_only=True)
        return found

    def any(self, flag: bool) -> bool:
        """Tell whether any process says so."""
        return max(self._numbers([int(flag)]), default=0) > 0 if self.distributed else flag

    def max(self, number: int) -> int:
        """Return the largest number."""
        return self._numbers([number])[0] if self.distributed else number

    def min(self, number: int) -> int:
        """Return the smallest number."""
        return -self._numbers([-number])[0] if self.distributed else number

    def _numbers(self, values: list[int]) -> list[int]:
        """Return the element-wise maximum."""
        tensor = torch.tensor(values, dtype=torch.int64)
        with _peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(v) for v in tensor.tolist()]

    def exchange_targets(
        self,
        boxes_cxcywh: Sequence[Tensor],
        labels: Sequence[Tensor],
        *,
        images: int,
        stop: int = 0,
        save_due: bool = False,
        broken: bool = False,
        replaced: tuple[tuple[int, str], ...] = (),
    ) -> GlobalBatch:
        """Learn the targets of the whole effective batch, and agree on what follows the step.

        Args:
            boxes_cxcywh: of this process's images, on the CPU.
            labels: likewise.
            images: of each process; the same for all.
            stop: see `GlobalBatch`.
            save_due: see `GlobalBatch`; rank 0's counts.
            broken: see `GlobalBatch`.
            replaced: by this process.
        """
        if not self.distributed:
            return GlobalBatch(boxes_cxcywh, labels, slice(0, len(labels)), stop, save_due, broken, replaced)
        counts = [0] * images if broken else [len(one) for one in labels]
        mine = torch.tensor([stop, int(save_due), int(broken), len(replaced), *counts], dtype=torch.int64)
        heads = torch.empty((self.size, len(mine)), dtype=torch.int64)
        with _peers():
            dist.all_gather(list(heads.unbind()), mine)
        table = heads[:, 4:]
        most = int(table.sum(1).max())
        sent = torch.zeros((self.size, most, 5))
        if most:
            own = torch.zeros((most, 5))
            if sum(counts):
                own[: sum(counts)] = torch.cat([torch.cat(list(boxes_cxcywh)), torch.cat(list(labels))[:, None]], 1)
            with _peers():
                dist.all_gather(list(sent.unbind()), own)
        boxes: list[Tensor] = []
        classes: list[Tensor] = []
        for row, own_counts in zip(sent, table.tolist(), strict=True):
            for part in row[: sum(own_counts)].split(own_counts):
                boxes.append(part[:, :4].contiguous())
                classes.append(part[:, 4].long())  # float32 holds whole numbers up to 16 million
        return GlobalBatch(
            boxes,
            classes,
            slice(self.rank * images, (self.rank + 1) * images),
            stop=int(heads[:, 0].max()),
            save_due=bool(heads[0, 1]),
            broken=bool(heads[:, 2].any()),
            # Rare, and text: only then does it go round.
            replaced=tuple(r for own in self.all_gather(replaced) for r in own) if bool(heads[:, 3].any()) else (),
        )

    # ---- the device's side ----------------------------------------------------------------------------------------

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the processes, in place, without waiting for the device.

        Args:
            tensors: of one dtype, on the device; the same shapes in every process.
        """
        if not self.distributed:
            return
        with _peers():
            pending = []
            for bucket in _buckets(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                pending.append((bucket, flat, dist.all_reduce(flat, group=self._devices, async_op=True)))
            for bucket, flat, work in pending:
                if work is not None:
                    work.wait()
                parts = torch.split(flat, [t.numel() for t in bucket])
                torch._foreach_copy_(list(bucket), [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)])

    def all_reduce_gradients(self, parameters: Sequence[Tensor], terms: Tensor) -> Tensor:
        """Sum the gradients, and the loss terms with them.

        A parameter without a gradient keeps none: which have one depends on the whole batch (a denoising group or
        not), so it is the same ones everywhere.

        Args:
            parameters: those that learn.
            terms: (T,) of this process.

        Returns:
            (T,) of the whole effective batch.
        """
        if not self.distributed:
            return terms
        total = terms.clone()
        self.all_reduce([*(p.grad for p in parameters if p.grad is not None), total])
        return total

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Give rank 0's tensors to all, in place; of any dtype."""
        if not self.distributed:
            return
        with _peers():
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self._devices if tensor.is_cuda else None)

    def check_in_sync(self, tensors: Sequence[Tensor]) -> None:
        """Stop a run whose processes no longer hold the same weights; costs one pass over them.

        Raises:
            RtdetrError: so it is.
        """
        if not self.distributed:
            return
        sums = torch.stack([t.detach().double().sum() for t in tensors]).cpu().numpy().tobytes()
        if len(set(self.all_gather(sums))) > 1:
            raise RtdetrError(
                "the processes of the run no longer hold the same weights",
                hint="the same GPUs and versions on every host; rtdetr train --resume goes on from the last checkpoint",
                code="drift",
            )

    def close(self) -> None:
        """Say goodbye; a process that does not is taken for dead."""
        if self.distributed and dist.is_initialized():
            dist.destroy_process_group()


SINGLE_PROCESS = ProcessGroup()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        bucket.append(tensor)
        held += tensor.nbytes
        if held >= BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


# gloo raises plain RuntimeErrors; its own name is in the path that they begin with.
_WORDS_OF_A_LOST_PEER = ("gloo", "nccl", "connection", "timed out", "socket")


@contextmanager
def _peers() -> Iterator[None]:
    """Turn what torch.distributed raises when a process has died into our error."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(word in said for word in _WORDS_OF_A_LOST_PEER):
            raise
        raise PeerLost("another process of this run has ended; what it said is the reason") from error


# ---- joining ----------------------------------------------------------------------------------------------------


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process was started as one of several, by us or by torchrun."""
    found = os.environ if environment is None else environment
    return int(found.get("WORLD_SIZE", "1")) > 1 and all(k in found for k in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def parse_devices(setting: str) -> tuple[str, ...]:
    """Read `--device`: `auto`, `cpu`, `0`, `0,1`, `cpu,cpu`, or `cpu:4` for four processes.

    Returns:
        A device for each process, as torch names them; `("auto",)` for the first GPU or the CPU.

    Raises:
        UsageError: not a list of devices.
    """
    devices = []
    for word in setting.split(","):
        word = word.strip().lower()
        kind, colon, number = word.partition(":")
        if kind == "cpu" and (not colon or (number.isdecimal() and int(number))):
            devices += ["cpu"] * (int(number) if colon else 1)
        elif word.isdecimal():
            devices.append(f"cuda:{int(word)}")
        elif kind == "cuda" and (not colon or number.isdecimal()):
            devices.append(f"cuda:{int(number or 0)}")
        elif word in ("auto", "mps") and "," not in setting:
            devices.append(word)
        else:
            raise UsageError(
                f"--device {setting}: {word or 'an empty word'!r} is not a device",
                hint="--device auto, cpu, 0 (the first GPU) or 0,1 (two of them, a process each)",
            )
    if len({d.partition(":")[0] for d in devices}) > 1:
        raise UsageError(f"--device {setting} mixes kinds of devices", hint="GPUs only, or cpu only")
    return tuple(devices)


def join_process_group(setting: str) -> ProcessGroup:
    """Become one of the processes that the environment describes; a team of one where it describes none.

    Args:
        setting: of `--device`: one device for each process of this host, or `auto`, or `cpu` for all.

    Raises:
        UsageError: the number of devices is not that of the processes.
        EnvironmentProblem: a device is not there, or the others cannot be reached.
    """
    if not launched():
        if len(parse_devices(setting)) > 1:
            raise UsageError(
                f"--device {setting} needs a process for each device, and this is one",
                hint="rtdetr train starts them itself; torchrun -m rtdetr_cli train ... does as well",
            )
        return SINGLE_PROCESS
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    devices = parse_devices(setting)
    if devices == ("auto",):
        devices = tuple(f"cuda:{i}" for i in range(here)) if torch.cuda.is_available() else ("cpu",)
    if devices == ("cpu",):
        devices = ("cpu",) * here
    if len(devices) != here:
        raise UsageError(
            f"--device {setting} names {len(devices)} for the {here} processes of this host",
            hint="--device auto gives each process the GPU of its local rank",
        )
    device = devices[local]
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(device.partition(":")[2]) >= count:
            raise EnvironmentProblem(
                f"process {local} of this host was to use {device}: torch sees {count} CUDA devices",
                hint=f"--nproc-per-node {count}" if count else "--device cpu, or rtdetr doctor",
            )
        torch.cuda.set_device(device)
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1") and sys.platform == "linux":
        # Else gloo asks for the address of the host's name, which many containers cannot tell.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"process {rank} of {size} cannot reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}",
            hint="the same --master-addr and --master-port on every host, and a firewall that lets them through",
            code="rendezvous",
        ) from error
    return ProcessGroup(rank=rank, size=size, device=device, shares_device=len(set(devices)) < len(devices))


def images_per_process(effective_batch: int, size: int) -> int:
    """Return how many images of the effective batch each of `size` processes has.

    Raises:
        UsageError: it cannot be shared evenly; then the gradients would weigh images differently.
    """
    if effective_batch % size:
        low = effective_batch // size * size
        either = " or ".join(str(n) for n in (low, low + size) if n)
        raise UsageError(
            f"--effective-batch {effective_batch} cannot be shared evenly by {size} processes",
            hint=f"--effective-batch {either}",
            code="batch-clash",
        )
    return effective_batch // size
