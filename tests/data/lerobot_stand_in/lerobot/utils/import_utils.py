def register_third_party_plugins():
    """Nothing is installed beside the stand-in."""
