"""What the adapter learns from: small pure functions with their formula above them."""
