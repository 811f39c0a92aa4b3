# SPDX-License-Identifier: Apache-2.0

from .adapters.generated_adapter import GeneratedAdapter as GeneratedAdapter
from .adapters.layout import AdapterLayout as AdapterLayout
from .adapters.published_tokenizer import PublishedTokenizer as PublishedTokenizer
from .adapters.tokenizer import WeightTokenizer as WeightTokenizer
from .fitting.arguments import DnDTrainingArguments as DnDTrainingArguments
from .fitting.task_loss import TaskLoss as TaskLoss
from .fitting.trainer import DnDTrainer as DnDTrainer
from .generator.configuration import PromptConditionedLoraGeneratorConfig as PromptConditionedLoraGeneratorConfig
from .generator.modeling import PromptConditionedLoraGenerator as PromptConditionedLoraGenerator
from .generator.paper_settings import PaperSettings as PaperSettings
from .generator.paper_settings import available_settings as available_settings
from .generator.streaming import StreamedLoraGenerator as StreamedLoraGenerator
from .pairs.collator import PromptCheckpointCollator as PromptCheckpointCollator
from .pairs.collector import CheckpointCollector as CheckpointCollector
from .pairs.dataset import PromptCheckpointDataset as PromptCheckpointDataset
from .pairs.examples import write_examples as write_examples
from .pairs.writer import write_task_without_checkpoints as write_task_without_checkpoints
from .peft_integration.config import DnDConfig as DnDConfig
from .peft_integration.injection import release_generator as release_generator
from .published.adapter_files import ExistingAdapter as ExistingAdapter
from .published.existing import import_adapters as import_adapters
from .published.importer import import_published_adapters as import_published_adapters
from .published.importer import load_published_generator as load_published_generator
from .published.importer import published_token_weights as published_token_weights
from .text.representative import select_representative as select_representative
from .version import __version__ as __version__
