"""Start-up, configuration, checkpoints and process groups. Imports neither models nor data."""
