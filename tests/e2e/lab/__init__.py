"""What the end-to-end tests share: QEMU processes and their monitors, the guest's command port, running vmtide.

Only Python's standard library is used, and nothing of vmtide's own code: the tests look at the product from outside.
"""
