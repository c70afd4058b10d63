"""Adapters in the formats of other tools."""
