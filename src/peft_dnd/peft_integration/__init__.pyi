# SPDX-License-Identifier: Apache-2.0

from .config import DnDConfig as DnDConfig
from .injection import install as install
from .injection import release_generator as release_generator
from .pool import AdapterPool as AdapterPool
