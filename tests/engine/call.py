"""What does a rank do for a test that wants one function called? `call.py FILE`, a pickle of it and its arguments."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

if __name__ == "__main__":
    function, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    function(int(os.environ["RANK"]), *arguments)
