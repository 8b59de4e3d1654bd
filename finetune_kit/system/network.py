"""Whether the Hugging Face Hub can be reached, asked once and answered at once."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit


@functools.cache
def hub_reachable() -> bool:
    """False when HF_HUB_OFFLINE is set or no connection to HF_ENDPOINT opens within 3 seconds.

    The Hub's own client retries for 47 seconds before it says so. Behind a proxy the answer is True: only the client
    can tell there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    parts = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True
