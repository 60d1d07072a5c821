"""A trained model on pictures that anybody has: found, read, answered, and written down."""
