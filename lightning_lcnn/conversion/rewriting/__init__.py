"""The source editor, which turns calls of functions in a ``forward`` into child modules."""
