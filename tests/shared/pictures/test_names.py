"""Names of files and classes are drawn as they are, whatever they hold."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import Tile, save_sheet

NAMES = {
    "$5_$10": "$5_$10",
    "a_$b": "a_$b",
    "caf\udce9": "caf\ufffd",  # Latin-1, as Python reads the name of such a folder
    "\U00013000": "\\u13000",  # a hieroglyph, which few machines have a font for
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_a_sheet_shows_a_name_as_it_is(name, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    save_sheet([[Tile(pixels, name, name)]], tmp_path / "sheet.png", f"{name}\n{name}")
    assert [text.get_text() for text in figures[0].texts] == [NAMES[name]] * 4
    save_panels([Panel("loss", "step", "nats", [Curve([1, 2], [2, 1])])], tmp_path / "curves.png", name)
    assert figures[1].get_suptitle() == NAMES[name]
