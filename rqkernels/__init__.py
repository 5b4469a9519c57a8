from . import reference
from .reference import code_statistics, residual_decode, residual_search, ResidualCodes
