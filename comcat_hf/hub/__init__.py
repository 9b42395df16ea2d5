"""Local folders and Hub repositories: atomic writes, downloads and uploads."""

from .download import list_files as list_files
from .download import pull_folder as pull_folder
from .download import resolve_file as resolve_file
from .failures import without_secrets as without_secrets
from .files import read_json as read_json
from .files import replacing as replacing
from .files import write_bytes_atomic as write_bytes_atomic
from .files import write_json_atomic as write_json_atomic
from .files import write_text_atomic as write_text_atomic
from .found import kind_of as kind_of
from .found import readable_size as readable_size
from .found import sizes_in as sizes_in
from .sources import hub_id as hub_id
from .upload import push_folder as push_folder
