"""Compressed models as ordinary checkpoints of their libraries: saved, and loaded by class name."""

from .loading import check_whole as check_whole
from .loading import class_name as class_name
from .loading import is_image_classifier as is_image_classifier
from .loading import load_model as load_model
from .loading import load_pipeline as load_pipeline
from .plans import attach_plan as attach_plan
from .plans import is_native as is_native
from .plans import plan_of as plan_of
from .plans import watch_saving as watch_saving
from .skeletons import dense_skeleton as dense_skeleton
from .transformers import ComCATQuantizationConfig as ComCATQuantizationConfig
from .transformers import ComCATQuantizer as ComCATQuantizer
