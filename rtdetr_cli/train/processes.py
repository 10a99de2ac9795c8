"""The processes of one run, and everything that they exchange.

Each process reads its share of the effective batch. The boxes of the whole batch are exchanged before the step, so that
every process draws the same denoising group and divides by the same number of boxes; the gradients are summed after
it. The step is that of one process with the whole batch, to rounding.

DistributedDataParallel would sum the gradients during the backward pass. That rules out running a step again: when one
process runs out of memory, the others are already waiting in a reduction that it never joins.

Decisions that depend on a clock or a signal (to save, to stop) travel with the boxes, so no process ever waits for
another that has decided otherwise. In a run of one process all of this does nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.text import whole_number

# The main process may draw, export or evaluate for long while the others wait. A process that dies is noticed at once.
TIMEOUT = timedelta(hours=2)
BUCKET_BYTES = 32 * 2**20  # of gradients that are summed in one operation


class PeerLost(RtdetrError):
    """Another process of the run has ended, and its error is the reason."""

    default_code = "peer-lost"


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What the processes tell each other before a step; the targets are on the CPU, in the order of ranks."""

    boxes_cxcywh: Sequence[Tensor]
    labels: Sequence[Tensor]
    local_rows: slice  # this process's images among them
    replaced: tuple[tuple[int, str], ...]  # (image, reason) of images that could not be read
    stop_signal: int  # that any process received, 0 for none
    save_due: bool  # the main process wants a checkpoint after the step
    incomplete: bool  # a process has no batch because it was stopped inside its loader


class ProcessGroup:
    """One process among those of a run, on all hosts.

    All methods that communicate must be called by all processes, in the same order. With `shares_device`, two
    processes of this host use one GPU, which NCCL refuses.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, device: str = "auto", shares_device: bool = False) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._nccl: dist.ProcessGroup | None = None
        if size > 1 and device.startswith("cuda") and not shares_device and dist.is_nccl_available():
            self._nccl = dist.new_group(backend="nccl")  # type: ignore[assignment]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    def all_gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        with _peer_errors():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value."""
        if not self.distributed:
            return value
        values = [value]
        with _peer_errors():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_state(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return the main process's training state; pickle alone fails on tensors loaded from a checkpoint."""
        if not self.distributed:
            assert state is not None
            return state
        buffer = io.BytesIO()
        if self.is_main:
            torch.save(state, buffer)
        content: bytes = self.broadcast(buffer.getvalue())
        received: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return received

    def exchange_targets(self, batch: Batch | None, *, stop_signal: int = 0, save_due: bool = False) -> GlobalBatch:
        """Learn the targets of the whole effective batch, and agree on what follows the step.

        `batch` is None if this process was stopped inside its loader.
        """
        # Arrays are much faster to pickle than tensors.
        boxes = [one.numpy() for one in batch.boxes_cxcywh] if batch is not None else []
        labels = [one.numpy() for one in batch.labels] if batch is not None else []
        replaced = batch.replaced if batch is not None else ()
        parts = self.all_gather((boxes, labels, replaced, stop_signal, save_due, batch is None))
        first = sum(len(part[0]) for part in parts[: self.rank])
        return GlobalBatch(
            boxes_cxcywh=[torch.from_numpy(one) for part in parts for one in part[0]],
            labels=[torch.from_numpy(one) for part in parts for one in part[1]],
            local_rows=slice(first, first + len(boxes)),
            replaced=tuple(r for part in parts for r in part[2]),
            stop_signal=max(part[3] for part in parts),
            save_due=parts[0][4],
            incomplete=any(part[5] for part in parts),
        )

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors on the device over the processes, in place, without waiting for the device."""
        if not self.distributed:
            return
        with _peer_errors():
            pending = []
            for bucket in _take_tensors(tensors, BUCKET_BYTES):  # type: ignore[no-untyped-call]
                flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
                pending.append((bucket, flat, dist.all_reduce(flat, group=self._nccl, async_op=True)))
            for bucket, flat, work in pending:
                if work is not None:
                    work.wait()
                sums = _unflatten_dense_tensors(flat, bucket)  # type: ignore[no-untyped-call]
                torch._foreach_copy_(bucket, list(sums))

    def all_reduce_gradients(self, parameters: Sequence[Tensor], terms: Tensor) -> Tensor:
        """Sum the gradients over the processes in place, and return the sum of the loss terms, (T,).

        Which parameters have a gradient depends on the whole batch only (on whether there is a denoising group), so it
        is the same ones in every process.
        """
        if not self.distributed:
            return terms
        total = terms.clone()
        self.all_reduce([*(p.grad for p in parameters if p.grad is not None), total])
        return total

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Copy the main process's tensors to all, in place; any dtype."""
        if not self.distributed:
            return
        with _peer_errors():
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self._nccl if tensor.is_cuda else None)

    def check_in_sync(self, tensors: Sequence[Tensor]) -> None:
        """Stop a run whose processes no longer hold the same weights; costs one pass over them.

        Raises:
            RtdetrError: code `drift`.
        """
        if not self.distributed:
            return
        sums = torch.stack([t.detach().double().sum() for t in tensors]).cpu().numpy().tobytes()
        if len(set(self.all_gather(sums))) > 1:
            raise RtdetrError(
                "the processes of the run no longer hold the same weights",
                hint="use the same GPUs and versions on every host, then rtdetr train --resume continues from the last "
                "checkpoint",
                code="drift",
            )

    def close(self) -> None:
        """Leave the group; the others take a process that does not for dead."""
        if self.distributed and dist.is_initialized():
            dist.destroy_process_group()


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn what torch.distributed raises when a process has died into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, with its own name in the path that their message begins with.
        message = str(error).lower()
        words = ("gloo", "nccl", "connection", "timed out", "socket")
        if not isinstance(error, dist.DistError) and not any(word in message for word in words):
            raise
        raise PeerLost("another process of this run has ended; its error is the reason") from error


