"""Messages of the replicated log. Owned by the log core; see spec 04."""

from __future__ import annotations
