import os

# Before any test imports torch. A run chooses its threads by the machine's load otherwise, and runs
# that are compared bit by bit need the same number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
