"""Messages of the DHT. Owned by the DHT core; see spec 03."""

from __future__ import annotations
