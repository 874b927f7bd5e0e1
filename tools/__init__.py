"""Command-line programs around train_gpt.py."""
