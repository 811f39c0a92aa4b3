# SPDX-License-Identifier: Apache-2.0
"""Where the tasks' data sets lie on the Hub, and what their labels are called here.

CLINC150 (Larson et al. 2019, CC BY 3.0) has ten domains of fifteen intents. Its copy on the Hub does not say which
intent is of which domain, so that is said here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HubTask:
    """A task on the Hub.

    Args:
        repo_id: The data set.
        text: The column of the text.
        label: The column of the label: its name, or a class of a name.
        instruction: What is asked.
        config: The data set's configuration.
        revision: Its branch.
        test_split: The split that is tested on.
        labels: Name there -> name here, for the labels to use; `None` uses all, under their own names.
    """

    repo_id: str
    text: str
    label: str
    instruction: str
    config: str | None = None
    revision: str | None = None
    test_split: str = "test"
    labels: Mapping[str, str] | None = None

    def label_name(self, there: str) -> str | None:
        """What a label is called here; `None` if its rows are not used."""
        return in_words(there) if self.labels is None else self.labels.get(there)


def in_words(name: str) -> str:
    """A label's name as words.

    >>> in_words("AddToPlaylist"), in_words("card_arrival")
    ('add to playlist', 'card arrival')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()


_CLINC_DOMAINS = {
    "auto_and_commute": "current_location oil_change_when oil_change_how uber traffic tire_pressure "
    "schedule_maintenance gas mpg distance directions last_maintenance gas_type tire_change jump_start",
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate min_payment "
    "bill_balance transfer order_checks balance spending_history transactions report_fraud",
    "credit_cards": "replacement_card_duration expiration_date damaged_card improve_credit_score report_lost_card "
    "card_declined credit_limit_change apr redeem_rewards credit_limit rewards_balance application_status "
    "credit_score new_card international_fees",
    "home": "what_song play_music todo_list_update reminder reminder_update calendar_update order_status "
    "update_playlist shopping_list calendar next_song order todo_list shopping_list_update smart_home",
    "kitchen_and_dining": "food_last confirm_reservation how_busy ingredients_list calories nutrition_info recipe "
    "restaurant_reviews restaurant_reservation meal_suggestion restaurant_suggestion cancel_reservation "
    "ingredient_substitution cook_time accept_reservations",
    "meta": "change_speed user_name whisper_mode yes change_volume no change_language repeat change_accent cancel "
    "sync_device change_user_name change_ai_name reset_settings maybe",
    "small_talk": "who_made_you meaning_of_life who_do_you_work_for do_you_have_pets what_are_your_hobbies fun_fact "
    "what_is_your_name where_are_you_from goodbye thank_you greeting tell_joke are_you_a_bot how_old_are_you "
    "what_can_i_ask_you",
    "travel": "plug_type travel_notification translate flight_status international_visa timezone exchange_rate "
    "travel_suggestion travel_alert vaccines lost_luggage book_flight book_hotel carry_on car_rental",
    "utility": "weather alarm date find_phone share_location timer make_call calculator definition "
    "measurement_conversion flip_coin spelling time roll_dice text",
    "work": "pto_request_status next_holiday insurance_change insurance meeting_schedule payday taxes income "
    "rollover_401k pto_balance pto_request w2 schedule_meeting direct_deposit pto_used",
}

HUB_TASKS: dict[str, HubTask] = {
    **{
        f"clinc_{domain}": HubTask(
            "clinc/clinc_oos",
            "text",
            "intent",
            f"Which {domain.replace('_', ' ')} request is this?",
            config="plus",
            labels={intent: in_words(intent) for intent in intents.split()},
        )
        for domain, intents in _CLINC_DOMAINS.items()
    },
    "banking77": HubTask("mteb/banking77", "text", "label_text", "Which banking request is this?"),
    "snips": HubTask("benayas/snips", "text", "category", "What does the speaker want the assistant to do?"),
    "sst2": HubTask(
        "stanfordnlp/sst2",
        "sentence",
        "label",
        "Is this movie review positive or negative?",
        test_split="validation",
        labels={"negative": "negative review", "positive": "positive review"},
    ),
    "subj": HubTask(
        "SetFit/subj",
        "text",
        "label_text",
        "Is this sentence an opinion or a fact of the plot?",
        labels={"subjective": "subjective opinion", "objective": "objective plot summary"},
    ),
    "trec": HubTask(
        "CogComp/trec",
        "text",
        "coarse_label",
        "What kind of answer does this question ask for?",
        revision="refs/convert/parquet",
        labels={
            "DESC": "description",
            "ENTY": "entity",
            "ABBR": "abbreviation",
            "HUM": "person",
            "LOC": "location",
            "NUM": "number",
        },
    ),
    "tweet_emotion": HubTask(
        "cardiffnlp/tweet_eval", "text", "label", "Which emotion does this tweet express?", config="emotion"
    ),
    "tweet_irony": HubTask(
        "cardiffnlp/tweet_eval",
        "text",
        "label",
        "Is this tweet ironic?",
        config="irony",
        labels={"non_irony": "not ironic", "irony": "ironic"},
    ),
}
