"""Reading documents: YAML 1.2's core schema, no repeated keys, no anchors, aliases or tags, and
every mistake with its position."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.settings.document import SHOWN, DocumentError, Mistakes, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: no", {"a": "no"}),
        ("a: 22:30", {"a": "22:30"}),
        (
            "a: '1'\nb: 1\nc: 0x10\nd: 1.5\ne:\nf: true",
            {"a": "1", "b": 1, "c": 16, "d": 1.5, "e": None, "f": True},
        ),
        ("[1, [2, {a: []}]]", [1, [2, {"a": []}]]),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("1: x", {"1": "x"}),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    assert load(text, "f") == value


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: 1\na: 2", "a: the same key twice (line 2)"),
        ("a:\n  - b: 1\n    b: 1", "a[0].b: the same key twice (line 3)"),
        ("a: &x 1", "a: anchors (&name) and tags (!name) are not supported (line 1)"),
        ("a: &x 1\nb: *x", "b: aliases (*name) are not supported: write the value out (line 2)"),
        ("a: !!int 3", "a: tags (!name) are not supported (line 1)"),
        ("- 1\n---\n- 2", "line 2: a second document in the same file"),
    ],
)
def test_likely_mistakes_are_reported_with_path_and_line(text: str, mistake: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load(text, "f")
    assert mistake in caught.value.mistakes


@pytest.mark.parametrize(
    "text", ["a: [", "\t- a", "a: \x00", "? [1]: 2\n: 3", "[" * 40 + "]" * 40, "%YAML 9.9\n---\n-"]
)
def test_what_is_not_yaml_is_one_error_that_names_the_source(text: str) -> None:
    with pytest.raises(DocumentError, match=r"^file\.yaml: "):
        load(text, "file.yaml")


def test_a_hostile_alias_bomb_is_refused_and_not_unfolded() -> None:
    layers = ["a0: &a0 [x, x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)
    ]
    with pytest.raises(DocumentError):
        load("\n".join(layers), "f")


def test_mistakes_are_bounded_and_the_rest_is_counted() -> None:
    mistakes = Mistakes()
    for number in range(SHOWN + 7):
        mistakes.add(f"a[{number}]", "wrong")
    assert len(mistakes.found()) == SHOWN + 1
    assert mistakes.found()[-1] == "and 7 more"


# JSON writes characters above U+FFFF as two escapes, which YAML does not join.
_TEXT = st.text(st.characters(max_codepoint=0xD7FF), max_size=20)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(_PLAIN)
def test_json_is_read_as_json_reads_it(value: object) -> None:
    assert load(json.dumps(value), "f") == value


@given(st.text())
def test_any_text_is_a_value_or_a_document_error(text: str) -> None:
    try:
        load(text, "f")
    except DocumentError as error:
        assert error.mistakes  # noqa: PT017  (either is right)
