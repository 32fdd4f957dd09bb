"""What holds in every test: shapes are checked, one thread a process, nothing reaches a hub."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook(["pretrain", "data_prep"], "beartype.beartype")
