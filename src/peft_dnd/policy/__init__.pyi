# SPDX-License-Identifier: Apache-2.0

from .behaviour import BehaviourGate as BehaviourGate
from .bounds import upper_bound as upper_bound
from .checking import PolicyCheck as PolicyCheck
from .checking import check_adapter as check_adapter
from .norms import NormBounds as NormBounds
from .policy import GeneratorPolicy as GeneratorPolicy
from .refused_prompts import RefusedClass as RefusedClass
from .refused_prompts import RefusedPrompts as RefusedPrompts
