"""Files in and out: a local folder or a Hub id, atomic writes, up- and downloads."""

from .download import pull_folder as pull_folder
from .download import resolve_file as resolve_file
from .files import read_json as read_json
from .files import write_bytes_atomic as write_bytes_atomic
from .files import write_json_atomic as write_json_atomic
from .files import write_text_atomic as write_text_atomic
from .upload import push_folder as push_folder
