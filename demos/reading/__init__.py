"""Reading a letter: the smallest task in which asking for the full image is sometimes worth it."""
