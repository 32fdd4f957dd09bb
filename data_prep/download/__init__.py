"""Which names of the downloads may sources use?"""

from data_prep.download.collection import Describe, Described, downloaded
from data_prep.download.options import Download
from data_prep.download.table import Row

__all__ = ["Describe", "Described", "Download", "Row", "downloaded"]
