"""Damaged and hostile files, by the thousand; see `docs/reliability.md`."""
