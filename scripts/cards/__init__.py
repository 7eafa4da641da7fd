"""Model cards: what is checked of each published flavor, and its page."""
