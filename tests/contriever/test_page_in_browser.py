"""The page in a headless Chromium: nothing is wider than a phone, colours are those the reader prefers."""

import pytest

from contriever.own_texts.index import Hit
from contriever.own_texts.rendering import Asked, render_passage, render_results

LONG = "https://example.org/" + "never" * 60
ARABIC = "يبقى الخبز طازجا في صندوق من الخشب أو الفخار"
FACTS = """(() => {
  const style = element => getComputedStyle(element);
  const arabic = [...document.querySelectorAll('[dir=auto], .text')].filter(e => e.innerText.startsWith('يبقى')).pop();
  const tops = [...document.querySelectorAll('.ways button')].map(button => button.getBoundingClientRect().top);
  return { width: document.documentElement.scrollWidth, cursor: document.forms[0].q.selectionStart,
    dark: parseInt(style(document.body).backgroundColor.slice(4)) < 128, direction: style(arabic).direction,
    is_marked: document.querySelectorAll('mark').length > 0, rows_of_buttons: new Set(tops).size }
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_pages_fit_every_width_and_scheme(width, scheme, tmp_path, browser):
    hits = [
        Hit(0.5, f"{LONG}.md", 1, f"a > {LONG}", f"bread {LONG}", 0, ((f"{LONG}.txt", 3, 0),)),
        Hit(0.4, "ar.md", 3, "ar", ARABIC, 1),
    ]
    asked = Asked(f"bread {LONG}", "hybrid", 2, 5)
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    expected = {"width": width, "cursor": len(asked.query), "dark": scheme == "dark", "direction": "rtl"}
    for page in (render_results(asked, hits, 10, state=LONG), render_passage(asked, hits, 1, 3, 10)):
        (tmp_path / "page.html").write_text(page)
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.evaluate(FACTS) == expected | {"is_marked": True, "rows_of_buttons": 1}
