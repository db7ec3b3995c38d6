"""A page for a trained policy; see README.md here."""
