"""Who is who."""

from __future__ import annotations

KEYS = {who: f"{who}-key-{'0' * 32}" for who in ("honest", "greedy", "hostile", "admin")}
