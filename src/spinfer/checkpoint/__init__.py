"""Compressed Hugging Face checkpoints on disk: config, streaming read and write, conversion, inspection."""
