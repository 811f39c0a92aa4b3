# SPDX-License-Identifier: Apache-2.0
"""The forms that an answer can take, each with the ways in which people ask for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import inflect

from . import lexicon
from .tasks import Form, Operation


_ENGLISH = inflect.engine()
_TEXTS = ("word", "name", "phrase")
_SHORT = (*_TEXTS, "number", "letter", "code", "yesno", "foreign")
_ANY = (*_SHORT, "list", "sentence")


def _form(name: str, kinds: Sequence[str], write: Callable[[str], str | None], **wordings: Sequence[str]) -> Form:
    return Form(
        name, frozenset(kinds), lambda answer, _: write(answer), **{key: tuple(v) for key, v in wordings.items()}
    )


def _spelled(separator: str) -> Callable[[str], str | None]:
    return lambda answer: separator.join(answer) if re.fullmatch(r"[^\W\d_]{2,8}", answer) else None


def _letters(answer: str) -> bool:
    return re.fullmatch(r"[^\W\d_]+", answer) is not None


def _short_word(answer: str, write: Callable[[str], str]) -> str | None:
    return write(answer) if _letters(answer) and 3 <= len(answer) <= 8 else None


def _number(answer: str) -> int | None:
    return int(answer) if answer.isdigit() and len(answer) <= 4 else None


PLAIN = Form("plain", frozenset(_ANY), lambda answer, _: answer)


def _changed(write: Callable[[str], str]) -> Callable[[str], str | None]:
    return lambda answer: write(answer) if write(answer) != answer else None


WRITTEN = (
    _form(
        "capitals",
        (*_TEXTS, "foreign", "list", "sentence"),
        _changed(str.upper),
        tails=(
            " in capital letters", " in capitals", ", all in upper case", " in uppercase", ", in block capitals",
            " in ALL CAPS", ", written in capitals throughout", " with every letter capitalised",
        ),
        notes=(
            "Use capital letters only.", "Write the answer in capitals.", "The answer must be in upper case.",
            "Answer in block capitals.", "ALL CAPS, please.", "No lower-case letters in your answer.",
            "I want the reply in capital letters.", "Keep caps lock on while you answer.",
            "Every letter of the answer should be a capital.", "Please shout your answer in capitals.",
        ),
        after=("Put it in capitals.", "Write it in upper case.", "Make it all caps.", "Then convert it to uppercase."),
    ),
    _form(
        "lowercase",
        ("name",),
        _changed(str.lower),
        tails=(
            " in lower case", " in small letters", ", all in lowercase", " without any capital letters",
            ", written in lower-case letters only", " with no capitals", " in lowercase letters", ", uncapitalised",
        ),
        notes=(
            "Use small letters only.", "Write the answer in lowercase.", "No capital letters in the answer.",
            "Answer in lower case, names included.", "The reply should be all lowercase.",
            "Don't capitalise anything.", "I want the answer in small letters.", "Lowercase only, please.",
        ),
        after=("Put it in lower case.", "Write it without capitals.", "Make it all lowercase.", "Keep it in small letters."),
    ),
    _form(
        "first_letter",
        _TEXTS,
        lambda answer: answer[0] if answer[0].isalpha() else None,
        wraps=(
            "the first letter of {np}", "only the first letter of {np}", "the initial letter of {np}",
            "the letter that {np} begins with", "just the initial of {np}", "the opening letter of {np}",
            "the letter at the start of {np}", "the very first letter of {np}",
        ),
        notes=(
            "Give the first letter of the answer and nothing more.", "Answer with the initial letter only.",
            "I only need the first letter of the answer.", "Your answer should be a single letter: the first one.",
            "Just the first letter of your answer will do.", "Reply with the answer's first letter alone.",
            "Shorten the answer to its first letter.", "The answer's initial is enough.",
        ),
        after=(
            "Write down its first letter only.", "What letter does it begin with?", "Give me just its initial.",
            "Only the letter it starts with.",
        ),
    ),
    _form(
        "last_letter",
        _TEXTS,
        lambda answer: answer[-1] if answer[-1].isalpha() else None,
        wraps=(
            "the last letter of {np}", "only the last letter of {np}", "the final letter of {np}",
            "the letter that {np} ends with", "just the closing letter of {np}", "the letter at the end of {np}",
            "the very last letter of {np}", "the letter in which {np} ends",
        ),
        notes=(
            "Give the last letter of the answer and nothing more.", "Answer with the final letter only.",
            "I only need the last letter of the answer.", "Your answer should be a single letter: the last one.",
            "Just the final letter of your answer will do.", "Reply with the answer's last letter alone.",
            "Cut the answer down to its last letter.", "The letter on which the answer ends is enough.",
        ),
        after=(
            "Write down its last letter only.", "What letter does it end with?", "Give me just its final letter.",
            "Only the letter it ends in.",
        ),
    ),
    _form(
        "first_three",
        ("word", "name"),
        lambda answer: answer[:3] if re.match(r"[^\W\d_]{4}", answer) else None,
        wraps=(
            "the first three letters of {np}", "only the first three letters of {np}",
            "the three letters that {np} begins with", "a three-letter abbreviation of {np}",
            "the opening three letters of {np}", "{np}, cut to three letters,",
            "the three letters at the start of {np}", "{np} shortened to its first three letters",
        ),
        notes=(
            "Cut the answer off after three letters.", "Answer with the first three letters only.",
            "I only need the first three letters of the answer.", "Abbreviate the answer to three letters.",
            "Shorten the answer to its first three letters.", "Three letters are enough: the first three of the answer.",
            "Keep just the answer's first three letters.", "Stop after the third letter.",
        ),
        after=("Give only its first three letters.", "Then cut it to three letters.", "Just the first three letters of it.",
               "Abbreviate it to three letters."),
    ),
    _form(
        "spelled",
        ("word", "name"),
        _spelled("-"),
        tails=(
            ", spelled out with hyphens between the letters", " spelled letter by letter with hyphens",
            ", with a hyphen between every two letters", ", its letters joined by hyphens",
            " spelled out l-i-k-e t-h-i-s", ", hyphenated letter by letter", " with dashes between its letters",
            ", one letter at a time with hyphens in between",
        ),
        notes=(
            "Spell the answer out with hyphens.", "Put a hyphen between the letters of your answer.",
            "The answer must be spelled l-i-k-e t-h-i-s.", "Separate the letters of the answer with dashes.",
            "Spell your answer letter by letter, with hyphens.", "Write the answer with a dash between all letters.",
            "I want the answer spelled out, hyphens between letters.", "Answer letter-by-letter, using hyphens.",
        ),
        after=("Spell it with hyphens.", "Spell it out, hyphens between the letters.", "Put dashes between its letters.",
               "Write it letter by letter with hyphens."),
    ),
    _form(
        "length",
        ("word", "name"),
        lambda answer: str(len(answer)) if _letters(answer) else None,
        wraps=(
            "the number of letters in {np}", "the tally of letters in {np}", "the length of {np}",
            "the letter count of {np}", "the length in letters of {np}", "the count of letters in {np}",
            "the number of letters that make up {np}", "the number of characters in {np}",
        ),
        notes=(
            "Don't write the answer itself, only how many letters it has.", "Answer with the number of its letters.",
            "Instead of the answer give its length in letters.", "I only want to know how many letters the answer has.",
            "Reply with the letter count of the answer, as a number.", "Count the letters of the answer and give that number.",
            "Just the answer's length, in digits.", "Give a number: how many letters the answer has.",
        ),
        after=("How many letters does it have?", "Tell me how many letters that is.", "Then count its letters and reply with the number.",
               "Give only its length."),
    ),
    _form(
        "twice",
        (*_TEXTS, "number", "letter", "code", "foreign"),
        lambda answer: f"{answer} {answer}" if len(answer) <= 20 else None,
        tails=(
            " twice", ", written twice", " two times in a row", ", repeated once", " twice in a row", ", twice over",
            " two times, with a space in between", ", and then once more",
        ),
        notes=(
            "Write the answer twice.", "Repeat your answer once.", "The answer should be given two times.",
            "Say the answer twice, with a space in between.", "Give the answer two times in a row.",
            "I want to see the answer twice.", "Double your answer: write it two times.", "Give the same answer two times over.",
        ),
        after=("Write it twice.", "Say it two times.", "Repeat it once.", "Then say it again."),
    ),
    _form(
        "quoted",
        _SHORT,
        lambda answer: f'"{answer}"',
        tails=(
            " in quotation marks", " in double quotes", ", between quotation marks", " in quotes",
            ", with quotes around it", ", wrapped in double quotes", " inside quotation marks", ", quoted",
        ),
        notes=(
            "Put the answer in quotation marks.", "Use double quotes around your answer.", "The answer must be quoted.",
            "Wrap the answer in quotes.", "Your reply should stand between double quotation marks.",
            "Answer in quotes.", "Quote your answer.", "I need quotation marks around the answer.",
        ),
        after=("Put it in quotes.", "Place quotation marks around it.", "Wrap it in double quotes.", "Quote it."),
    ),
    _form(
        "brackets",
        _SHORT,
        lambda answer: f"({answer})",
        tails=(
            " in brackets", " in parentheses", ", between round brackets", ", with brackets around it",
            ", wrapped in parentheses", " inside parentheses", ", bracketed", " within round brackets",
        ),
        notes=(
            "Put the answer in brackets.", "Use parentheses around your answer.", "The answer must be in round brackets.",
            "Wrap the answer in parentheses.", "Your reply should stand between brackets.", "Answer in parentheses.",
            "Bracket your answer.", "I need round brackets around the answer.",
        ),
        after=("Put it in brackets.", "Place parentheses around it.", "Wrap it in round brackets.", "Bracket it."),
    ),
    _form(
        "prefix",
        _ANY,
        lambda answer: f"Answer: {answer}",
        tails=(
            " after the word 'Answer:'", ", starting with 'Answer:'", ", preceded by 'Answer:'", ", with 'Answer:' in front",
            ", introduced by 'Answer:'", " behind the label 'Answer:'", ", beginning with 'Answer:'", ", prefixed with 'Answer:'",
        ),
        notes=(
            "Begin with 'Answer:'.", "Start your reply with the word 'Answer:'.", "Use the format 'Answer: ...'.",
            "Your reply should have the form 'Answer: ...'.", "Put 'Answer:' before the answer.",
            "Always open with 'Answer:'.", "Label the answer with 'Answer:'.", "The line must begin with 'Answer:'.",
        ),
        after=("Put 'Answer:' in front of it.", "Write 'Answer:' before it.", "Prefix it with 'Answer:'.", "Label it 'Answer:'."),
    ),
    _form(
        "full_sentence",
        _SHORT,
        lambda answer: f"The answer is {answer}.",
        tails=(
            " in a sentence that begins 'The answer is'", ", as 'The answer is ...'", " in the form 'The answer is ...'",
            ", in a full sentence starting with 'The answer is'", ", opening with the words 'The answer is'",
            " using the words 'The answer is ...'", ", phrased as 'The answer is ...'", " with 'The answer is' before it and a full stop after it",
        ),
        notes=(
            "Reply with a sentence: 'The answer is ...'", "Answer in a full sentence that begins with 'The answer is'.",
            "Say 'The answer is' first, and close with a full stop.", "Phrase it as 'The answer is ...'.",
            "Use the sentence 'The answer is ...'.", "Write a complete sentence starting 'The answer is'.",
            "Your reply reads 'The answer is ...'.", "I'd like a whole sentence: 'The answer is ...'.",
        ),
        after=("Put it in the sentence 'The answer is ...'.", "Say it as 'The answer is ...'.",
               "Give it in a full sentence, 'The answer is ...'.", "Embed it in 'The answer is ...'."),
    ),
    _form(
        "exclaimed",
        _SHORT,
        lambda answer: f"{answer}!",
        tails=(
            " with an exclamation mark", ", followed by an exclamation mark", ", with an exclamation point at the end",
            " and end with an exclamation mark", ", closing with '!'", ", ending in an exclamation mark", " plus an exclamation mark",
            ", with '!' after it",
        ),
        notes=(
            "End with an exclamation mark.", "Put an exclamation mark after the answer.", "Your answer must end in '!'.",
            "Finish the answer with an exclamation point.", "Add '!' to the answer.", "Close your answer with an exclamation mark.",
            "Sound excited: an exclamation mark after the answer.", "The answer is followed by '!'.",
        ),
        after=("Put an exclamation mark after it.", "Add '!' to it.", "End it with an exclamation point.", "Follow it with '!'."),
    ),
    _form(
        "bold",
        _SHORT,
        lambda answer: f"**{answer}**",
        tails=(
            " in bold", ", in Markdown bold", ", in bold type (Markdown)", ", with two asterisks on either side", ", made bold with asterisks",
            " between double asterisks", ", bolded", " in **bold**",
        ),
        notes=(
            "Write the answer in bold.", "Use Markdown bold for the answer.", "The answer must be in bold type.",
            "Put double asterisks around your answer.", "Bold your answer, Markdown style.", "Format the answer in bold.",
            "The reply should be set in **bold**.", "Surround the answer with two asterisks on each side.",
        ),
        after=("Make it bold.", "Put it in Markdown bold.", "Set it in bold.", "Put two asterisks on either side of it."),
    ),
    _form(
        "json",
        _SHORT,
        lambda answer: f'{{"answer": "{answer}"}}' if '"' not in answer else None,
        tails=(
            " as JSON with the key \"answer\"", ", in JSON under the key \"answer\"", " as a JSON object with one field, \"answer\"",
            ", as {\"answer\": ...}", " in a JSON object, key \"answer\"", ", formatted as JSON (\"answer\")", ", JSON-encoded under \"answer\"",
            " in the JSON field \"answer\"",
        ),
        notes=(
            "Answer in JSON, with the key \"answer\".", "Return a JSON object with the single key \"answer\".",
            "The output is JSON: {\"answer\": ...}.", "Reply only with JSON of the form {\"answer\": ...}.",
            "Use JSON; the key is \"answer\".", "Your reply will be parsed as JSON: one key, \"answer\".",
            "Format: {\"answer\": \"...\"}.", "Respond with a JSON object holding \"answer\".",
        ),
        after=("Wrap it in JSON under \"answer\".", "Return it as {\"answer\": ...}.", "Give it as JSON, key \"answer\".",
               "Put it into the JSON field \"answer\"."),
    ),
    _form(
        "hashtag",
        ("word", "name"),
        lambda answer: f"#{answer}" if _letters(answer) else None,
        tails=(
            " as a hashtag", ", with a hash sign in front", ", written as a hashtag", ", preceded by '#'", " in the form of a hashtag",
            ", hashtag style", ", with '#' before it", " turned into a hashtag",
        ),
        notes=(
            "Write the answer as a hashtag.", "Put '#' in front of the answer.", "The answer must be a hashtag.", "Use a hashtag for your answer.",
            "Reply with a hashtag.", "I want to post the answer as a hashtag.", "Begin the answer with a hash sign.",
            "Your answer is a hashtag, so start with '#'.",
        ),
        after=("Make it a hashtag.", "Put a hash sign before it.", "Turn it into a hashtag.", "Write it with '#' in front."),
    ),
    _form(
        "backwards",
        ("word",),
        lambda answer: _short_word(answer, lambda word: word[::-1]) if len(answer) <= 5 else None,
        tails=(
            " backwards", ", spelled backwards", " in reverse", ", written from back to front", ", with its letters in reverse order",
            ", reversed letter by letter", " from the last letter to the first", ", spelled the wrong way round",
        ),
        notes=(
            "Spell the answer backwards.", "Write your answer from back to front.", "Reverse the letters of the answer.",
            "The answer must be written backwards.", "Give the answer's letters in reverse order.", "Answer backwards, last letter first.",
            "I'd like the answer spelled in reverse.", "Turn the answer around, letter by letter.",
        ),
        after=("Spell it backwards.", "Write it in reverse.", "Reverse its letters.", "Then turn it back to front."),
    ),
)  # fmt: skip


def _plural(word: str) -> str | None:
    return _ENGLISH.plural_noun(word) or None if word.isalpha() and word.islower() else None


WORD_FORMS = (
    _form(
        "plural",
        ("noun",),
        _plural,
        tails=(" in the plural", ", in its plural form", " as a plural", ", made plural", ", pluralised", " in plural form",
               ", as if there were several of them", ", with the plural ending"),
        wraps=("the plural of {np}", "the plural form of {np}", "what you call two or more of {np}", "the word for several of {np}"),
        notes=("Use the plural.", "Answer in the plural.", "Put the answer into the plural.", "The answer must be a plural.",
               "I need the plural form.", "Write the answer as a plural noun.", "Plural, please.", "Make the answer plural."),
        after=("Make it plural.", "Put it into the plural.", "Give its plural.", "Then pluralise it."),
    ),
    _form(
        "article",
        ("noun",),
        lambda answer: _ENGLISH.a(answer),
        tails=(" with 'a' or 'an' in front", ", with its indefinite article", " preceded by the right indefinite article",
               ", with a or an", " with the indefinite article", ", article included (a/an)", ", after 'a' or 'an'", " along with 'a' or 'an'"),
        notes=("Put 'a' or 'an' before the answer.", "Use the indefinite article.", "Include the right article, a or an.",
               "The answer needs its indefinite article.", "Begin with 'a' or 'an', whichever is right.", "Answer with a/an and the noun.",
               "Don't forget 'a' or 'an'.", "Write the answer with the indefinite article."),
        after=("Put 'a' or 'an' in front of it.", "Add the right indefinite article to it.", "Write it with a or an.", "Give it with its article (a/an)."),
    ),
)  # fmt: skip


def _spell_number(answer: str) -> str | None:
    number = _number(answer)
    return None if number is None else lexicon.translate("number", str(number), "en")


def _ordinal(answer: str) -> str | None:
    number = _number(answer)
    return None if number is None else str(_ENGLISH.ordinal(str(number)))


NUMBER_FORMS = (
    _form(
        "in_words",
        ("number",),
        _spell_number,
        tails=(" in words", ", written out in words", " as a word, not in digits", ", spelled out", " in English words", ", without using digits",
               " written as words", ", in letters rather than digits"),
        notes=("Write the number out in words.", "Use words, not digits.", "No digits in your answer.", "Spell out the number.",
               "The number should be in words.", "Answer with a number word.", "Numbers must be written as words.", "Give the answer in words."),
        after=("Write it in words.", "Spell it out.", "Put it in words rather than digits.", "Say it in words."),
    ),
    _form(
        "ordinal",
        ("number",),
        _ordinal,
        tails=(" as an ordinal (like 3rd)", ", as an ordinal number such as 5th", " with its ordinal ending", ", in the style of 1st, 2nd, 3rd",
               ", written as an ordinal in digits", " in ordinal form (4th)", ", with st, nd, rd or th after it", " as 1st, 2nd and so on"),
        notes=("Give the answer as an ordinal, like 3rd.", "Use ordinal digits, e.g. 5th.", "Add the ending: st, nd, rd or th.",
               "Write the number as an ordinal (1st, 2nd, ...).", "The answer should look like 7th.", "Ordinal form, please, as in 2nd.",
               "Put the number in ordinal form, like 10th.", "Answer in the style of 1st, 2nd, 3rd."),
        after=("Make it an ordinal such as 4th.", "Write it with st, nd, rd or th.", "Turn it into an ordinal like 6th.", "Give it the right ordinal ending."),
    ),
)  # fmt: skip


def _in_language(code: str) -> Form:
    name = lexicon.LANGUAGES[code]

    def translate(answer: str, operation: Operation) -> str | None:
        return lexicon.translate(operation.domain, answer, code) if operation.domain else None

    return Form(
        f"in_{name.lower()}",
        frozenset(),
        translate,
        tails=(
            f" in {name}", f", in {name}", f", translated into {name}", f" in the {name} language", f", written in {name}",
            f" the way a {name} speaker would write it", f", but in {name}", f" as one writes it in {name}",
        ),
        wraps=(
            f"the {name} word for {{np}}", f"the {name} name of {{np}}", f"{{np}} translated to {name}", f"the {name} translation of {{np}}",
        ),
        notes=(
            f"Answer in {name}.", f"Write the answer in {name}.", f"The answer must be in {name}.", f"Use {name} for your answer.",
            f"I speak {name}, so please answer in {name}.", f"Reply in {name}, not in English.", f"My readers know only {name}; answer in it.",
            f"{name} only, please.", f"The language of the answer is {name}.",
        ),
        after=(f"Say it in {name}.", f"Give the {name} word for it.", f"Put it into {name}.", f"Translate it to {name}.", f"Then write it in {name}."),
        languages=(name,),
    )  # fmt: skip


LANGUAGE_FORMS = {code: _in_language(code) for code in lexicon.LANGUAGES}
FORMS: dict[str, Form] = {
    form.name: form for form in (PLAIN, *WRITTEN, *WORD_FORMS, *NUMBER_FORMS, *LANGUAGE_FORMS.values())
}


def fitting_forms(operation: Operation) -> list[Form]:
    """The forms that suit an operation's answers; plain first, languages last."""
    kinds = {operation.answer, "noun"} if operation.answer == "word" and operation.domain == "thing" else {operation.answer}
    written = [form for form in FORMS.values() if form.kinds & kinds]
    languages = lexicon.languages_of(operation.domain) if operation.domain else ()
    return written + [LANGUAGE_FORMS[code] for code in languages if lexicon.LANGUAGES[code] not in operation.languages]
