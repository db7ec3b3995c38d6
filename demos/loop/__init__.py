"""Adding up digits in a picture: the smallest task in which writing steps down pays."""
