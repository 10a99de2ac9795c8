"""Imports run one way; import-linter sees those hidden inside functions too."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_imports_run_one_way(monkeypatch, capsys) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    status = lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out
