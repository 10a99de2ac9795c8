"""HTML pages: escaping, embedded images, text with flags and code."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from rtdetr_cli.page import image_uri, prose, render_page


def test_page_is_escaped_and_valid_utf8() -> None:
    text = render_page("base.html", title="<script>alert(1)</script> \udce4")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\udce4" in text
    text.encode("utf-8")


def test_missing_variable_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render_page("validate.html")


@pytest.mark.parametrize(("shape", "size"), [((40, 80), (40, 20)), ((20, 10), (10, 20)), ((3000, 2), (1, 40))])
def test_image_is_embedded_and_scaled_down(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (200, 30, 90), np.uint8)
    uri = image_uri(image, max_side=40)
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as embedded:
        assert embedded.size == size
        assert np.abs(np.asarray(embedded).astype(int) - [200, 30, 90]).max() < 6


def test_prose_keeps_flags_on_one_line_marks_code_and_escapes_the_rest() -> None:
    html = str(prose("make <b>new</b> splits of `data.yaml` with --resplit"))
    assert html.endswith('<span style="white-space:nowrap">--resplit</span>')
    assert "&lt;b&gt;new&lt;/b&gt;" in html
    assert "<code>data.yaml</code>" in html
