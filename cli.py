"""Command line of gwp-edge."""
