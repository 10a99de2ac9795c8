"""`rtdetr doctor`: the checks, and what is missing."""

from __future__ import annotations

import os
from importlib import metadata

import pytest

from rtdetr_cli.workflows import doctor as machine


def test_a_machine_with_everything_passes(rtdetr) -> None:
    ran = rtdetr("doctor", "--json", code=0)
    assert ran.json["fit"] is True
    names = {c["name"] for c in ran.json["checks"]}
    assert {"python", "torch", "disk", "memory", "name clash", "processor"} <= names


def test_a_missing_package_is_named_with_the_command_that_installs_it(rtdetr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.NEEDED, "no-such-package", "the test")
    ran = rtdetr("doctor", code=7)
    assert "pip install no-such-package" in ran.out
    assert "this machine is missing: no-such-package" in ran.err


def test_another_package_called_rtdetr_fails_the_check(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "rtdetr-0.6.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rtdetr\nVersion: 0.6.5\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nrtdetr = rtdetr.cli:main\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("rtdetr") == "0.6.5"
    clash = next(c for c in machine.inspect_machine(tmp_path) if c.name == "name clash")
    assert clash.state == "fail"
    assert "python -m rtdetr_cli" in clash.advice


def test_disk_space_is_checked_for_a_folder_that_does_not_exist_yet(tmp_path) -> None:
    disk = next(c for c in machine.inspect_machine(tmp_path / "a" / "b") if c.name == "disk")
    assert disk.state in ("ok", "warn")
    assert str(tmp_path) in disk.result


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_fails_the_check(tmp_path) -> None:
    tmp_path.chmod(0o500)
    disk = next(c for c in machine.inspect_machine(tmp_path) if c.name == "disk")
    assert disk.state == "fail"
    assert disk.missing == f"write access to {tmp_path}"
