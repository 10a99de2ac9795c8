"""Self-contained HTML pages: one file that opens from disk, without network, in light and dark mode and on a phone.

Every page extends `templates/base.html`. Names from data are escaped by jinja2's autoescape, and the page's content
security policy forbids loading anything that is not in the file.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment
    from markupsafe import Markup
    from numpy.typing import NDArray

_FLAG = re.compile(r"--[a-z][a-z-]*")
_CODE = re.compile(r"`([^`]+)`")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rtdetr_cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": True}
    return environment


def prose(text: str) -> Markup:
    """Return escaped text in which backticks mark code, and which browsers don't break after the hyphens of a flag."""
    from markupsafe import Markup, escape

    with_code = _CODE.sub(r"<code>\1</code>", str(escape(text)))
    return Markup(_FLAG.sub(r'<span style="white-space:nowrap">\g<0></span>', with_code))


def render_page(template: str, **context: Any) -> str:
    """Return a page as text that is valid UTF-8.

    Args:
        template: a file in `templates/`.
        context: the variables of the template; `title` is the page's title.
    """
    from rtdetr_cli.version import __version__

    text = _environment().get_template(template).render(**{"version": __version__, "title": "rtdetr", **context})
    # File names that are not UTF-8 carry lone surrogates, which no encoding can write.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def image_uri(image: NDArray[np.uint8], *, max_side: int = 640, quality: int = 78) -> str:
    """Return an image as the `data:` URI of a JPEG.

    Args:
        image: (H, W, 3) uint8 RGB.
        max_side: pixels of the longer side; larger images are scaled down.
        quality: of the JPEG, from 1 to 95.
    """
    from PIL import Image

    thumbnail = Image.fromarray(image)
    scale = max_side / max(thumbnail.size)
    if scale < 1:
        size = (max(1, round(thumbnail.width * scale)), max(1, round(thumbnail.height * scale)))
        thumbnail = thumbnail.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = BytesIO()
    thumbnail.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
