"""The few pieces of HTML that a report is made of; `text` and `element`, which make it of strings, escape them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from PIL import Image

EMBEDDED_BYTES = 1_500_000  # a larger PNG goes into a page as JPEG
JPEG_QUALITY = 92
LEAST_WIDTH = 720  # CSS pixels of a wide picture
VOID = ("img", "meta", "br")

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #d0d0d0; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 60rem; }
p.facts { color: #444; overflow-wrap: anywhere; }
p.warning { border-left: 4px solid #b2182b; padding-left: .6rem; overflow-wrap: anywhere; }
a { color: #0b4f9e; }
nav { margin: .75rem 0; }
nav a { display: inline-block; margin-right: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody th { font-weight: 600; }
@media (min-width: 50rem) { tbody th { white-space: nowrap; } }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td.words { min-width: 12rem; overflow-wrap: anywhere; }
td.short { white-space: nowrap; }
.figures { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: .5rem 0; min-width: 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figure.wide { overflow-x: auto; }
figcaption { color: #444; font-size: .9rem; max-width: 60rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: #0b4f9e; }
summary:focus-visible, a:focus-visible, .scroll:focus-visible, figure:focus-visible { outline: 2px solid #0b4f9e; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .scroll, figure.wide { overflow: visible; }
  nav { display: none; } figure.wide img { min-width: 0 !important; } }
""".strip()


class Html(str):
    """Markup. Strings from outside become it through `text` alone; what is joined to it by other means is a string."""


def text(value: object) -> Html:
    """Anything, as text of a page; markup stays what it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def element(tag: str, *content: Html, **attributes: str) -> Html:
    """`<tag attribute="...">content</tag>`; attributes are escaped. `class_` and `aria_label` are Python's spelling."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for name, value in attributes.items()
    )
    if tag in VOID:
        return Html(f"<{tag}{said}>")
    return Html(f"<{tag}{said}>{''.join(content)}</{tag}>")


def paragraph(words: str, class_: str = "") -> Html:
    return element("p", text(words), **({"class_": class_} if class_ else {}))


def section(title: str, name: str, *content: Html) -> Html:
    """A part of the page with a heading; empty where it has no content, so that it is not told of."""
    if not any(content):
        return Html("")
    return element("section", element("h2", text(title)), join(part for part in content if part), id=name)


def folded(title: str, *content: Html) -> Html:
    return element("details", element("summary", text(title)), join(content))


def link(address: str, words: str) -> Html:
    return element("a", text(words), href=address)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str | Html]], *, words: Sequence[int] = (), short: Sequence[int] = ()
) -> Html:
    """A table whose first column names the rows; the columns `words` hold text, `short` text that is kept on one line,
    all others numbers."""
    head = [element("th", text(name), scope="col", **_kind(place, words, short)) for place, name in enumerate(header)]
    lines = [_row(row, words, short) for row in rows]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", join(lines)))
    return element("div", whole, class_="scroll", tabindex="0")


def _row(values: Sequence[str | Html], words: Sequence[int], short: Sequence[int]) -> Html:
    first = element("th", text(values[0]), scope="row")
    rest = [element("td", text(value), **_kind(place, words, short)) for place, value in enumerate(values[1:], 1)]
    return element("tr", first, *rest)


def _kind(place: int, words: Sequence[int], short: Sequence[int]) -> dict[str, str]:
    if place == 0:
        return {}
    return {"class_": "words" if place in words else "short" if place in short else "number"}


def picture(data: bytes, description: str, caption: str = "", *, scale: float = 1.0, wide: bool = False) -> Html:
    """A PNG within the page.

    Args:
        description: what those read who do not see it.
        scale: its size on the page, in CSS pixels for each of its own; less where the page is narrower.
        wide: on a narrow page it is scrolled rather than made illegible.
    """
    width, height = (round(scale * size) for size in Image.open(io.BytesIO(data)).size)
    least = {"style": f"min-width: {min(width, LEAST_WIDTH)}px"} if wide else {}
    shown = element("img", src=data_uri(data), alt=description, width=str(width), height=str(height), **least)
    parts = [shown, element("figcaption", text(caption))] if caption else [shown]
    return element("figure", *parts, **({"class_": "wide", "tabindex": "0"} if wide else {}))


def data_uri(png: bytes) -> str:
    """A PNG as it is; a large one as JPEG, which holds grids of noisy samples in a quarter of the bytes."""
    kind = "png"
    if len(png) > EMBEDDED_BYTES:
        smaller = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(smaller, format="JPEG", quality=JPEG_QUALITY)
        png, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(png).decode()}"


def page(title: str, content: Iterable[Html], **facts: str) -> bytes:
    """A whole document that asks for nothing from outside; `facts` are kept as meta elements."""
    metas = [element("meta", name=name, content=value) for name, value in facts.items()]
    head = [
        element("meta", charset="utf-8"),
        *metas,
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", text(title)),
        element("style", Html(STYLE)),
    ]
    body = element("body", element("main", join(part for part in content if part)))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{join(head)}\n</head>\n{body}\n</html>\n'.encode()


def relative(path: Path, start: Path) -> str:
    """The address of a file, as a page in the directory `start` tells it."""
    return quote(Path(relpath(path, start)).as_posix())
