"""Several processes take the same step as one: same gradients, same weights, no deadlocks. On CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.errors import UsageError
from rtdetr_cli.train.processes import (
    SINGLE_PROCESS,
    ProcessGroup,
    images_per_process,
    join_process_group,
    parse_devices,
)

MEMBER = Path(__file__).with_name("process_group_member.py")
SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, size: int, scenarios: Sequence[Mapping[str, object]]) -> list[list[dict[str, Any]]]:
    """Run `size` processes through scenarios; return what each process saved for each of them."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(MEMBER), str(folder), json.dumps(scenarios)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [
        [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(size)]
        for number in range(len(scenarios))
    ]


def scenario(norms: str, boxes: Sequence[int], fail_at: int = 0, fail_rank: int = 0) -> dict[str, object]:
    return {"norms": norms, "boxes_in": list(boxes), "fail_at": fail_at, "fail_rank": fail_rank}


QUICK = {
    "frozen": scenario("frozen", (3, 1, 0, 6)),
    "live": scenario("live", (3, 1, 0, 6)),
    "a share without boxes": scenario("live", (0, 0, 2, 1)),
    "no boxes": scenario("frozen", (0, 0, 0, 0)),
    "more boxes than queries": scenario("frozen", (0, 0, 0, 300)),
    "out of memory in the forward pass": scenario("live", (3, 1, 0, 6), 1, 1),
    "out of memory in the backward pass": scenario("live", (3, 1, 0, 6), 2, 0),
    "out of memory with frozen norms": scenario("frozen", (3, 1, 0, 6), 1, 1),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return dict(zip(QUICK, run(tmp_path_factory.mktemp("processes"), 2, list(QUICK.values())), strict=True))


def assert_same_step(each: Sequence[Mapping[str, Any]], *, tolerance: float = 1e-9) -> None:
    """Compare the processes with each other, bit for bit, and with a single process, to rounding."""
    alone, first = each[0]["alone"], each[0]["together"]
    for member in (m["together"] for m in each):
        assert member["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            off = float((member["gradients"][name] - expected).abs().max())
            assert off <= tolerance * max(1.0, float(expected.abs().max())), name
            assert torch.equal(member["gradients"][name], first["gradients"][name]), name
        for name, expected in alone["terms"].items():
            assert abs(member["terms"][name] - expected) <= tolerance * max(1.0, abs(float(expected))), name
        assert all(torch.equal(first["state"][name], tensor) for name, tensor in member["state"].items())


@pytest.mark.parametrize("name", [n for n in QUICK if not n.startswith("out of memory")])
def test_two_processes_take_the_same_step_as_one(two: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert_same_step(two[name])
    assert float(two[name][0]["together"]["gradients"]["decoder.dec_score_head.0.weight"].abs().max()) > 1e-6


def test_trained_norms_average_over_both_processes(two: dict[str, list[dict[str, Any]]]) -> None:
    alone, together = two["live"][0]["alone"]["state"], two["live"][0]["together"]["state"]
    running = [name for name in alone if "running" in name]
    assert running
    for name in running:
        assert float((together[name] - alone[name]).abs().max()) < 1e-9, name


@pytest.mark.parametrize("name", ["out of memory in the forward pass", "out of memory in the backward pass"])
def test_out_of_memory_in_one_process_makes_both_retry(two: dict[str, list[dict[str, Any]]], name: str) -> None:
    first, second = (member["together"] for member in two[name])
    assert (first["attempts"], second["attempts"]) == (2, 2)
    assert all(torch.equal(first["gradients"][n], second["gradients"][n]) for n in first["gradients"])


def test_with_frozen_norms_only_the_process_out_of_memory_retries(
    two: dict[str, list[dict[str, Any]]],
) -> None:
    each = two["out of memory with frozen norms"]
    assert [member["together"]["attempts"] for member in each] == [1, 2]
    assert_same_step(each)


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    for each in run(tmp_path, 4, [QUICK["frozen"], QUICK["live"]]):
        assert_same_step(each)


# ---- without processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "devices"),
    [
        ("auto", ("auto",)),
        ("cpu", ("cpu",)),
        ("cpu,cpu", ("cpu", "cpu")),
        ("cpu:3", ("cpu", "cpu", "cpu")),
        ("0", ("cuda:0",)),
        ("0, 1", ("cuda:0", "cuda:1")),
        ("cuda:1,cuda:3", ("cuda:1", "cuda:3")),
        ("cuda", ("cuda:0",)),
    ],
)
def test_devices_are_parsed(setting: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(setting) == devices


@pytest.mark.parametrize("setting", ["", "0,", "gpu", "0,cpu", "cpu:0", "cuda:x", "auto,auto", "-1"])
def test_invalid_devices_are_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_devices(setting)


def test_an_indivisible_batch_is_refused_with_divisible_ones_as_a_hint() -> None:
    assert images_per_process(16, 4) == 4
    with pytest.raises(
        UsageError, match=r"--effective-batch 16 is not divisible by the number of processes \(3\)"
    ) as caught:
        images_per_process(16, 3)
    assert caught.value.hint == "--effective-batch 15 or 18"


def test_a_single_process_needs_no_group() -> None:
    assert join_process_group("cpu") is SINGLE_PROCESS
    batch = Batch(torch.zeros(1, 3, 8, 8), (torch.rand(2, 4),), (torch.tensor([0, 1]),), (0,), ())
    whole = SINGLE_PROCESS.exchange_targets(batch, stop_signal=15, save_due=True)
    assert torch.equal(whole.boxes_cxcywh[0], batch.boxes_cxcywh[0])
    assert (whole.local_rows, whole.stop_signal, whole.save_due, whole.incomplete) == (slice(0, 1), 15, True, False)
    assert SINGLE_PROCESS.exchange_targets(None).incomplete
    assert SINGLE_PROCESS.all_gather(3) == [3]
    assert SINGLE_PROCESS.broadcast(4) == 4
    terms = torch.ones(2)
    assert SINGLE_PROCESS.all_reduce_gradients([], terms) is terms
    assert ProcessGroup().is_main


def test_several_devices_need_several_processes() -> None:
    with pytest.raises(UsageError, match="needs one process for each device"):
        join_process_group("cpu,cpu")


def test_the_number_of_devices_must_be_that_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match="names 3 devices for the 2 processes of this host"):
        join_process_group("cpu:3")
