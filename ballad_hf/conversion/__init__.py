"""Dual encoders from other models: joined from a classifier and a sentence encoder, or from packages."""
