import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.augmentations import dino_views
from dino.main_dino import parse_args
from dino.vision_transformer import vit_micro
from shared.evaluation.neighbours import Gallery
from shared.images.sources import ArraySource
from shared.images.training_data import write_recipes
from shared.pictures import report_page
from tests.tiny_training import trainings


@pytest.fixture(scope="module")
def page(images, tmp_path_factory):
    """The page about a run of DINO that never was; its folder."""
    folder = tmp_path_factory.mktemp("run")
    flags = (
        "--arch vit_micro --patch_size 4 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --epochs 3"
    )
    args = parse_args([*flags.split(), "--data_path", str(images), "--output_dir", str(folder)])
    write_recipes(folder, dino_views((0.4, 1), (0.1, 0.4), 2, 16, 8))
    torch.manual_seed(0)
    teacher = {f"backbone.{name}": value for name, value in vit_micro(4, img_size=16).state_dict().items()}
    torch.save({"teacher": teacher, "args": vars(args), "epoch": 2}, folder / "checkpoint.pth")
    lines = [{"step": step, "epoch": 0, "loss": 5 - step / 10, "ln_k": 5.5, "lr": 0.1} for step in (10, 20)]
    for line in lines:
        line |= {"part_loss": 2 - line["step"] / 125, "share": line["step"] / 125}  # two that differ by 0.08
    lines = [{"step": 0, "epoch": 0, "knn_top1": 30.0}, *lines, {"step": 20, "epoch": 1, "knn_top1": 90.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text('{"epoch": 0}\n')
    (folder / "attempt.json").write_text("{}")
    return report_page.write_page(folder / "checkpoint.pth", vars(args), problems=["step 20: <COLLAPSE>"])


def test_the_page_is_one_small_file_that_asks_for_nothing(page):
    html = page.read_text()
    assert len(html) < 8e6
    assert not re.search(r"https?:|@import|src=\"(?!data:)|href=\"(?!data:|#)", html.partition('id="data"')[0])
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert "1 of 3 epochs, not finished" in html and "step 20: &lt;COLLAPSE&gt;" in html
    assert re.search(r"--patch_size</td>\s*<td>4</td>\s*<td[^>]*>16</td>", html)  # and the default


def test_a_page_that_becomes_too_large_takes_coarser_pictures(page, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert len(report_page.encoded(noise, 20)) < 0.7 * len(report_page.encoded(noise, 80))
    monkeypatch.setattr(report_page, "MOST_BYTES", 1)
    qualities = []
    monkeypatch.setattr(report_page, "encoded", lambda pixels, quality=80: qualities.append(quality) or "data:,")
    report_page.write_page(
        page.with_name("checkpoint.pth"),
        report_page.flags_of_training(torch.load(page.with_name("checkpoint.pth"), weights_only=True)),
    )
    assert {80, 50, 20} <= set(qualities)


OVERLAY = "document.querySelector('#stage canvas').toDataURL()"


def test_a_click_changes_the_map_without_an_error_or_a_request(page, browser):
    browser.open(page.as_uri())
    browser.evaluate("document.getElementById('stage').scrollIntoView()")
    left, top, side = browser.evaluate(
        "(({left, top, width}) => [left, top, width])($('stage').getBoundingClientRect())"
    )
    maps = [browser.evaluate(OVERLAY)]
    for place in (0.1, 0.9):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            browser.mouse(kind, left + place * side, top + 0.1 * side)
        maps.append(browser.evaluate(OVERLAY))
        assert "held" in browser.evaluate("$('where').textContent")
    browser.mouse("mouseMoved", left + 0.5 * side, top + 0.5 * side)  # it is held
    assert len(set(maps)) == 3 and browser.evaluate(OVERLAY) == maps[-1]
    assert browser.evaluate("location.hash") == "#patch=0,3"

    near = browser.evaluate("$('found').innerHTML")
    browser.evaluate("$('queries').querySelectorAll('button')[1].click()")
    assert browser.evaluate("$('found').innerHTML") != near

    problems = [event for event in browser.events if event[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    requests = [values["request"]["url"] for kind, values in browser.events if kind == "Network.requestWillBeSent"]
    assert not problems and [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


def test_the_keyboard_reaches_what_the_mouse_does(page, browser):
    browser.open(page.as_uri())
    browser.evaluate("$('others').querySelector('[tabindex=\"0\"]').focus()")
    browser.key("ArrowRight")
    browser.evaluate("document.activeElement.click()")
    assert browser.evaluate("$('others').querySelectorAll('button')[1].getAttribute('aria-selected')") == "true"
    browser.evaluate("$('stage').focus()")
    before = browser.evaluate(OVERLAY)
    browser.key("ArrowLeft")
    assert browser.evaluate(OVERLAY) != before
    card = browser.evaluate("$('card').innerHTML")
    browser.evaluate("$('dots').focus()")
    for name in ("ArrowLeft", "ArrowUp", "ArrowRight"):
        browser.key(name)
    assert browser.evaluate("$('card').innerHTML") != card


def test_a_chart_makes_no_difference_of_a_loss_look_larger_than_it_is(page, browser):
    browser.open(page.as_uri())
    paths = {
        name: [float(place.split()[1]) for place in path[1:].split("L")]
        for name, path in browser.evaluate(
            "[...document.querySelectorAll('.chart')].map((chart) => "
            "[chart.querySelector('b').textContent, chart.querySelector('path').getAttribute('d')])"
        )
    }
    height = paths["share"][0] - paths["share"][1]  # all but the margins of 6 percent
    assert paths["part_loss"][1] - paths["part_loss"][0] == pytest.approx(0.08 * 1.12 * height, abs=0.2)
    lines = [{"step": step, "knn_top1": 50.0 + step / 100, "rankme": 7.0 + step / 100} for step in (0, 100)]
    knn, rank = report_page.charts(lines, report_page.measures(lines, 100, 4, "--lr"))
    assert (knn["least"], rank["least"]) == (10, 0)


# of the text that can be seen, what has less contrast with its ground than WCAG 2.2 asks for, 4.5
POOR_CONTRAST = """
(() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const style = getComputedStyle(node);
    const has_text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!has_text || !node.getClientRects().length || style.visibility === "hidden") continue;
    let up = node;
    while (up && parts(getComputedStyle(up).backgroundColor)[3] < 255) up = up.parentElement;
    const ground = up ? parts(getComputedStyle(up).backgroundColor) : parts("Canvas");
    const ink = parts(node instanceof SVGElement ? style.fill : style.color);
    const front = ink.map((v, i) => (v * ink[3] + ground[i] * (255 - ink[3])) / 255);
    const [low, high] = [luminance(front), luminance(ground)].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) poor.push(node.textContent.trim().slice(0, 40));
  }
  return poor;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_on_its_ground(page, browser, scheme):
    media = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[media])
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
    browser.open(page.as_uri())
    is_dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 20)"
    assert is_dark == (scheme == "dark") and browser.evaluate(POOR_CONTRAST) == []
    browser.evaluate("document.querySelector('h1').style.color = '#888'")
    assert len(browser.evaluate(POOR_CONTRAST)) == (scheme == "light")  # 3.5 on paper, 5.2 on black
    browser.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_link_leads_to_a_state_and_nothing_is_wider_than_the_window(page, browser, width):
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.open(page.as_uri() + "#patch=1,5")
    assert browser.evaluate("$('where').textContent") == "row 2, column 2, held"
    assert browser.evaluate("$('others').querySelectorAll('button')[1].getAttribute('aria-selected')") == "true"
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("[...document.images].every((image) => image.alt && image.complete)")


@pytest.mark.parametrize("name", [name for name, run in trainings().items() if run.module.count(".") == 1])
def test_the_folder_of_a_run_is_known_by_its_flags(name):
    script = importlib.import_module(trainings()[name].module)
    found = report_page.find_script(report_page.defaults_of(script))
    assert Path(found.__file__).parent == Path(script.__file__).parent


def test_maps_and_tokens_of_square_grids_are_patches():
    tokens = torch.randn(2, 1 + 25, 8)
    torch.testing.assert_close(report_page.as_grid(tokens, 2), tokens[:, 1:].view(2, 5, 5, 8))
    maps = torch.randn(2, 8, 4, 6)
    torch.testing.assert_close(report_page.as_grid(maps, 2)[:, 3, 5], maps[:, :, 3, 5])
    for coarse in (torch.randn(2, 8, 2, 2), torch.randn(2, 10, 8), torch.randn(2, 8), torch.randn(3, 26, 8)):
        assert report_page.as_grid(coarse, 2) is None


def test_measures_have_two_standard_errors_and_a_verdict():
    lines = [{"step": 0, "knn_top1": 50.0, "pixels_knn_top1": 40.0}, {"step": 99, "knn_top1": 80.0}]
    lines += [{"step": 99, "recall_at_1": 30.0, "recall_at_10": 40.0, "recall_chance": 1.0, "rankme": 7.0}]
    knn, recall, recall_at_10, rank = report_page.measures(lines, 100, 4, "--lr")
    assert knn["values"] == [
        ("random weights", 50, pytest.approx(10)),
        ("raw pixels", 40, pytest.approx(9.8, abs=0.05)),
        ("trained", 80, pytest.approx(8.1, abs=0.05)),
    ]
    assert (knn["verdict"], knn["chance"]) == ("learned", 25)
    (from_weights, *_) = report_page.measures(lines, 100, 4, "--lr", report_page.start_of({"finetune": "a.pth"}))
    assert from_weights["values"][0][0] == "the weights of --finetune"
    assert recall["values"] == [("trained", 30, pytest.approx(9.2, abs=0.05))] and recall["chance"] == 1
    assert recall_at_10["values"] == [("trained", 40, pytest.approx(9.8, abs=0.05))] and recall_at_10["chance"] == 10
    assert rank["values"] == [("trained", 7, 0)] and rank["chance"] is None and rank["verdict"] == ""


def test_copies_are_near_duplicates_and_equal_features_are_none():
    vectors = torch.nn.functional.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[7] = vectors[3]
    source = ArraySource("few", np.arange(60 * 64, dtype=np.uint8).reshape(60, 8, 8))
    gallery = Gallery(source, range(60), vectors)
    found = report_page.near_duplicates(gallery, vectors, report_page.Pictures())
    assert [group["paths"] for group in found["duplicates"]] == [["few[3]", "few[7]"]] and found["num_groups"] == 1
    equal = report_page.near_duplicates(gallery, vectors[:1].expand(60, 16), report_page.Pictures())
    assert equal["threshold"] is None and not equal["duplicates"]


def test_a_page_without_its_images_has_the_rest(page, tmp_path):
    for name in ("checkpoint.pth", "metrics.jsonl", "log.txt", "attempt.json"):
        shutil.copy(page.with_name(name), tmp_path)
    flags = report_page.flags_of_training(torch.load(tmp_path / "checkpoint.pth", weights_only=True)) | {
        "data_path": "/no/such/folder"
    }
    html = report_page.write_page(tmp_path / "checkpoint.pth", flags).read_text()
    assert "/no/such/folder: no such file or folder" in html and '"title": "loss"' in html
