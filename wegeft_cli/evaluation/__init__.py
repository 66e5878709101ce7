"""Test sets, protocols, generation and scores."""
