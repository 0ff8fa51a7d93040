"""Reading pages as a browser would, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"img", "meta", "br"}
ADDRESSES = {"src", "href", "srcset", "data", "action", "poster", "background"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Those with a tag, at any depth, in order."""
        found = [child for child in self.children if child.tag == tag]
        return [*found, *(deep for child in self.children for deep in child.all(tag) if deep not in found)]

    @property
    def content(self) -> str:
        """All text in it."""
        return self.text + "".join(child.content for child in self.children)


class Reader(HTMLParser):
    """A tree of elements; an end tag that closes nothing, or something left open, is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def read_page(path: Path) -> Element:
    """The tree of a page that keeps what every report promises: balanced, nothing from outside, no script, pictures
    told in words, tables with heads."""
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is left open"
    root = reader.root
    elements = every(root)
    assert not {"script", "link", "iframe", "object"} & {element.tag for element in elements}
    for element in elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        for name in ADDRESSES & element.attributes.keys():
            address = element.attributes[name]
            wanted = "data:image/" if element.tag == "img" else ("#", "../", "./", "")
            assert address.startswith(wanted) and "//" not in address.partition(",")[0], address
    assert "url(" not in root.all("style")[0].text and "@import" not in root.all("style")[0].text
    assert all(len(image.attributes["alt"]) > 10 for image in root.all("img"))
    assert all(head.attributes["scope"] in ("row", "col") for head in root.all("th"))
    names = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(set(names)) == len(names)
    targets = [link.attributes["href"][1:] for link in root.all("a") if link.attributes["href"].startswith("#")]
    assert set(targets) <= set(names)
    return root


def every(element: Element) -> list[Element]:
    return [element, *(deep for child in element.children for deep in every(child))]


def sections(root: Element) -> dict[str, Element]:
    """By name."""
    return {section.attributes["id"]: section for section in root.all("section")}


def rows(table: Element) -> list[list[str]]:
    return [[cell.content for cell in row.children] for row in table.all("tr")]
