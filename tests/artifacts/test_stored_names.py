"""Files that lack the model's prefix, or have one more, hold the layers nevertheless."""

import pytest

from wegeft_cli.artifacts.stored_names import match_stored_names, spell_name


@pytest.mark.parametrize("there", ["transformer.h.0.attn", "h.0.attn"])
@pytest.mark.parametrize("name", ["transformer.h.0.attn", "h.0.attn"])
def test_a_layer_is_found_with_and_without_the_prefix(name, there):
    stored = {f"{there}.weight", "wte.weight"}
    assert match_stored_names({name: "weight"}, stored, "transformer") == {name: there}


@pytest.mark.parametrize("stored", [set(), {"h.0.attn.bias"}, {"h.0.attn"}])
def test_what_the_files_do_not_hold_keeps_its_name(stored):
    name = "transformer.h.0.attn"
    assert match_stored_names({name: "weight"}, stored, "transformer") == {name: name}


def test_the_name_as_it_is_comes_first():
    stored = {"transformer.h.weight", "h.weight"}
    assert match_stored_names({"h": "weight"}, stored, "transformer") == {"h": "h"}
    assert spell_name("transformer.h", "transformer")[0] == "transformer.h"
