"""The HTML that a page is made of: elements, pictures, tables, and how figures are written."""

from collections.abc import Iterable, Sequence
from html import escape

from dsc.figures import heat_sheet

MATRIX_SIDE = 20  # above it a matrix is a picture


def el(name: str, *children: str, **attributes: str | int) -> str:
    """An element around children that are HTML; attributes are escaped, `class_` is `class` and `_` a hyphen."""
    written = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(str(v))}"' for k, v in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"


def img(uri: str, alt: str, width: int, height: int, class_: str) -> str:
    """A picture made of data, shown pixel by pixel."""
    size = f'width="{width}" height="{height}"'
    return f'<img class="pixels {class_}" src="{uri}" alt="{escape(alt)}" {size}>'


def scrolling(inner: str, label: str, class_: str = "scroll") -> str:
    """A box that scrolls by itself, with the keyboard too."""
    return el("div", inner, class_=class_, role="region", aria_label=label, tabindex=0)


def table(caption: str, head: Iterable[str], rows: Iterable[Sequence[str]], class_: str = "") -> str:
    """A table of plain text; the first cell of a row names it."""
    top = el("thead", el("tr", *(el("th", escape(cell), scope="col") for cell in head)))
    body = [el("tr", el("th", escape(row[0]), scope="row"), *(el("td", escape(c)) for c in row[1:])) for row in rows]
    return scrolling(el("table", top, el("tbody", *body), class_=class_), caption)


def number(value: float | None, digits: int = 4) -> str:
    """A figure as short as it is exact to a few digits; an empty cell for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10 ** (1 - digits) else f"{value:.1e}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in per cent."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def matrix(
    caption: str, corner: str, rows: list[str], columns: list[str], shares: list[list[float]], cells: list[list[str]]
) -> str:
    """A table whose cells are the fuller the larger their share; of many rows or columns a picture."""
    if max(len(rows), len(columns)) > MATRIX_SIDE:
        return img(heat_sheet(shares), f"{caption}: {corner}", len(columns), len(rows), "sheet")
    head = el("tr", el("th", escape(corner), scope="col"), *(el("th", escape(name), scope="col") for name in columns))
    body = []
    for name, line, texts in zip(rows, shares, cells, strict=False):
        colored = [_cell(share, text) for share, text in zip(line, texts, strict=True)]
        body.append(el("tr", el("th", escape(name), scope="row"), *colored))
    return scrolling(el("table", el("thead", head), el("tbody", *body), class_="matrix"), caption)


def _cell(share: float, text: str) -> str:
    if text == "0":
        return el("td", "0", class_="zero")
    strong = share > 0.5  # either pale or dark: text is legible on both, and would not be between them
    shade = 0.6 + 0.4 * share if strong else 0.04 + 0.6 * share
    return el("td", escape(text), class_="strong" if strong else "weak", style=f"--share:{shade:.3f}")
