"""What is in a finished data set, is it whole, what does it share with others, and how is it mended?"""
