# SPDX-License-Identifier: Apache-2.0

from .answer_states import AnswerStatesTextEncoder as AnswerStatesTextEncoder
from .condition_text import condition_texts as condition_texts
from .encoder import PromptEmbeddingCache as PromptEmbeddingCache
from .encoder import TextEncoder as TextEncoder
from .hidden_states import HiddenStatesTextEncoder as HiddenStatesTextEncoder
from .out_of_distribution import OutOfDistributionWarning as OutOfDistributionWarning
from .out_of_distribution import PromptReference as PromptReference
from .prompts import ConditionText as ConditionText
from .prompts import TokenStates as TokenStates
from .representative import select_representative as select_representative
from .sentence_transformer import SentenceTransformerTextEncoder as SentenceTransformerTextEncoder
