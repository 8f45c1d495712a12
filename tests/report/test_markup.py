"""Whatever goes into the page stays text."""

from hypothesis import given
from hypothesis import strategies as st

from opensora.report.markup import Markup, element, escape, join
from tests.report.conftest import parse


@given(st.text())
def test_any_text_comes_back_as_it_was_from_content_and_attribute(text):
    page = parse(element("p", text, title=text))
    # HTML has no control characters, and its parsers turn carriage returns into line feeds.
    shown = "".join(c if c in "\t\n" or ord(c) >= 32 else "\ufffd" for c in text)
    shown = shown.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    assert page.one("p").text == shown
    assert page.one("p").attributes == {"title": shown}


def test_markup_in_text_does_not_become_elements():
    page = parse(element("p", "<script>alert(1)</script>\"'&amp;"))
    assert not page.all("script")
    assert page.one("p").text == "<script>alert(1)</script>\"'&amp;"


def test_what_element_made_is_not_escaped_again():
    page = parse(element("p", element("b", "a & b")))
    assert page.one("p").one("b").text == "a & b"


def test_adding_a_string_to_markup_loses_its_exemption():
    assert join(Markup("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"


def test_lone_surrogates_of_file_names_can_be_written():
    assert escape("\udcff").encode("utf-8").decode() == "\ufffd"


def test_attributes_follow_the_naming_rule():
    made = element("video", class_="a", data_x="1", muted=True, controls=False, poster=None)
    assert made == '<video class="a" data-x="1" muted></video>'


def test_none_leaves_nothing_and_iterables_are_flattened():
    assert join("a", None, ["b", (x for x in ("c", 1))]) == "abc1"


def test_void_elements_are_not_closed():
    assert element("img", alt="x") == '<img alt="x">'
