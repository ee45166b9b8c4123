"""Reads signatures off published sources and binaries, importing none of them."""
