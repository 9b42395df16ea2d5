"""ComCAT as a PEFT method."""

from .groups import parameter_groups as parameter_groups
from .layer import ComCATLayer as ComCATLayer
from .model import ComCATModel as ComCATModel
from .model import initialize_comcat_weights as initialize_comcat_weights
from .registration import register as register
