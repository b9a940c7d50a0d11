"""The page in a headless Chromium: nothing is wider than a phone, colours are those the reader prefers."""

import json
import re
import shutil
import subprocess

import pytest

from contriever.own_texts.index import Hit
from contriever.own_texts.rendering import Asked, render_passage, render_results

WIDTHS = (320, 390, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "https://example.org/" + "never" * 60
ARABIC = "يبقى الخبز طازجا في صندوق من الخشب أو الفخار"
FRAMES = """<meta name="color-scheme" content="light dark">
<script>
onload = () => document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(frame => {
  const page = frame.contentDocument, style = element => frame.contentWindow.getComputedStyle(element);
  const place = element => element.getBoundingClientRect();
  const arabic = [...page.querySelectorAll('[dir=auto], .text')].filter(e => e.innerText.startsWith('يبقى')).pop();
  return { width: page.documentElement.scrollWidth, cursor: page.forms[0].q.selectionStart,
    dark: parseInt(style(page.body).backgroundColor.slice(4)) < 128, direction: style(arabic).direction,
    marks: page.querySelectorAll('mark').length, tops: new Set([...page.querySelectorAll('.ways button')].map(
      button => place(button).top)).size }}))
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_every_width_and_scheme(tmp_path, scheme):
    hits = [
        Hit(0.5, f"{LONG}.md", 1, f"a > {LONG}", f"bread {LONG}", 0, ((f"{LONG}.txt", 3, 0),)),
        Hit(0.4, "ar.md", 3, "ar", ARABIC, 1),
    ]
    asked = Asked(f"bread {LONG}", "hybrid", 2, 5)
    (tmp_path / "results.html").write_text(render_results(asked, hits, 10, state=LONG))
    (tmp_path / "passage.html").write_text(render_passage(asked, hits, 1, 3, 10))
    frames = [
        f'<iframe src="{name}.html" style="width: {width}px; border: 0"></iframe>'
        for name in ("results", "passage")
        for width in WIDTHS
    ]
    (tmp_path / "all.html").write_text(f"<!doctype html><title></title>{''.join(frames)}{FRAMES}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    flags += [
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [BROWSER, *flags, (tmp_path / "all.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    facts = json.loads(re.search("<title>(.*)</title>", found)[1])
    assert [page["width"] for page in facts] == [*WIDTHS, *WIDTHS]
    for page in facts:
        assert page["cursor"] == len(asked.query) and page["dark"] == (scheme == "dark")
        assert page["direction"] == "rtl" and page["marks"] > 0 and page["tops"] == 1
