"""The picture of the README shows classes that there are."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import ast_model
import petl

DOCS = Path(__file__).parents[1] / "docs"


def test_the_picture_is_what_its_script_draws():
    drawn = runpy.run_path(str(DOCS / "draw_block.py"))["draw"]()
    assert (DOCS / "block.svg").read_text(encoding="utf-8") == drawn
    ElementTree.fromstring(drawn)  # a browser shows no picture that is no XML
    names = re.findall('class="class"[^>]*>([^<]*)<', drawn)
    assert {"LoRALinear", "Adapted", "PrefixLinear"} <= set(names)
    for name in names:
        assert hasattr(petl, name) or hasattr(ast_model, name), name
