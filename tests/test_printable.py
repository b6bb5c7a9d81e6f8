"""Text of others can't steer a terminal."""

from __future__ import annotations

from composer_path.printable import printable, printable_lines


def test_what_steers_a_terminal_is_escaped_and_text_is_not() -> None:
    assert printable("H&E, Kéfir, 印戒 🔬") == "H&E, Kéfir, 印戒 🔬"
    found = printable("\x1b[2J\u202eevil\x07\x9b\u2066\n\udc80")
    assert found == "\\x1b[2J\\u202eevil\\x07\\x9b\\u2066\\n\\udc80"
    assert found.isprintable()


def test_lines_stay_lines() -> None:
    assert printable_lines("a\r\nb\x1b\n") == "a\\r\nb\\x1b\n"
