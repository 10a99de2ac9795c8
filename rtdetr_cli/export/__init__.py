"""Export: graphs for deployment, verified against their model."""
