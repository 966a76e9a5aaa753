"""Deploy GigaWorld-Policy checkpoints on robots."""
