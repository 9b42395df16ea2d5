"""The command line: `comcat <command>`. Everything that prints is here."""

# Each module adds its commands to the app.
from . import app as app_command  # noqa: F401
from . import compress as compress
from . import convert as convert
from . import demo as demo
from . import export as export
from . import files as files
from . import ranks as ranks
from .shell import app as app
from .shell import main as main
