"""Model cards and uploads to a hub."""
