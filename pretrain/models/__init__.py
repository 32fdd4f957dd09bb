"""Which networks can be pre-trained, and which parts predict with them?"""
