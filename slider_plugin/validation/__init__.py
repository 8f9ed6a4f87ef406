"""What is drawn of a slider, and how."""
