"""What families and their authors test with: tiny pipelines from real classes."""
