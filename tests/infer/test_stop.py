"""The stop scanner against its specification: cut at the first completed stop string, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.infer.stop import StopScanner


def scan(stops: list[str], pieces: list[str]) -> list[str]:
    scanner = StopScanner(stops)
    out = [scanner.push(piece) for piece in pieces]
    return [*out, scanner.finish()]


def cut(stops: list[str], text: str) -> str:
    """The slow definition: grow the text a character at a time until it ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


def test_a_possible_beginning_is_held_back_until_it_is_decided():
    assert scan(["\nUser:"], ["Hello\nUs", "er: more", "x"]) == ["Hello", "", "", ""]
    assert scan(["\nUser:"], ["Hello\nUs", "ing", "\n"]) == ["Hello", "\nUsing", "", "\n"]
    assert scan([], ["a", "b"]) == ["a", "b", ""]


def test_the_stop_string_completed_first_wins():
    assert scan(["abcd", "bc"], ["abcd"]) == ["a", ""]
    assert scan(["abc", "bc"], ["xabc"]) == ["x", ""]


def test_a_false_start_inside_a_stop_string_is_not_missed():
    assert "".join(scan(["aab"], list("aaab!"))) == "a"


@pytest.mark.parametrize("stop", ["", 3])
def test_an_empty_stop_string_is_refused(stop: object):
    with pytest.raises(ConfigError, match="at least one character"):
        StopScanner([stop])  # type: ignore[list-item]


few = st.text("abé", max_size=12)


@given(st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), st.lists(few, max_size=6))
def test_the_outcome_depends_on_the_text_alone(stops: list[str], pieces: list[str]):
    text = "".join(pieces)
    out = scan(stops, pieces)
    assert "".join(out) == cut(stops, text)
    assert "".join(scan(stops, list(text))) == cut(stops, text)
