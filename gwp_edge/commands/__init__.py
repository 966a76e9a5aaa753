"""The commands. Each module holds signatures and output; what it needs is imported when it runs."""
