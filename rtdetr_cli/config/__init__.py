"""Settings of a training run and presets: their declaration, validation and sources."""
