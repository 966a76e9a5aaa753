"""Cameras and arms. Each driver imports its vendor library only when it is opened."""
