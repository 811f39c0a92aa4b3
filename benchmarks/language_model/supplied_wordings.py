# SPDX-License-Identifier: Apache-2.0
"""How to ask for the tasks of well-known published data sets, by the names of their files."""

from __future__ import annotations

from dataclasses import dataclass

from .tasks import OperationWording
from .wordings import sections, with_article, wording_of


@dataclass(frozen=True)
class KindOfTask:
    """The kind of a task's answers, and how people ask for it."""

    answer: str
    wording: OperationWording
    domain: str | None = None
    languages: tuple[str, ...] = ()
    sense: str | None = None


def _kind(kind: str, file: str = "supplied") -> KindOfTask:
    wording = wording_of(file, "kind", kind=kind, a_kind=with_article(kind), kinds=f"{kind}s")
    return KindOfTask("word", wording, "any", sense=f"list_{kind}")


def _list(section: str) -> KindOfTask:
    return KindOfTask("word", wording_of("lists", section), "any", sense=f"list_{section}")


def _translation(language: str) -> KindOfTask:
    return KindOfTask("foreign", wording_of("dictionary", "translate", language=language), languages=(language,))


# What operations of the world are called, by the file of their phrases.
_SENSES = {"word_forms": "{}_form", "words": "word_{}", "countries": "{}", "numbers": "number_{}"}


def _word(section: str, answer: str = "word", file: str = "supplied") -> KindOfTask:
    return KindOfTask(answer, wording_of(file, section), sense=_SENSES.get(file, "supplied_{}").format(section))


# Their answers are in no order that a rule gives.
LEFT_OUT = ("induction_taxonomy_animal",)
WORD_TASKS: dict[str, KindOfTask] = {
    "ag_news": _word("news", "phrase"),
    "antonym": _word("opposite", file="word_forms"),
    "capitalize": _word("title", "code", "words"),
    "capitalize_first_letter": _word("first_capital", "letter"),
    "capitalize_last_letter": _word("last_capital", "letter"),
    "capitalize_second_letter": _word("second_capital", "letter"),
    "country_capital": _word("country_capital", "name", "countries"),
    "country_currency": _word("country_money", "phrase"),
    "english_french": _translation("French"),
    "english_german": _translation("German"),
    "english_spanish": _translation("Spanish"),
    "induction_active_to_passive": _word("passive", "sentence"),
    "induction_antonyms": _word("opposite", file="word_forms"),
    "induction_diff": _word("diff", "number"),
    "induction_first_word_letter": _word("first_letter", "letter", "words"),
    "induction_num_to_verbal": _word("words", "phrase", "numbers"),
    "induction_second_word_letter": _word("second_letter", "letter", "words"),
    "induction_singular_to_plural": _word("plural", file="word_forms"),
    "induction_sum": KindOfTask("number", wording_of("numbers", "sum"), sense="numbers_sum"),
    "induction_synonyms": _word("synonym"),
    "induction_translation_en_de": _translation("German"),
    "induction_translation_en_es": _translation("Spanish"),
    "induction_translation_en_fr": _translation("French"),
    "lowercase_first_letter": _word("lower_first", "letter"),
    "lowercase_last_letter": _word("lower_last", "letter"),
    "next_capital_letter": _word("next_capital", "letter"),
    "person_instrument": _word("instrument"),
    "person_occupation": _word("occupation"),
    "present_past": _word("past", file="word_forms"),
    "product_company": _word("maker", "name"),
    "sentiment": _word("sentiment"),
    "singular_plural": _word("plural", file="word_forms"),
    "synonym": _word("synonym"),
    "word_length": _word("length", "number", "words"),
}
for _count in ("3", "5"):
    WORD_TASKS |= {
        f"adjective_v_verb_{_count}": _kind("adjective"),
        f"verb_v_adjective_{_count}": _kind("verb"),
        f"animal_v_object_{_count}": _kind("animal", "lists"),
        f"color_v_animal_{_count}": _kind("colour", "lists"),
        f"fruit_v_animal_{_count}": _kind("fruit", "lists"),
        f"object_v_concept_{_count}": _kind("physical object"),
        f"concept_v_object_{_count}": _kind("word that names no physical object"),
        f"choose_first_of_{_count}": _list("first"),
        f"choose_last_of_{_count}": _list("last"),
        f"choose_middle_of_{_count}": _list("middle"),
        f"alphabetically_first_{_count}": _list("alphabetically_first"),
        f"alphabetically_last_{_count}": _list("alphabetically_last"),
    }


def text_wording(name: str, instruction: str) -> OperationWording:
    """Ways to ask for a task of real text: the folder's own instruction, and what is known for its name."""
    known = sections("real_text")
    section = next((of for of in (name, "clinc", "banking") if of in known and name.startswith(of)), None)
    noun, lines = known[section] if section else ("text", ())
    return OperationWording(noun, (), (instruction, *lines))
