"""The only place that reads the command line or prints."""
