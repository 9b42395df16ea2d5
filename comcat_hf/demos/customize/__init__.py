"""The demo of customizing: a small Stable Diffusion is taught a digit that it has not seen, in four ways."""

from .run import CustomizeDemoResult as CustomizeDemoResult
from .run import CustomizeDemoSettings as CustomizeDemoSettings
from .run import CustomizeRow as CustomizeRow
from .run import run_customize_demo as run_customize_demo
