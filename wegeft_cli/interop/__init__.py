"""Optional packages: what they need of us and what we use of them."""
