# SPDX-License-Identifier: Apache-2.0

from .chat_base import ChatBase as ChatBase
from .limits import PageLimits as PageLimits
from .page import PromptPage as PromptPage
from .page_generator import MadeAdapter as MadeAdapter
from .page_generator import PageGenerator as PageGenerator
from .task_map import TaskMap as TaskMap
from .wording import short_name as short_name
