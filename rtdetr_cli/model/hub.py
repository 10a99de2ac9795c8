"""Published weights: where they come from, where they are kept, and that they are what they say.

A file is looked for in the cache first, then fetched from the mirror or the official release. The two files whose
hashes are publicly known are held to them; of any other the first download's hash is recorded in `hashes.json`, and
every later copy is held to that. Nothing is fetched unless a command needs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.errors import ModelError, RtdetrError

HOME_VARIABLE = "RTDETR_CLI_HOME"
MIRROR_VARIABLE = "RTDETR_CLI_MIRROR"
RELEASES = "https://github.com/lyuwenyu/storage/releases/download"


@dataclass(frozen=True, slots=True)
class Published:
    """One published file: what it is, the release that holds it, and its sha256 where that is known."""

    file: str
    what: str
    release: str = "v0.1"
    sha256: str = ""
    size: int = 0

    @property
    def url(self) -> str:
        """Address of the file: the mirror's when one is set, else the official release's."""
        mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
        return f"{mirror}/{self.file}" if mirror else f"{RELEASES}/{self.release}/{self.file}"


def _catalogue() -> dict[str, Published]:
    files = [
        Published(
            "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth",
            "r18, COCO, AP 0.481",
            release="v0.2",
            sha256="2ace52184b620204004509b72752ac7bfe64aadaf7fc1d076b18df8ab5a5c77e",
            size=81_198_974,
        ),
        Published("rtdetrv2_r34vd_120e_coco_ema.pth", "r34, COCO, AP 0.499"),
        Published("rtdetrv2_r50vd_m_7x_coco_ema.pth", "r50m, COCO, AP 0.519"),
        Published("rtdetrv2_r50vd_6x_coco_ema.pth", "r50, COCO, AP 0.534"),
        Published("rtdetrv2_r101vd_6x_coco_from_paddle.pth", "r101, COCO, AP 0.543"),
        Published("rtdetrv2_r18vd_dsp_3x_coco.pth", "r18 discrete, COCO, AP 0.474"),
        Published("rrtdetrv2_r34vd_dsp_1x_coco.pth", "r34 discrete, COCO, AP 0.492"),
        Published("rtdetrv2_r50vd_m_dsp_3x_coco.pth", "r50m discrete, COCO, AP 0.514"),
        Published("rtdetrv2_r50vd_dsp_1x_coco.pth", "r50 discrete, COCO, AP 0.529"),
        Published("rtdetrv2_r18vd_sp1_120e_coco.pth", "r18 with 1 sampling point a scale, COCO, AP 0.473"),
        Published("rtdetrv2_r18vd_sp2_120e_coco.pth", "r18 with 2 sampling points a scale, COCO, AP 0.477"),
        Published("rtdetrv2_r18vd_sp3_120e_coco.pth", "r18 with 3 sampling points a scale, COCO, AP 0.478"),
        Published(
            "ResNet18_vd_pretrained_from_paddle.pth",
            "r18 backbone, ImageNet",
            sha256="911a745b62e173c8f4b9af513c2ea295428cf23f1bbfe9048381500f140fd720",
            size=44_878_642,
        ),
        Published("ResNet34_vd_pretrained_from_paddle.pth", "r34 backbone, ImageNet"),
        Published("ResNet50_vd_ssld_v2_pretrained_from_paddle.pth", "r50 and r50m backbone, ImageNet"),
        Published("ResNet101_vd_ssld_pretrained_from_paddle.pth", "r101 backbone, ImageNet"),
    ]
    return {p.file: p for p in files}


PUBLISHED: Mapping[str, Published] = _catalogue()


def weights_folder() -> Path:
    """Return the folder of the cache: `$RTDETR_CLI_HOME/weights`, or the user's cache folder."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home) / "weights"
    import platformdirs

    return Path(platformdirs.user_cache_dir("rtdetr-cli", appauthor=False)) / "weights"


