"""What will a run need of a cluster, and which setting is the fastest that fits?"""
