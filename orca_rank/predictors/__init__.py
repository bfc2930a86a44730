"""From the body's features to what the task asks for."""
