"""Self-contained HTML pages: one file that opens from disk, without network, in light and dark mode and on a phone.

Every page extends `templates/base.html`. Names from data are escaped by jinja2's autoescape, and the page's content
security policy forbids loading anything that is not in the file.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure
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
    """Return a page, from a file in `templates/` and its variables, as text that is valid UTF-8."""
    from rtdetr_cli.version import __version__

    text = _environment().get_template(template).render(**{"version": __version__, "title": "rtdetr", **context})
    # File names that are not UTF-8 carry lone surrogates, which no encoding can write.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def figure_svg(figure: Figure, name: str, *, ink: str = "currentColor") -> str:
    """Return a figure as inline SVG without a background, so that it suits dark pages too.

    `name` makes the ids of its elements differ from those of others on the page; the color `ink` becomes the page's
    text color.
    """
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(ink, "currentColor")


def image_uri(image: NDArray[np.uint8], *, max_side: int = 640, quality: int = 78) -> str:
    """Return an image (H, W, 3) as the `data:` URI of a JPEG, scaled down to `max_side` pixels at most."""
    from PIL import Image

    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((max_side, max_side), Image.Resampling.BILINEAR)
    buffer = BytesIO()
    thumbnail.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
