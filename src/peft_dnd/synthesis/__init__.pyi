# SPDX-License-Identifier: Apache-2.0

from .answers import AnswerAsked as AnswerAsked
from .filtering import PromptFilter as PromptFilter
from .record import Synthesis as Synthesis
from .settings import SynthesisSettings as SynthesisSettings
from .synthesize import synthesize_prompts as synthesize_prompts
from .synthesize import synthesize_task as synthesize_task
from .wording import TaskSeeds as TaskSeeds
from .writers import EndpointWriter as EndpointWriter
from .writers import ModelWriter as ModelWriter
from .writers import TextWriter as TextWriter
from .writers import Written as Written
