# SPDX-License-Identifier: Apache-2.0
"""The forms that an answer can take; how people ask for them stands in `phrases/forms.txt`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import inflect

from . import lexicon
from .tasks import Form, Operation
from .wordings import fill, sections


_ENGLISH = inflect.engine()
_TEXTS = ("word", "name", "phrase")
_SHORT = (*_TEXTS, "number", "letter", "code", "yesno", "foreign")
_ANY = (*_SHORT, "list", "sentence")
_WORDS = ("word", "name")
Write = Callable[[str], str | None]


def _form(name: str, kinds: Sequence[str], write: Write, sense: str | None = None) -> Form:
    return _worded(name, frozenset(kinds), lambda answer, _: write(answer), name, {}, sense=sense)


def _worded(
    name: str,
    kinds: frozenset[str],
    apply: Callable[[str, Operation], str | None],
    section: str,
    slots: dict[str, str],
    *,
    sense: str | None = None,
    languages: tuple[str, ...] = (),
) -> Form:
    """A form with its phrases; their mark says where they can stand."""
    _, lines = sections("forms")[section]
    by_mark: dict[str, list[str]] = {"~": [], "=": [], ">": [], "": []}
    for line in lines:
        mark = line[0] if line[1:2] == " " and line[0] in by_mark else ""
        text = line.removeprefix(f"{mark} ")
        # A tail that begins with a comma joins its noun at once.
        by_mark[mark].append(fill(f" {text}" if mark == "~" and text[0] != "," else text, slots))
    tails, wraps, after, notes = (tuple(by_mark[mark]) for mark in ("~", "=", ">", ""))
    return Form(name, kinds, apply, tails, wraps, notes, after, languages, sense)


def _letters(answer: str) -> bool:
    return re.fullmatch(r"[^\W\d_]+", answer) is not None


def _changed(write: Callable[[str], str]) -> Write:
    return lambda answer: write(answer) if write(answer) != answer else None


def _short_word(longest: int, write: Callable[[str], str]) -> Write:
    return lambda answer: write(answer) if _letters(answer) and 2 <= len(answer) <= longest else None


def _number(answer: str) -> str | None:
    return answer if answer.isdigit() and len(answer) <= 4 else None


def _of_number(write: Callable[[str], str | None]) -> Write:
    return lambda answer: write(answer) if _number(answer) else None


PLAIN = Form("plain", frozenset(_ANY), lambda answer, _: answer)
WRITTEN = (
    _form("capitals", (*_TEXTS, "foreign", "list", "sentence"), _changed(str.upper), "word_uppercase"),
    _form("lowercase", ("name",), _changed(str.lower)),
    _form("first_letter", _TEXTS, lambda answer: answer[0] if answer[0].isalpha() else None, "word_first_letter"),
    _form("last_letter", _TEXTS, lambda answer: answer[-1] if answer[-1].isalpha() else None, "word_last_letter"),
    _form("first_three", _WORDS, lambda a: a[:3] if re.match(r"[^\W\d_]{4}", a) else None, "word_first_three"),
    _form("spelled", _WORDS, _short_word(8, "-".join), "word_spell_hyphens"),
    _form("length", _WORDS, lambda answer: str(len(answer)) if _letters(answer) else None, "word_length"),
    _form(
        "twice",
        (*_TEXTS, "number", "letter", "code", "foreign"),
        lambda answer: f"{answer} {answer}" if len(answer) <= 20 else None,
        "word_twice",
    ),
    _form("quoted", _SHORT, lambda answer: f'"{answer}"', "word_word_in_quotes"),
    _form("brackets", _SHORT, lambda answer: f"({answer})"),
    _form("prefix", _ANY, lambda answer: f"Answer: {answer}"),
    _form("full_sentence", _SHORT, lambda answer: f"The answer is {answer}."),
    _form("exclaimed", _SHORT, lambda answer: f"{answer}!"),
    _form("bold", _SHORT, lambda answer: f"**{answer}**"),
    _form("json", _SHORT, lambda answer: f'{{"answer": "{answer}"}}' if '"' not in answer else None),
    _form("hashtag", _WORDS, lambda answer: f"#{answer}" if _letters(answer) else None),
    _form("backwards", ("word",), _short_word(5, lambda word: word[::-1]), "word_backwards"),
)
# Of answers that are common nouns.
WORD_FORMS = (
    _form("plural", ("noun",), _short_word(20, lambda word: str(_ENGLISH.plural_noun(word))), "plural_form"),
    _form("article", ("noun",), lambda answer: str(_ENGLISH.a(answer)), "article_form"),
)
NUMBER_FORMS = (
    _form("in_words", ("number",), _of_number(lambda n: lexicon.translate("number", n, "en")), "number_words"),
    _form("ordinal", ("number",), _of_number(lambda n: str(_ENGLISH.ordinal(n))), "number_ordinal_digits"),
)


def _in_language(code: str) -> Form:
    name = lexicon.LANGUAGES[code]

    def translate(answer: str, operation: Operation) -> str | None:
        return lexicon.translate(operation.domain, answer, code) if operation.domain else None

    return _worded(f"in_{name.lower()}", frozenset(), translate, "in_language", {"language": name}, languages=(name,))


LANGUAGE_FORMS = {code: _in_language(code) for code in lexicon.LANGUAGES}
FORMS: dict[str, Form] = {
    form.name: form for form in (PLAIN, *WRITTEN, *WORD_FORMS, *NUMBER_FORMS, *LANGUAGE_FORMS.values())
}


def fitting_forms(operation: Operation) -> list[Form]:
    """The forms that suit an operation's answers; plain first, languages last."""
    kinds = {operation.answer}
    if operation.answer == "word" and operation.domain == "thing":
        kinds.add("noun")
    written = [form for form in FORMS.values() if form.kinds & kinds]
    languages = lexicon.languages_of(operation.domain) if operation.domain else ()
    return written + [LANGUAGE_FORMS[code] for code in languages if lexicon.LANGUAGES[code] not in operation.languages]
