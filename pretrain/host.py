"""What is this machine called?"""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """What operators call this machine: NODE_NAME, which pods are told, or its own name."""
    return os.environ.get("NODE_NAME") or socket.gethostname()