def published(file: str) -> Published:
    """Return the catalogue's entry of one file name.

    Raises:
        ModelError: no such file was published.
    """
    if file not in PUBLISHED:
        import difflib

        close = difflib.get_close_matches(file, PUBLISHED, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ModelError(
            f"no published file is called {file}{meant}", hint="rtdetr weights list", code="weights-unknown"
        )
    return PUBLISHED[file]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(file: str) -> str:
    """Return the hash that a file is held to, or "" when none is known yet."""
    entry = PUBLISHED.get(file)
    return entry.sha256 if entry and entry.sha256 else _recorded().get(file, "")


def verify(file: str, path: Path) -> str:
    """Hold a file to its hash and return the hash; the first one seen is recorded.

    Raises:
        ModelError: the hash is another one.
    """
    found, expected = file_sha256(path), expected_sha256(file)
    if expected and found != expected:
        raise ModelError(
            f"{path} is not the published {file}: its sha256 is {found[:12]}..., expected {expected[:12]}...",
            hint=f"rtdetr weights fetch {file} --force",
            code="weights-hash",
        )
    if not expected:
        _record(file, found)
    return found


def fetch(file: str, *, force: bool = False, progressbar: bool = False) -> Path:
    """Return the path of a published file, fetched once and hash-checked.

    Args:
        file: a name of `PUBLISHED`.
        force: fetch it again although it is there.
        progressbar: show the download on stderr.

    Raises:
        ModelError: unknown file, no network, or a wrong hash (the wrong file is not kept).
        RtdetrError: the cache cannot be written.
    """
    entry = published(file)
    path = weights_folder() / file
    if path.is_file() and not force:
        return path
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.ERROR)
    url = entry.url
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = expected_sha256(file)
        fetched = Path(
            pooch.retrieve(
                url,
                known_hash=f"sha256:{expected}" if expected else None,
                fname=file + ".part",
                path=path.parent,
                downloader=pooch.HTTPDownloader(progressbar=progressbar, timeout=30),
            )
        )
    except requests.exceptions.RequestException as error:
        raise ModelError(
            f"{file} could not be fetched from {url}: {_reason(error)}",
            hint=f"fetch it by other means, then: rtdetr weights import {file} (or set {MIRROR_VARIABLE})",
            code="weights-network",
        ) from error
    except ValueError as error:  # pooch's word for a wrong hash; it has removed the file
        raise ModelError(
            f"{url} did not give the published {file}: its sha256 is not {expected[:12]}...",
            hint="the download is damaged or the mirror holds another file; nothing was kept",
            code="weights-hash",
        ) from error
    except OSError as error:
        raise RtdetrError(f"the weights folder {path.parent} cannot be written: {error.strerror}") from error
    if not expected:
        _record(file, file_sha256(fetched))
    os.replace(fetched, path)
    return path


def import_file(source: Path) -> Path:
    """Copy a file that was fetched by other means into the cache, held to its hash.

    Raises:
        ModelError: it is missing, its name is unknown, or its hash is wrong.
    """
    if not source.is_file():
        raise ModelError(f"{source} does not exist", code="weights-missing")
    entry = published(source.name)
    verify(entry.file, source)
    path = weights_folder() / entry.file
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    shutil.copyfile(source, aside)
    os.replace(aside, path)
    return path


def _reason(error: Exception) -> str:
    """Return one short clause of a network error."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    kind = type(error).__name__
    return {"ConnectionError": "no connection", "ConnectTimeout": "no answer", "ReadTimeout": "no answer"}.get(
        kind, kind
    )


def _recorded() -> dict[str, str]:
    path = weights_folder() / "hashes.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=f"remove {path}", code="weights-hashes") from error
    return {str(k): str(v) for k, v in values.items()}


def _record(file: str, sha256: str) -> None:
    folder = weights_folder()
    folder.mkdir(parents=True, exist_ok=True)
    known = {**_recorded(), file: sha256}
    aside = folder / "hashes.json.part"
    aside.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(aside, folder / "hashes.json")
