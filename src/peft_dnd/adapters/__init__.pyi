# SPDX-License-Identifier: Apache-2.0

from .factors import canonical_factors as canonical_factors
from .factors import canonical_state_dict as canonical_state_dict
from .factors import delta_weight_distance as delta_weight_distance
from .factors import delta_weight_mse as delta_weight_mse
from .generated_adapter import GeneratedAdapter as GeneratedAdapter
from .layout import AdapterLayout as AdapterLayout
from .layout import LoraModule as LoraModule
from .layout import LoraTensor as LoraTensor
from .layouts import layout_from_config as layout_from_config
from .layouts import layout_from_folder as layout_from_folder
from .layouts import layout_from_model as layout_from_model
from .matching import BaseModelNameWarning as BaseModelNameWarning
from .method_layout import MethodLayout as MethodLayout
from .one_layout import Conversion as Conversion
from .one_layout import common_layout as common_layout
from .one_layout import convert_adapter as convert_adapter
from .positions import TokenPositions as TokenPositions
from .positions import token_positions as token_positions
from .published_tokenizer import PublishedTokenizer as PublishedTokenizer
from .shared_factors import SharedInputs as SharedInputs
from .tokenizer import WeightNormalization as WeightNormalization
from .tokenizer import WeightTokenizer as WeightTokenizer
from .tokenizer import choose_chunk_width as choose_chunk_width
from .tokenizer import weight_statistics as weight_statistics
