# Leaves while its cell is run.
# defence: restart
import os

os._exit(0)
