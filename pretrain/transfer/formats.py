"""Which data does each task read?"""

from __future__ import annotations

FORMATS = {
    "segment": "shards with masks (manifest.json), or a folder with images/, masks/ and classes.txt",
    "detect": "shards with masks (manifest.json), or annotations in COCO's format (a .json file)",
}
MAX_BAD = 0.01  # share of annotations or images that may be left out, unless told otherwise
FEW = 100  # of fewer the share is taken as of so many