# ---- joining ----------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Return whether this process was started as one of several, by us or by torchrun."""
    named = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return named and int(os.environ.get("WORLD_SIZE", "1")) > 1


def parse_devices(setting: str) -> tuple[str, ...]:
    """Read `--device`: `auto`, `cpu`, `0`, `0,1`, `cpu,cpu`, or `cpu:4` for four processes.

    Returns:
        One device for each process, as torch names them; `("auto",)` for the first GPU or the CPU.

    Raises:
        UsageError: not a list of devices.
    """
    devices = []
    for word in setting.split(","):
        word = word.strip().lower()
        kind, colon, digits = word.partition(":")
        number = whole_number(digits, digits=4) if colon else None
        if kind == "cpu" and (number or not colon):
            devices += ["cpu"] * (number or 1)
        elif (index := whole_number(word, digits=4)) is not None:
            devices.append(f"cuda:{index}")
        elif kind == "cuda" and (number is not None or not colon):
            devices.append(f"cuda:{number or 0}")
        elif word in ("auto", "mps") and "," not in setting:
            devices.append(word)
        else:
            raise UsageError(
                f"--device {setting}: {word!r} is not a device" if word else f"--device {setting}: a device is missing",
                hint="--device auto, cpu, 0 (the first GPU) or 0,1 (two GPUs, one process each)",
            )
    if len({d.partition(":")[0] for d in devices}) > 1:
        raise UsageError(f"--device {setting} mixes kinds of devices", hint="use GPUs only, or cpu only")
    return tuple(devices)


def join_process_group(setting: str) -> ProcessGroup:
    """Join the processes that the environment describes; return a single process if it describes none.

    Args:
        setting: of `--device`: one device for each process of this host, or `auto`, or `cpu` for all.

    Raises:
        UsageError: the number of devices is not that of the processes.
        EnvironmentProblem: a device does not exist, or the other processes cannot be reached.
    """
    devices = parse_devices(setting)
    if not launched():
        if len(devices) > 1:
            raise UsageError(
                f"--device {setting} needs one process for each device, and this is a single process",
                hint="rtdetr train starts the processes itself; so does torchrun -m rtdetr_cli train ...",
            )
        return SINGLE_PROCESS
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if devices == ("auto",):
        devices = tuple(f"cuda:{i}" for i in range(local_size)) if torch.cuda.is_available() else ("cpu",)
    if devices == ("cpu",):
        devices = ("cpu",) * local_size
    if len(devices) != local_size:
        raise UsageError(
            f"--device {setting} names {len(devices)} devices for the {local_size} processes of this host",
            hint="--device auto gives each process the GPU of its local rank",
        )
    device = devices[local_rank]
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(device.partition(":")[2]) >= count:
            raise EnvironmentProblem(
                f"process {local_rank} of this host needs {device}, but torch sees {count} CUDA devices",
                hint=f"--nproc-per-node {count}" if count else "--device cpu, or rtdetr doctor",
            )
        torch.cuda.set_device(device)
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1") and sys.platform == "linux":
        # gloo would look up the address of the host's name, which many containers cannot resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"process {rank} of {size} cannot reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}",
            hint="pass the same --master-addr and --master-port on every host, and open the port in the firewall",
            code="rendezvous",
        ) from error
    return ProcessGroup(rank=rank, size=size, device=device, shares_device=len(set(devices)) < len(devices))


def images_per_process(effective_batch: int, size: int) -> int:
    """Return how many images of the effective batch each of `size` processes has.

    Raises:
        UsageError: it is not divisible; gradients of an uneven share would weigh images differently.
    """
    if effective_batch % size:
        low = effective_batch // size * size
        either = " or ".join(str(n) for n in (low, low + size) if n)
        raise UsageError(
            f"--effective-batch {effective_batch} is not divisible by the number of processes ({size})",
            hint=f"--effective-batch {either}",
            code="batch-clash",
        )
    return effective_batch // size
