"""Self-contained HTML pages with embedded images, readable on phones and in dark mode."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em}
img{max-width:100%;height:auto}figcaption,small{opacity:.75;font-size:13px}
.odd{color:light-dark(#a40,#fb6)}.bad{color:light-dark(#b00,#f88);font-weight:600}
code{background:#8882}body{overflow-wrap:anywhere}"""


def document(title: str, body: str, style: str = "", head: str = "") -> str:
    """A whole page.

    Args:
        body: HTML.
        style: CSS in addition to the common one.
        head: HTML that comes before the body, such as scripts.
    """
    about = "<meta charset=utf-8><meta name=viewport content='width=device-width'><link rel=icon href=data:,>"
    head = f"{about}<title>{escape(title)}</title><style>{STYLE}{style}</style>{head}"
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>"


def picture(image: Image.Image, text: str) -> str:
    """An `<img>` of an RGB image, embedded as JPEG.

    Args:
        text: the alternative text.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(text)}" width={image.width} height={image.height} src="data:image/jpeg;base64,{data}">'
