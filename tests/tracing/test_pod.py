"""Pod metadata: the output of the downward API is read correctly, and a mistake in it is never an
error."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracing.pod import MOST_VALUE, parse_downward, pod_attributes, unquote


def go_quote(text: str) -> str:
    """strconv.Quote for text that Go would not print: everything escaped that may be."""
    simple = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\", "\a": "\\a"}
    return (
        '"'
        + "".join(
            simple.get(c)
            or (
                c
                if " " <= c <= "~"
                else f"\\u{ord(c):04x}"
                if ord(c) < 65536
                else f"\\U{ord(c):08x}"
            )
            for c in text
        )
        + '"'
    )


def test_labels_annotations_and_variables_become_attributes(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text('app="web"\napp.kubernetes.io/part-of="shop"\n')
    (tmp_path / "annotations").write_text(
        'note="two\\nlines \\"quoted\\""\nkubectl.kubernetes.io/last-applied-configuration="{}"'
    )
    environ = {
        "POD_NAME": "web-1",
        "POD_NAMESPACE": "shop",
        "POD_UID": "u",
        "NODE_NAME": "n",
        "POD_IP": "",
        "PATH": "/bin",
    }
    assert pod_attributes(environ, tmp_path) == (
        {
            "k8s.pod.name": "web-1",
            "k8s.namespace.name": "shop",
            "k8s.pod.uid": "u",
            "k8s.node.name": "n",
            "k8s.pod.label.app": "web",
            "k8s.pod.label.app.kubernetes.io/part-of": "shop",
            "k8s.pod.annotation.note": 'two\nlines "quoted"',
        },
        None,
    )


def test_without_a_directory_there_is_nothing_to_warn_of() -> None:
    assert pod_attributes({"POD_NAME": "a"}) == ({"k8s.pod.name": "a"}, None)


def test_what_cannot_be_read_is_one_warning_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("app=web\n")
    found, warning = pod_attributes({"POD_NAME": "a"}, tmp_path)
    assert found == {"k8s.pod.name": "a"}
    assert warning is not None
    assert (
        "labels: line 1: the value is not in double quotes; annotations: No such file or directory"
        in warning
    )
    assert "\n" not in warning


def test_a_huge_file_and_a_huge_value_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(f'a="{"x" * 5000}"')
    (tmp_path / "annotations").write_text("x" * 600_000)
    found, warning = pod_attributes({}, tmp_path)
    assert len(found["k8s.pod.label.a"]) == MOST_VALUE
    assert warning is not None
    assert "annotations: larger than 512 KiB" in warning


@pytest.mark.parametrize(
    ("quoted", "text"),
    [
        ('""', ""),
        (r'"\x41\101\u0041\U00000041"', "AAAA"),
        (r'"\xc3\xa9"', "é"),
        (r'"\xff"', "\ufffd"),
        ('"é"', "é"),
        (r'"a=\"b\""', 'a="b"'),
    ],
)
def test_go_strings_are_unescaped_as_go_does(quoted: str, text: str) -> None:
    assert unquote(quoted) == text


@pytest.mark.parametrize(
    "quoted", ["", '"', "a", '"a', r'"\q"', r'"\"', '"a"b"', r'"\x4"', r'"\777"']
)
def test_what_is_not_a_go_string_is_refused(quoted: str) -> None:
    with pytest.raises(ValueError):
        unquote(quoted)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z./-]{1,20}", fullmatch=True),
        st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_every_value_is_read_back(pairs: dict[str, str]) -> None:
    assert (
        parse_downward("".join(f"{key}={go_quote(value)}\n" for key, value in pairs.items()))
        == pairs
    )


@given(st.text())
def test_any_text_is_pairs_or_a_value_error(text: str) -> None:
    try:
        parse_downward(text)
    except ValueError as error:
        assert "line" in str(error)  # noqa: PT017  (either is right)
