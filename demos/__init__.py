"""Small worlds that train in minutes on a laptop."""
