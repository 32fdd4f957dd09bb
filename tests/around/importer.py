"""What a checked module imports."""

import tomllib  # noqa: F401
