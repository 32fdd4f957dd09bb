"""Lists of addresses to download: read strictly, judged, freed of duplicates, shuffled, and kept as parquet parts."""

from data_prep.rows.folder import Rows, read_rows
from data_prep.rows.inputs import Input, expanded
from data_prep.rows.normalise import Normalise, normalised

__all__ = ["Input", "Normalise", "Rows", "expanded", "normalised", "read_rows"]
