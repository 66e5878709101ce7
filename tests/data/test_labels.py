"""Class numbers are one numbering over all splits, in the order that the user would expect."""

import pytest

from wegeft_cli.data.labelled.labels import Labels, build_labels
from wegeft_cli.errors import UserError


def test_a_class_that_one_split_lacks_shifts_nothing():
    train, validation = ["295", "627", "975", "1010"], ["295", "1010"]
    labels = build_labels([train, validation])
    assert [labels.number_of(name) for name in validation] == [0, 3]


def test_numbers_as_text_stand_in_their_order_and_gaps_close():
    assert build_labels([["10", "9", "1", "200"]]).names == ("1", "9", "10", "200")


def test_other_names_stand_in_that_of_the_alphabet():
    assert build_labels([["b", "a"], ["c"]]).names == ("a", "b", "c")


def test_a_declared_order_holds_where_it_names_every_class():
    declared = [("not_entailment", "entailment")]
    found = [["entailment"], ["not_entailment"]]
    assert build_labels(found, declared=declared).names == ("not_entailment", "entailment")
    assert build_labels([*found, ["new"]], declared=declared).names[0] == "entailment"


def test_a_declared_class_without_rows_keeps_its_number():
    assert build_labels([["a", "c"]], declared=[("a", "b", "c")]).numbers["c"] == 2


def test_the_base_keeps_its_own_order_of_exactly_these_classes():
    assert build_labels([["yes", "no"]], of_base=("yes", "no")).names == ("yes", "no")
    assert build_labels([["yes", "no"]], of_base=("yes", "no", "x")).names == ("no", "yes")


def test_one_class_alone_is_a_fault():
    with pytest.raises(UserError, match="1 class in all splits: a"):
        build_labels([["a", "a"]])


def test_an_unknown_class_is_named_with_those_known():
    with pytest.raises(UserError, match="'7' is none of the 2") as caught:
        Labels(("5", "6")).number_of("7")
    assert "5, 6" in caught.value.hint
