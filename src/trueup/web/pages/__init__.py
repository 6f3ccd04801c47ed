"""The pages, each a module that registers itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trueup.web.view import View

Build = Callable[["View"], Awaitable[None] | None]


@dataclass(frozen=True)
class Page:
    """A page: its address, the key of its title, its icon, its place in the menu; or the page it is `below`."""

    path: str
    title: str
    icon: str
    order: int
    below: str | None
    build: Build

    @property
    def menu(self) -> bool:
        """Whether it has an entry of its own in the menu."""
        return self.below is None


PAGES: dict[str, Page] = {}


def page(
    path: str, *, icon: str, order: int, below: str | None = None, title: str | None = None
) -> Callable[[Build], Build]:
    """Register a function that builds a page. The title is the word `<module>.title` unless another key is given.

    `below`: the address of the menu's page that this one is reached from; it has no entry of its own then.
    """

    def register(build: Build) -> Build:
        key = title or f"{build.__module__.rpartition('.')[2]}.title"
        PAGES[path] = Page(path, key, icon, order, below, build)
        return build

    return register


def discover() -> list[Page]:
    """Every page there is, in the menu's order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(PAGES.values(), key=lambda page: (page.order, page.path))
