"""Names of image files: paths that leave the dataset, and names in another case."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from rtdetr_cli.checks.doctor import examine


@pytest.mark.parametrize("decode", [True, False])
def test_a_link_in_another_case_may_not_leave_the_dataset(coco: Any, decode: bool) -> None:
    target = coco.folder.parent / "elsewhere.jpg"
    shutil.move(coco.image, target)
    coco.image.with_name("TRAIN_0.jpg").symlink_to(target)
    codes = {f.code for f in examine(coco.write(), decode=decode).findings}
    assert {"image-name-case", "image-elsewhere"} <= codes


def test_an_image_in_the_root_folder_is_not_one_in_the_dataset(coco: Any) -> None:
    shutil.copy(coco.image, coco.folder / "train_0.jpg")
    coco.train["images"][0]["file_name"] = "/train_0.jpg"
    finding = next(f for f in examine(coco.write(), images=coco.folder).findings if f.severity == "error")
    assert (finding.code, finding.message) == ("image-missing", "/train_0.jpg is not in /")
