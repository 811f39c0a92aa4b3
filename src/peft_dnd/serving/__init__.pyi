# SPDX-License-Identifier: Apache-2.0

from .app import create_app as create_app
from .cache import AdapterCache as AdapterCache
from .generators import ServedGenerator as ServedGenerator
from .generators import load_served_generator as load_served_generator
from .json_logs import JsonFormatter as JsonFormatter
from .limits import ServiceLimits as ServiceLimits
from .service import AdapterService as AdapterService
from .tasks import TaskPrompts as TaskPrompts
from .tokens import Tokens as Tokens
