"""Preferences, demonstrations and prompts: read, recognised, split (`load`), and made to fit a model (`fit`)."""
