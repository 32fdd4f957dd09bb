"""Which operators need an implementation of their own, and how is one chosen?"""
