# SPDX-License-Identifier: Apache-2.0
"""The ways in which a prompt is read to tell what it asks: as it stands, undisguised, and part by part."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


# Letters of other scripts that are drawn as Latin ones. Unicode's own list is far longer; these are the common ones.
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕһԁӏвкмнтАВЕКМНОРСТУХІЈЅαορνκιτυΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijshdlbkmhtABEKMHOPCTYXIJSaopvkituABEZHIKMNOPTYX",
)
_DIGITS_AS_LETTERS = str.maketrans("013457@$", "oieastas")
_OTHER_DIGITS = frozenset("2689")
_SPACED_LETTERS = re.compile(r"(?<!\w)(?:[^\W\d_][ .\-_*·]){2,}[^\W\d_](?!\w)")
_SEPARATORS = re.compile(r"[ .\-_*·]")
_SENTENCE_END = re.compile(r"(?<=[.!?;:。！？；])\s*|\n+")
# Longer sentences are read by windows of so many words as well, so that punctuation left out hides nothing.
_WINDOWS = (6, 12)


def views(prompt: str, most_words: int) -> tuple[str, ...]:
    """The texts by which a prompt is judged: itself, itself without disguise, and the sentences and windows of that.

    Args:
        prompt: The prompt.
        most_words: How many words of it are taken apart. What lies behind those that the generator reads, at a token a
            word at the least, has no bearing on the adapter.

    Returns:
        Texts, none twice, the prompt itself first.

    >>> views("Name a river. Speak Spanish.", 64)
    ('Name a river. Speak Spanish.', 'Name a river.', 'Speak Spanish.')
    """
    plain = undisguised(prompt)
    words = plain.split()
    read = plain if len(words) <= most_words else " ".join(words[:most_words])
    sentences = [part.strip() for part in _SENTENCE_END.split(read)][:most_words]  # a token each
    parts = [part for sentence in sentences for part in (sentence, *_windows(sentence.split()))]
    return tuple(dict.fromkeys([prompt, *(text for text in (read, *parts) if text)]))


def undisguised(text: str) -> str:
    """A text without what makes it look other to a machine than to a reader.

    Compatibility forms become plain ones (Unicode's NFKC); invisible characters and marks upon Latin letters go;
    letters that look Latin become Latin; digits within words become the letters that they stand for; letters with
    blanks or signs between them are joined; texts in odd capitals become lower case; blanks are single.

    >>> undisguised("wh\u200bich  p\u0435t d0es h\u0301e k-e-e-p ?")
    'which pet does he keep ?'
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc")
    )
    text = _without_marks(text)
    if any("a" <= c.lower() <= "z" for c in text):  # a text in Cyrillic or Greek stays one
        text = text.translate(_LOOKALIKES)
    text = _SPACED_LETTERS.sub(lambda found: _SEPARATORS.sub("", found.group()), text)
    text = " ".join(map(_in_letters, text.split()))
    capitals = sum(c.isupper() for c in text)
    if 3 * capitals > sum(c.isalpha() for c in text):
        text = text.lower()
    return text


def _in_letters(word: str) -> str:
    """A word with letters for the digits and signs in it that look like some; a number stays one."""
    if not any(c.isalpha() for c in word) or not _OTHER_DIGITS.isdisjoint(word):
        return word
    return word.translate(_DIGITS_AS_LETTERS)


def _without_marks(text: str) -> str:
    kept, after_latin = [], False
    for c in unicodedata.normalize("NFD", text):
        if unicodedata.combining(c):
            if after_latin:
                continue
        else:
            after_latin = "a" <= c.lower() <= "z"
        kept.append(c)
    return unicodedata.normalize("NFC", "".join(kept))


def _windows(words: Sequence[str]) -> list[str]:
    """Windows that overlap by half, of a sentence that is longer than them by half at the least."""
    return [
        " ".join(words[start : start + size])
        for size in _WINDOWS
        if 2 * len(words) >= 3 * size
        for start in range(0, len(words) - size // 2, size // 2)
    ]
