"""A stage for tests of the loop that ends well and makes nothing."""

from loop_stage import parser  # noqa: F401
