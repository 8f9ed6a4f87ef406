"""`slider demo`: train a slider on the bundled tiny world and measure what it does."""
