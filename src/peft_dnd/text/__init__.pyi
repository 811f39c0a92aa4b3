# SPDX-License-Identifier: Apache-2.0

from .answer_states_encoder import AnswerStatesTextEncoder as AnswerStatesTextEncoder
from .embedding_cache import PromptEmbeddingCache as PromptEmbeddingCache
from .encoder import TextEncoder as TextEncoder
from .hidden_states_encoder import HiddenStatesTextEncoder as HiddenStatesTextEncoder
from .out_of_distribution import OutOfDistributionWarning as OutOfDistributionWarning
from .out_of_distribution import PromptReference as PromptReference
from .prompts import ConditionText as ConditionText
from .prompts import prompt_texts as prompt_texts
from .prompts_and_answers import condition_texts as condition_texts
from .representative import select_representative as select_representative
from .sentence_transformer_encoder import SentenceTransformerTextEncoder as SentenceTransformerTextEncoder
from .token_states import TokenStates as TokenStates
