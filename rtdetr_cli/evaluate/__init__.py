"""How good, how sure, where wrong."""
