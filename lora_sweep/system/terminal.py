"""What reaches a person's terminal: texts that came from outside, without the power to command it."""

import sys
import unicodedata


def printable(text: str) -> str:
    """The text with every character that a terminal would obey made visible: escapes, control and bidi characters.

    Of control characters only line feed and tab stay; the others become the sign that Unicode has for them (ESC:
    U+241B). Halves of surrogate pairs (names that are no UTF-8) and invisible formatting become U+FFFD, but for the
    joiners that scripts need.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def complain(message: object) -> None:
    """One message on stderr, printable."""
    print(printable(str(message)), file=sys.stderr)


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\n\t\u200c\u200d":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # Cc: C1 controls, among them the 8-bit CSI; Cf: bidi overrides and what else cannot be seen; Cs: surrogates.
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character
