"""J10: axe-core finds nothing serious on any page, in either theme; narrow pages do not overflow."""

from __future__ import annotations

import pytest

pytest.importorskip("nicegui")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

from playwright.sync_api import expect  # noqa: E402

from trueup.web.pages import discover  # noqa: E402

ADDRESSES = [page.path for page in discover() if page.menu] + ["/run/evil", "/runs?runs=evil", "/data/dpo_zh_demo"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_fault(harmful, make_page, theme: str):
    page, found = make_page(harmful, theme=theme), []
    for address in ADDRESSES:
        page.goto(harmful.url + address)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        if "run" in address:
            expect(page.locator(".chart svg, .q-table").first).to_be_visible()
        said = axe.Axe().run(page).response["violations"]
        found += [
            f"{address}: {one['id']}: {node['html'][:200]}"
            for one in said
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("address", ["/run/evil", "/runs?runs=evil", "/data/dpo_zh_demo"])
def test_nothing_is_wider_than_a_small_phone(harmful, make_page, address: str):
    page = make_page(harmful, width=360)
    page.goto(harmful.url + address)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
