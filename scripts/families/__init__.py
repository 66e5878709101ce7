"""A matrix of model families: every command on a tiny checkpoint of each architecture."""
