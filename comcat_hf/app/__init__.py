"""The browser app: images without and with a pipeline's adapters, and a dense beside a compressed classifier."""

from .classifiers import Answer as Answer
from .classifiers import Classifier as Classifier
from .classifiers import Pair as Pair
from .classifiers import classify as classify
from .classifiers import load_pair as load_pair
from .pipelines import Drawing as Drawing
from .pipelines import DrawSettings as DrawSettings
from .pipelines import Studio as Studio
from .server import AppSettings as AppSettings
from .server import preload as preload
from .server import run_app as run_app
from .server import start_app as start_app
