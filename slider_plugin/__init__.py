"""Train a concept slider for any diffusion model: the host that family plugins plug into."""
