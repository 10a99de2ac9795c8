"""Graphs made for deployment, and the gate that they pass."""
