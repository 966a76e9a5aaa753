"""Closed-loop evaluation: tasks with known success, episodes in simulated time, statistics."""
