"""The only home of pydantic: what a preset and a run are."""
