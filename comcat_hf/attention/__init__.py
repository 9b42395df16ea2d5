"""Which attention modules and MLPs we know, and what replaces them."""

from .finding import SCOPES as SCOPES
from .finding import find_sites as find_sites
from .mlps import MLPFamily as MLPFamily
from .mlps import MLPView as MLPView
from .mlps import register_mlp_family as register_mlp_family
from .modules import LowRankAttention as LowRankAttention
from .modules import LowRankLinear as LowRankLinear
from .modules import NarrowLinear as NarrowLinear
from .sites import AttentionSite as AttentionSite
from .sites import LinearSite as LinearSite
from .sites import MLPSite as MLPSite
from .sites import Site as Site
from .sites import Tokens as Tokens
from .surgery import apply_ranks as apply_ranks
from .surgery import eval_mode as eval_mode
from .surgery import fit_names as fit_names
from .surgery import meta_copy as meta_copy
from .surgery import read_ranks as read_ranks
from .surgery import replace_module as replace_module
from .views import AttentionFamily as AttentionFamily
from .views import AttentionView as AttentionView
from .views import attention_views as attention_views
from .views import known_attention_classes as known_attention_classes
from .views import named_base_modules as named_base_modules
from .views import register_attention_family as register_attention_family
