"""What functions of PyTorch do to spaces of units: one rule a function, told in tables by the function's name.

``LAYERS`` are functions with parameters of their own, and are followed wherever they stand; ``FUNCTIONS`` are followed
where they are given units. A function of which there is no rule undoes nothing, and is named in the ledger.
"""
