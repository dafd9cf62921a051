"""Old place of :mod:`lightning_lcnn.models.by_name`, kept for code that was written for 0.1."""

from lightning_lcnn.models.by_name import LIBRARIES as LIBRARIES
from lightning_lcnn.models.by_name import OWN as OWN
from lightning_lcnn.models.by_name import build_network as build_network
from lightning_lcnn.models.by_name import is_low_curvature as is_low_curvature
from lightning_lcnn.models.by_name import known_names as known_names
from lightning_lcnn.models.by_name import load_weights as load_weights
from lightning_lcnn.models.by_name import unknown_name as unknown_name
