"""What is known of every layer and operation: slope, curvature and kind of map, looked up by exact type."""
