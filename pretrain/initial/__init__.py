"""How does a run start from weights that others have trained, or that it has trained itself?"""
