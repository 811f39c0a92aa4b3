# SPDX-License-Identifier: Apache-2.0

from .checksums import renew_checksums as renew_checksums
from .configuration import PromptConditionedLoraGeneratorConfig as PromptConditionedLoraGeneratorConfig
from .modeling import PromptConditionedLoraGenerator as PromptConditionedLoraGenerator
from .paper_settings import PaperSettings as PaperSettings
from .paper_settings import available_settings as available_settings
from .revision_history import MOST_POINTS_LOST as MOST_POINTS_LOST
from .revision_history import Revision as Revision
from .revision_history import check_regression as check_regression
from .revision_history import points_below_best as points_below_best
from .revision_history import revisions as revisions
from .streaming import StreamedLoraGenerator as StreamedLoraGenerator
from .verification import Check as Check
from .verification import Verification as Verification
from .verification import verify_adapter as verify_adapter
