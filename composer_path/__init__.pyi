"""The public names as type checkers see them; `__init__.py` imports them when they are asked for."""

from composer_path.asking.assistant import Assistant as Assistant
from composer_path.batches.dataset import ConversationDataset as ConversationDataset
from composer_path.config.reading import load_config as load_config
from composer_path.conversion.convert import convert as convert
from composer_path.images.pixels import ImagePreparation as ImagePreparation
from composer_path.images.pixels import load_image as load_image
from composer_path.images.pixels import normalize_image as normalize_image
from composer_path.models.composer_model import ComposerPathMLLM as ComposerPathMLLM
from composer_path.own_parts.imports import import_parts as import_parts
from composer_path.records.conversation import Conversation as Conversation
from composer_path.records.rules import ImageError as ImageError
from composer_path.records.rules import RecordError as RecordError
from composer_path.records.tokenize import IGNORE_INDEX as IGNORE_INDEX
from composer_path.records.tokenize import IMAGE_TOKEN_ID as IMAGE_TOKEN_ID
from composer_path.records.tokenize import TextPreparation as TextPreparation
from composer_path.records.tokenize import TokenizedConversation as TokenizedConversation
from composer_path.records.tokenize import tokenize_conversation as tokenize_conversation
from composer_path.records.tokenize import tokenize_prompt as tokenize_prompt
from composer_path.weights.language_folder import build_language_model as build_language_model
from composer_path.weights.model_folder import PathMLLM as PathMLLM
from composer_path.weights.projector_file import build_projector as build_projector
from composer_path.weights.reference import load_reference_model as load_reference_model
from composer_path.weights.reference import save_reference_model as save_reference_model
from composer_path.weights.tensor_file import read_tensor_file as read_tensor_file
from composer_path.weights.vision_file import build_vision_encoder as build_vision_encoder

__version__: str
