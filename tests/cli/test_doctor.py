"""`rtdetr doctor`."""

from __future__ import annotations

from importlib import metadata

import pytest

from rtdetr_cli.workflows import doctor as machine


def test_a_fit_machine_is_called_fit(rtdetr) -> None:
    ran = rtdetr("doctor", "--json")
    assert ran.code == 0
    assert ran.json["fit"] is True
    names = {c["name"] for c in ran.json["checks"]}
    assert {"python", "torch", "disk", "memory", "name clash", "processor"} <= names


def test_a_missing_package_fails_with_its_install_line(rtdetr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.NEEDED, "no-such-package", "the test")
    ran = rtdetr("doctor")
    assert ran.code == 7
    assert "pip install no-such-package" in ran.out
    assert "this machine is not fit: no-such-package" in ran.err


def test_the_foreign_package_of_the_same_name_is_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "rtdetr-0.6.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rtdetr\nVersion: 0.6.5\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nrtdetr = rtdetr.cli:main\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("rtdetr") == "0.6.5"
    clash = next(c for c in machine.inspect_machine(tmp_path) if c.name == "name clash")
    assert clash.state == "fail"
    assert "python -m rtdetr_cli" in clash.advice


def test_a_folder_that_is_not_there_is_judged_by_its_parent(tmp_path) -> None:
    disk = next(c for c in machine.inspect_machine(tmp_path / "a" / "b") if c.name == "disk")
    assert disk.state in ("ok", "warn")
    assert str(tmp_path) in disk.found
