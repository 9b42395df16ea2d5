"""DreamBooth training of adapters: settings, data and the loop."""

from .loop import CustomizeResult as CustomizeResult
from .loop import customize as customize
from .settings import CustomizeSettings as CustomizeSettings
