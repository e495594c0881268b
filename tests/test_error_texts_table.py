"""What the package says when something goes wrong stands in one table, which is whole."""

from __future__ import annotations

import error_texts


def test_the_table_is_that_of_the_source() -> None:
    """Texts that were added or changed are read beside the others before they are kept."""
    written = error_texts.TABLE.read_text(encoding="utf-8")

    assert written == error_texts.table(), "run: python tests/error_texts.py"


def test_each_text_says_what_its_reader_shall_do() -> None:
    """Itself, or by its kind; a row without says what nobody can use."""
    assert [row for row in error_texts.rows() if not row.remedy] == []


def test_each_word_that_stands_for_a_remedy_is_used() -> None:
    """A row about a text that is gone hides nothing, and no row is hidden by one before it."""
    rows = error_texts.rows()
    without = [row.text for row in rows if not error_texts.REMEDY.search(row.text)]
    first = {
        next((part for part in error_texts.BY_TEXT if part in text), None) for text in without
    }

    assert set(error_texts.BY_TEXT) - first == set()
    assert set(error_texts.BY_KIND) <= {row.kind for row in rows}
