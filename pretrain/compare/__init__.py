"""Which method is worth what? Rows of the table under one backbone, data, budget and seeds, side by side."""
